"""Ahead-of-time compilation of Triton kernels, and the resources of kernels on each architecture, with no GPU.

``python -m compiled`` (in tests/) reads a JSON list of requests and prints a JSON list of figures; it is a process of
its own because kernels defined under TRITON_INTERPRET=1 cannot be compiled. ``triton_figures`` runs it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ARCHS = (80, 90, 100)
# Bytes of shared memory a block may have.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
MATRIX = {80: r"mma\.sync", 90: r"wgmma\.mma_async|mma\.sync", 100: r"tcgen05\.mma|mma\.sync"}
REGISTERS = 65_536  # of a multiprocessor


def cuobjdump() -> str:
    """NVIDIA's tool that Triton's wheel carries."""
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def resources(path: str) -> dict[str, dict[str, int]]:
    """{"function (sm_80)": {REG, STACK, SHARED, LOCAL}} of a cubin, object or shared library."""
    command = [cuobjdump(), "--dump-resource-usage", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, int]] = {}
    arch, name = "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match.group(1)
        elif match := re.match(r"\s*Function ([^\s:]+)", line):
            name = match.group(1)
        elif "REG:" in line:
            figures = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            found[f"{name} ({arch})" if arch else name] = figures
    return found


def compile_one(request: dict[str, Any]) -> dict[str, Any]:
    """Figures of one kernel: request = {kernel: "module:name", signature, constants, arch, warps, stages,
    multiples_of_16, maxnreg or none}."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = request["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), name)
    dtypes = {name: getattr(triton.language, name) for name in ("float16", "bfloat16", "float32", "int8")}
    constants = {k: dtypes.get(v, v) if isinstance(v, str) else v for k, v in request["constants"].items()}
    signature = {p: "constexpr" if p in constants else request["signature"][p] for p in kernel.arg_names}
    multiples = request.get("multiples_of_16", ())
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, p in enumerate(kernel.arg_names)
        if signature[p].startswith("*") or p in multiples
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": request["warps"], "num_stages": request["stages"]}
    if "maxnreg" in request:
        options["maxnreg"] = request["maxnreg"]
    made = triton.compile(source, target=GPUTarget("cuda", request["arch"], 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        (figures,) = resources(file.name).values()
    narrow = len(re.findall(r"arith\.muli [^\n]*: (?:tensor<[^>]*x)?i32>?[^\n]*", made.asm["ttir"]))
    return {
        "registers": figures["REG"],
        "local": figures["LOCAL"],
        "stack": figures["STACK"],
        "shared": made.metadata.shared,
        "matrix": len(re.findall(MATRIX[request["arch"]], made.asm["ptx"])),
        "int32_multiplications": narrow,
        "warps": request["warps"],
        "arch": request["arch"],
    }


def refusal(figures: dict[str, Any]) -> str | None:
    """Why a kernel could not run well, or at all, on its architecture."""
    if figures["stack"] or figures["local"]:
        return f"spills to {figures['stack'] + figures['local']} bytes of stack"
    limit = SHARED_LIMIT[figures["arch"]]
    if figures["shared"] > limit:
        return f"needs {figures['shared']} bytes of shared memory; sm_{figures['arch']} has {limit}"
    if figures["registers"] * figures["warps"] * 32 > REGISTERS:
        return f"needs {figures['registers']} registers in each of {figures['warps'] * 32} threads"
    return None


def triton_figures(requests: list[dict[str, Any]], processes: int = 2) -> list[dict[str, Any]]:
    """The figures of each request, or {"error": text}."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # What the caller's path has comes first: another Triton can be measured so.
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "tests")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)

    def run(part: list[dict[str, Any]]) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "compiled"]
        done = subprocess.run(command, input=json.dumps(part), capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return list(json.loads(done.stdout.splitlines()[-1]))

    with ThreadPoolExecutor(processes) as pool:
        parts = list(pool.map(run, [requests[i::processes] for i in range(processes)]))
    return [parts[i % processes][i // processes] for i in range(len(requests))]


def main() -> None:
    answers = []
    for request in json.load(sys.stdin):
        try:
            answers.append(compile_one(request))
        except Exception as error:  # one that does not compile is an answer
            answers.append({"error": f"{type(error).__name__}: {error}"[-2000:]})
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
