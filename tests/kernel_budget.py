"""What each kernel uses of each architecture, measured by compiling; the budget is data/kernel_budget.json.

``python tests/kernel_budget.py`` compiles all and prints the table of docs/kernel_figures.md; --write renews both.
--compare holds another Triton's (first on PYTHONPATH) against the budget: 1 if a kernel does not compile.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import compiled
import fira_budget
import maxsim_budget
import norm_linear_attention_budget
import projection_budget

BUDGET = Path(__file__).parent / "data" / "kernel_budget.json"
PAGE = Path(__file__).parents[1] / "docs" / "kernel_figures.md"
HEADING = "| kernel | registers | spills | shared bytes | matrix instructions |"
MODULE = "pyelastic.triton_kernels.margin_softmax"
FLOATS = ("w", "inv", "threshold", "map", "cos_target", "out", "lse", "factor", "sum", "unit", "along", "back", "scale")


def triton_requests() -> dict[str, dict[str, Any]]:
    """name -> request, for every configuration and architecture; strides specialised as the launcher's calls are."""
    from pyelastic.triton_kernels import margin_softmax as kernels

    pointers = {f"p_{n}": "*fp32" for n in (*FLOATS, "acc")}
    pointers |= {f"p_{n}": "*i64" for n in ("index", "labels", "sorted", "order", "first")}
    sizes = dict.fromkeys(("B", "C", "D", "n", "first", "splits"), "i32")
    strides = dict.fromkeys(("s_row", "s_out_row", "s_col", "s_out_col"), "i64")
    requests: dict[str, dict[str, Any]] = {}
    # The plain call, and those that need most registers: columns apart, rows that begin anywhere, and all the ways of
    # scattering rows at once.
    plain = {"s_col": 1, "s_out_col": 1, "K": 1, "HAS_INDEX": False, "HARD": False}
    ways: list[tuple[str, dict[str, Any]]] = [
        ("", plain),
        ("transposed ", {"s_row": 1, "s_out_row": 1, "K": 1, "HAS_INDEX": False, "HARD": False}),
        ("unaligned ", plain),
        ("scattered ", {"K": 3, "HAS_INDEX": True, "HARD": True}),
    ]
    multiples = {"": ["D", "s_row", "s_out_row"], "unaligned ": []}
    for arch, (tag, way) in itertools.product(compiled.ARCHS, ways):
        table = kernels.MARGIN_SOFTMAX_CONFIGS_SM100 if arch == 100 else kernels.MARGIN_SOFTMAX_CONFIGS
        table = kernels.MARGIN_SOFTMAX_CONFIGS_SCATTERED if tag else table
        for (bits, width), (block_b, block_c, block_d, warps, stages) in table.items():
            operand = f"float{bits}"
            moved = {f"p_{n}": f"*fp{bits}" for n in ("e", "scaled", "p")}
            constants = {"OPERAND": operand, "BLOCK_B": block_b, "BLOCK_C": block_c, "BLOCK_D": block_d, **way}
            variants: dict[str, dict[str, Any]] = {
                "forward": {"EXTRA": False},
                "forward, all statistics": {"EXTRA": True, "HARD": True},
                "gradient_tile": {"HARD": True},
            }
            if width:
                variants = {"grad_e": {"WIDTH": width}, "grad_w": {"WIDTH": width}}
            for name, extra in variants.items():
                kernel = name.split(",")[0]
                known = getattr(kernels, kernel).arg_names
                requests[f"triton {name} {tag}{operand}{f' D{width}' if width else ''} (sm_{arch})"] = {
                    "kernel": f"{MODULE}:{kernel}",
                    "signature": {**pointers, **moved, **sizes, **strides, "scale": "fp32"},
                    "constants": {k: v for k, v in (constants | extra).items() if k in known},
                    "multiples_of_16": multiples.get(tag, ["D"]),
                    "arch": arch, "warps": warps, "stages": stages,
                    **({"maxnreg": kernels.SCATTERED_REGISTERS} if tag and width and bits == 32 else {}),
                }  # fmt: skip
        if tag:
            continue
        common = {"s_col": 1, "HAS_INDEX": False}
        for name, extra in (
            ("inverse_norms", {"BLOCK": 16, "BLOCK_D": 256}),
            ("finish_w", {"BLOCK": 8, "WIDTH": 1024, "s_out_col": 1}),
        ):
            requests[f"triton {name} (sm_{arch})"] = {
                "kernel": f"{MODULE}:{name}",
                "signature": {**pointers, **sizes, **strides},
                "constants": {**common, **extra},
                "multiples_of_16": ["D", "s_row", "s_out_row"],
                "arch": arch, "warps": 4, "stages": 3,
            }  # fmt: skip
    others = (projection_budget, fira_budget, maxsim_budget, norm_linear_attention_budget)
    return requests | {name: request for module in others for name, request in module.requests().items()}


