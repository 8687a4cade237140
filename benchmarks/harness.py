"""Interleaved timing, peak memory in fresh processes, machine peaks, and the oracle that admits a variant.

A benchmark is a module ``benchmarks.bench_<op>`` with the members of ``Bench``.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Inputs = tuple[Tensor, ...]


class Case(Protocol):
    """One problem size."""

    @property
    def id(self) -> str: ...
    def flops(self) -> float:
        """Operations a forward and backward step cannot do without."""

    def gradient_bytes(self) -> int:
        """Bytes of the gradients a step must return: not counted as a variant's own memory."""

    def inputs(self, seed: int, device: str) -> Inputs: ...


@dataclass(frozen=True)
class Variant:
    """A way to compute the op. ``limit``: relative RMS error against float64 that result and gradients may have.

    ``truth``: what this variant should give, where the benchmark compares several algorithms.
    """

    run: Callable[..., Any]
    limit: float
    truth: Callable[..., Inputs] | None = None


class Bench(Protocol):
    """What a benchmark module provides."""

    OP: str
    OURS: tuple[str, ...]  # rows of ours, the one to compare with first
    LEAVES: int  # leading inputs that get gradients; 0: an in-place step, whose results `run` returns

    def cases(self, full: bool, device: str) -> list[Case]: ...
    def variants(self, case: Case, device: str) -> dict[str, Variant]: ...
    def truth(self, *inputs: Tensor) -> Inputs:
        """Result and gradients in float64."""

    def floor(self, *inputs: Tensor) -> None:
        """The operations no implementation can avoid, alone; its row is called ``floor``."""


def load(op: str) -> Any:
    """The benchmark module of an op."""
    return importlib.import_module(f"benchmarks.bench_{op}")


def step(bench: Any, run: Callable[..., Tensor], inputs: Inputs) -> Inputs:
    """One forward and backward on fresh leaves: result and gradients; or one in-place step."""
    if not bench.LEAVES:
        return tuple(run(*inputs))
    leaves = [x.detach().requires_grad_() for x in inputs[: bench.LEAVES]]
    value = run(*leaves, *inputs[bench.LEAVES :])
    value.backward()
    return (value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None))


def forward(bench: Any, run: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    """Forward of training: with the graph for a backward that does not come."""
    leaves = [x.detach().requires_grad_() for x in inputs[: bench.LEAVES]]
    return run(*leaves, *inputs[bench.LEAVES :]).detach()


def errors(got: Inputs, want: Inputs) -> list[float]:
    """Relative RMS error of the result and of each gradient; NaN where not finite."""
    pairs = zip(got, want, strict=True)
    return [float((a.to(b.dtype) - b).norm() / b.norm()) for a, b in pairs]


def refusal(error: list[float], limit: float) -> str | None:
    """Why a result may not have its speed reported, or None."""
    if all(e <= limit for e in error):
        return None
    return "ORACLE: relative RMS error " + ", ".join(f"{e:.1e}" for e in error) + f"; limit {limit:.0e}"


def _seconds(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def machine(device: str) -> dict[str, Any]:
    """What was measured on, and its peaks: a large copy (read + write) and a large GEMM."""
    report: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    size, dtype = (8192, torch.float16) if device == "cuda" else (2048, torch.float32)
    if device == "cuda":
        report["gpu"] = torch.cuda.get_device_name()
    else:
        from pyelastic import _extension

        report["cpu"] = platform.processor()
        if os.path.exists("/proc/cpuinfo"):
            with open("/proc/cpuinfo") as file:
                names = (line.split(":")[1].strip() for line in file if line.startswith("model name"))
                report["cpu"] = next(names, report["cpu"])
        report |= {"threads": torch.get_num_threads(), "isa": _extension.load().isa()}
    source = torch.randn(1 << 26, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    copy = min(_seconds(lambda: target.copy_(source), device) for _ in range(5))
    gemm = min(_seconds(lambda: a @ b, device) for _ in range(5))
    report["copy_gb_per_s"] = 2 * source.nbytes / copy / 1e9
    report["gemm_gflop_per_s"] = 2 * size**3 / gemm / 1e9
    report["gemm_dtype"] = str(dtype).removeprefix("torch.")
    return report


def peak_memory(bench: Any, case: Case, name: str, device: str) -> int | None:
    """Bytes that one step of a variant needs beyond inputs and its own code, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", bench.OP, case.id, name, device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def measure(
    bench: Any, case: Case, rounds: int, tick: Callable[[str], None], device: str = "cpu", skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    """All variants of a case. Rounds are interleaved in rotating order on two alternating sets of inputs."""
    inputs = [case.inputs(seed, device) for seed in (0, 1)]
    if hasattr(bench, "prepare"):
        bench.prepare(case, *inputs[0])
    shared: Inputs | None = None
    variants = {name: v for name, v in bench.variants(case, device).items() if name not in skip}
    rows: dict[str, dict[str, Any]] = {}
    for name, variant in list(variants.items()):
        tick(f"{case.id}: checking {name}")
        try:
            begin = time.perf_counter()
            got = step(bench, variant.run, inputs[0])
            first_call = time.perf_counter() - begin
            if variant.truth is None and shared is None:
                shared = bench.truth(*inputs[0])
            want = variant.truth(*inputs[0]) if variant.truth is not None else shared
            assert want is not None
            error = errors(got, want)
            rows[name] = {"first_call_s": first_call, "error": error}
            reason = refusal(error, variant.limit)
        except Exception as problem:  # a peer that cannot run is a result
            rows[name], reason = {}, f"{type(problem).__name__}: {problem}"[:300]
        if reason is not None:
            rows[name]["failed"] = reason
            del variants[name]  # no speed without a right result
            if device == "cuda":
                torch.cuda.empty_cache()  # what ran out of memory must not starve the next
        else:
            rows[name].update(step_s=[], forward_s=[], memory=peak_memory(bench, case, name, device))
    rows["floor"] = {"step_s": [], "forward_s": [], "memory": None}
    names = [*variants, "floor"]
    for i in range(rounds):
        tick(f"{case.id}: round {i + 1}/{rounds}")
        x = inputs[i % 2]
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if name == "floor":
                rows[name]["step_s"].append(_seconds(lambda x=x: bench.floor(*x), device))
                continue
            run = variants[name].run
            if bench.LEAVES:
                rows[name]["forward_s"].append(_seconds(lambda run=run, x=x: forward(bench, run, x), device))
            rows[name]["step_s"].append(_seconds(lambda run=run, x=x: step(bench, run, x), device))
    return {
        "case": case.id,
        "device": device,
        "flops": case.flops(),
        "gradient_bytes": case.gradient_bytes(),
        "ours": next((name for name in bench.OURS if "step_s" in rows.get(name, {})), None),
        "rows": rows,
    }


def median(samples: list[float]) -> float:
    return statistics.median(samples) if samples else float("nan")


def spread(samples: list[float]) -> float:
    """Interquartile range over the median."""
    if len(samples) < 4:
        return float("nan")
    low, _, high = statistics.quantiles(samples, n=4)
    return (high - low) / median(samples)


def save(path: str, results: dict[str, Any]) -> None:
    with open(path, "w") as file:
        json.dump(results, file, indent=1)
        file.write("\n")
