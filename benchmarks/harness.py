"""Interleaved timing, peak memory in fresh processes, machine peaks, and the oracle that admits a variant.

A benchmark is a module ``benchmarks.bench_<op>`` with the members of ``Bench``.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Inputs = tuple[Any, ...]  # tensors, or objects made of tensors where an op takes those


class Case(Protocol):
    """One problem size. ``leaves``: how many leading inputs get gradients; 0: a case without a backward pass."""

    @property
    def leaves(self) -> int: ...
    @property
    def id(self) -> str: ...
    def flops(self) -> float:
        """Operations a step (forward, and backward where there is one) cannot do without."""

    def bytes(self) -> float:
        """Bytes a step cannot do without: inputs read once in each direction, results and gradients written once."""

    def inputs(self, seed: int, device: str) -> Inputs: ...


@dataclass(frozen=True)
class Variant:
    """A way to compute the op.

    ``limit``: relative RMS error against float64 that result and gradients may have. ``prepare``: turns a case's inputs
    into what ``run`` takes, such as another storage type, outside of the measured time; the truth follows it.
    ``truth``: what this variant should give, where a benchmark compares several algorithms.
    """

    run: Callable[..., Tensor]
    limit: float
    prepare: Callable[..., Inputs] | None = None
    truth: Callable[..., Inputs] | None = None

    def take(self, inputs: Inputs) -> Inputs:
        return inputs if self.prepare is None else self.prepare(*inputs)


class Bench(Protocol):
    """What a benchmark module provides."""

    OP: str
    OURS: tuple[str, ...]  # rows of ours, the one to compare with first

    def cases(self, full: bool, device: str) -> list[Case]: ...
    def variants(self, case: Case, device: str) -> dict[str, Variant]: ...
    def truth(self, *inputs: Any) -> Inputs:
        """Result, and gradients if the case has leaves, in float64."""

    def floor(self, *inputs: Any) -> None:
        """The operations no implementation can avoid, alone; its row is called ``floor``."""


def load(op: str) -> Any:
    """The benchmark module of an op."""
    return importlib.import_module(f"benchmarks.bench_{op}")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile at the first call: it imports a second's worth of what most processes of a benchmark never use."""
    made = functools.cache(lambda: torch.compile(function))
    return lambda *inputs: made()(*inputs)


def step(case: Case, run: Callable[..., Tensor], inputs: Inputs) -> Inputs:
    """One forward and backward on fresh leaves: result and gradients. Without leaves, the result alone."""
    if case.leaves == 0:
        with torch.no_grad():
            return (run(*inputs),)
    leaves = [x.detach().requires_grad_() for x in inputs[: case.leaves]]
    value = run(*leaves, *inputs[case.leaves :])
    value.backward()
    return (value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None))


def forward(case: Case, run: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    """Forward of training: with the graph for a backward that does not come."""
    leaves = [x.detach().requires_grad_() for x in inputs[: case.leaves]]
    return run(*leaves, *inputs[case.leaves :]).detach()


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


def peak_memory(bench: Any, case: Case, name: str, device: str) -> tuple[int, int] | None:
    """Bytes that one step of a variant needs beyond inputs and its own code, in a fresh process, and how many of those
    are the gradients it returns."""
    command = [sys.executable, "-m", "benchmarks.memory", bench.OP, case.id, name, device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    needed, gradients = map(int, done.stdout.split()[-2:])
    return needed, gradients


def measure(
    bench: Any, case: Case, rounds: int, tick: Callable[[str], None], device: str = "cpu", skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    """All variants of a case. Rounds are interleaved in rotating order on two alternating sets of inputs."""
    inputs = [case.inputs(seed, device) for seed in (0, 1)]
    variants = {name: v for name, v in bench.variants(case, device).items() if name not in skip}
    # Inputs and truth per way of preparing them: a variant answers for its arithmetic on the inputs it is given.
    prepared = {p: [p(*x) if p else x for x in inputs] for p in {v.prepare for v in variants.values()}}
    wanted = {
        prepare: bench.truth(*x[0])
        for prepare, x in prepared.items()
        if any(v.truth is None and v.prepare == prepare for v in variants.values())
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, variant in list(variants.items()):
        tick(f"{case.id}: checking {name}")
        try:
            begin = time.perf_counter()
            got = step(case, variant.run, prepared[variant.prepare][0])
            first_call = time.perf_counter() - begin
            own = variant.truth
            want = wanted[variant.prepare] if own is None else own(*prepared[variant.prepare][0])
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
            rows[name].update(step_s=[], forward_s=[])
    tick(f"{case.id}: memory")
    # Mostly the start of a process each, and nothing is timed meanwhile; on a GPU they would take each other's memory.
    with ThreadPoolExecutor(1 if device == "cuda" else 2) as pool:
        probes = pool.map(lambda name: peak_memory(bench, case, name, device), variants)
        for name, found in zip(variants, probes, strict=True):
            rows[name]["memory"], rows[name]["gradient_bytes"] = found or (None, 0)
    rows["floor"] = {"step_s": [], "forward_s": [], "memory": None, "gradient_bytes": 0}
    names = [*variants, "floor"]
    for i in range(rounds):
        tick(f"{case.id}: round {i + 1}/{rounds}")
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if name == "floor":
                rows[name]["step_s"].append(_seconds(lambda x=inputs[i % 2]: bench.floor(*x), device))
                continue
            run, x = variants[name].run, prepared[variants[name].prepare][i % 2]
            if case.leaves:
                rows[name]["forward_s"].append(_seconds(lambda run=run, x=x: forward(case, run, x), device))
            rows[name]["step_s"].append(_seconds(lambda run=run, x=x: step(case, run, x), device))
    return {
        "case": case.id,
        "device": device,
        "flops": case.flops(),
        "bytes": case.bytes(),
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