def _demangle(names: list[str]) -> dict[str, str]:
    """Short readable names: the kernel and its template arguments."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    found = {}
    for mangled, name in zip(names, done.stdout.splitlines(), strict=True):
        short = re.sub(r"\(anonymous namespace\)::|pyelastic::cuda::|^void ", "", name)
        short = re.sub(r"\((bool|int)\)", "", short).replace("__nv_bfloat16", "bfloat16").replace("__half", "float16")
        short = re.sub(r"\((?!anonymous).*$", "", short)
        found[mangled] = f"cuda {short}"
    return found


def cuda_figures() -> dict[str, dict[str, Any]]:
    """Figures of the kernels in the built module; empty where it has none or the tools are missing."""
    from pyelastic import _extension

    if not hasattr(_extension.load(), "cuda_mma_gemm") or not shutil.which("c++filt"):
        return {}
    path = str(_extension.load().__file__)
    raw = compiled.resources(path)
    mangled = sorted({name.split(" (")[0] for name in raw})
    readable = _demangle(mangled)
    command = [compiled.cuobjdump(), "-sass", path]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    matrix: dict[str, int] = {}
    arch = name = ""
    for line in sass.splitlines():
        if match := re.match(r"\s*arch = (sm_\w+)", line):
            arch = match.group(1)
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = match.group(1)
        elif "HMMA" in line:
            matrix[f"{name} ({arch})"] = matrix.get(f"{name} ({arch})", 0) + 1
    found = {}
    for key, figures in raw.items():
        symbol, _, rest = key.partition(" (")
        found[f"{readable[symbol]} ({rest}"] = {
            "registers": figures["REG"], "stack": figures["STACK"], "local": figures["LOCAL"],
            "shared": figures["SHARED"], "matrix": matrix.get(key, 0),
        }  # fmt: skip
    return found


def measure() -> dict[str, dict[str, Any]]:
    """Everything. An entry that does not compile has "error"."""
    requests = triton_requests()
    figures = dict(zip(requests, compiled.triton_figures(list(requests.values())), strict=True))
    return cuda_figures() | figures


def table(figures: dict[str, dict[str, Any]]) -> str:
    """A row for each kernel, with the figures of its architectures, oldest first; one figure where they agree."""
    kernels: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for name, f in figures.items():
        kernel, _, arch = name.rpartition(" (sm_")
        kernels.setdefault(kernel, []).append((int(re.sub(r"\D", "", arch)), f))
    lines = [HEADING, "|---|---|---|---|---|"]
    for kernel, found in sorted(kernels.items()):
        each = [f for _, f in sorted(found, key=lambda item: item[0])]
        columns = [[f["registers"], f["stack"] + f["local"], f["shared"], f["matrix"]] for f in each]
        cells = [" / ".join(map(str, row if len(set(row)) > 1 else row[:1])) for row in zip(*columns, strict=True)]
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compare(figures: dict[str, dict[str, Any]]) -> int:
    """Prints what does not compile and what spills more than the budget says; the number of the former."""
    budget = json.loads(BUDGET.read_text())
    failed = {name: f["error"] for name, f in figures.items() if "error" in f}
    for name, error in failed.items():
        print(f"{name}: {error}")
    for name, f in figures.items():
        bytes_now, bytes_then = (x.get("stack", 0) + x.get("local", 0) for x in (f, budget[name]))
        if bytes_now > bytes_then:
            print(f"{name}: spills {bytes_now} bytes, {bytes_then} in the budget")
    print(f"{len(figures)} kernels, {len(failed)} do not compile")
    return len(failed)


def main() -> None:
    if "--compare" in sys.argv:
        requests = triton_requests()
        figures = dict(zip(requests, compiled.triton_figures(list(requests.values())), strict=True))
        sys.exit(compare(figures) > 0)
    figures = measure()
    if not any(name.startswith("cuda") for name in figures):  # not built here: the figures of the build before
        figures |= {name: f for name, f in json.loads(BUDGET.read_text()).items() if name.startswith("cuda")}
    print(table(figures))
    if "--write" in sys.argv:
        BUDGET.write_text(json.dumps(figures, indent=0, sort_keys=True) + "\n")
        PAGE.write_text(PAGE.read_text().split(HEADING)[0] + table(figures))


if __name__ == "__main__":
    main()
