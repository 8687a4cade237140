"""Interleaved timing, peak memory in fresh processes, machine peaks, and the oracle that admits a variant."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import bench_margin_softmax as bench

# Relative root-mean-square error against float64 that a float32 result may have. The best measured is about 1e-6, and a
# single dropped class or a 0.01 % scale error in a gradient is above 1e-5.
ORACLE_RMS = 1e-5


def step(loss: bench.Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and backward on fresh leaves: loss and both gradients."""
    embeddings, weight = (x.detach().requires_grad_() for x in inputs[:2])
    value = loss(embeddings, weight, inputs[2])
    value.backward()
    assert embeddings.grad is not None and weight.grad is not None
    return value.detach(), embeddings.grad, weight.grad


def forward(loss: bench.Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Forward of training: with the graph for a backward that does not come."""
    embeddings, weight = (x.detach().requires_grad_() for x in inputs[:2])
    return loss(embeddings, weight, inputs[2]).detach()


def errors(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[float]:
    """Relative RMS error of loss, dE, dW; NaN where not finite."""
    pairs = zip(got, want, strict=True)
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


def machine() -> dict[str, Any]:
    """What was measured on, and its peaks: a large copy (read + write) and a large float32 GEMM."""
    source, target = torch.randn(1 << 26), torch.empty(1 << 26)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    copy = min(_seconds(lambda: target.copy_(source)) for _ in range(5))
    gemm = min(_seconds(lambda: a @ b) for _ in range(5))
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    from pyelastic import _extension

    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "isa": _extension.load().isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "copy_gb_per_s": 2 * source.nbytes / copy / 1e9,
        "gemm_gflop_per_s": 2 * 2048**3 / gemm / 1e9,
    }


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def peak_memory(case: bench.Case, name: str) -> int | None:
    """Bytes that one step of a variant needs beyond inputs and its own code, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", str(case.batch), str(case.dim), str(case.classes), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def measure(case: bench.Case, rounds: int, tick: Callable[[str], None]) -> dict[str, Any]:
    """All variants of a case. Rounds are interleaved in rotating order on two alternating sets of inputs."""
    inputs = [case.inputs(seed) for seed in (0, 1)]
    want = bench.truth(*inputs[0])
    losses = bench.variants(case)
    rows: dict[str, dict[str, Any]] = {}
    for name, loss in list(losses.items()):
        tick(f"{case.id}: checking {name}")
        try:
            begin = time.perf_counter()
            got = step(loss, inputs[0])
            rows[name] = {"first_call_s": time.perf_counter() - begin, "error": errors(got, want)}
        except Exception as error:  # a peer that cannot run is a result
            rows[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        if "failed" not in rows[name] and not all(e <= ORACLE_RMS for e in rows[name]["error"]):
            rows[name]["failed"] = f"ORACLE: relative RMS error of loss, dE, dW {rows[name]['error']}"
        if "failed" in rows[name]:
            del losses[name]  # no speed without a right result
        else:
            rows[name].update(step_s=[], forward_s=[], memory=peak_memory(case, name))
    rows["GEMMs alone"] = {"step_s": [], "forward_s": [], "memory": None}
    names = [*losses, "GEMMs alone"]
    for i in range(rounds):
        tick(f"{case.id}: round {i + 1}/{rounds}")
        x = inputs[i % 2]
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if name == "GEMMs alone":
                rows[name]["step_s"].append(_seconds(lambda x=x: bench.floor(x[0], x[1])))
            else:
                loss = losses[name]
                rows[name]["forward_s"].append(_seconds(lambda loss=loss, x=x: forward(loss, x)))
                rows[name]["step_s"].append(_seconds(lambda loss=loss, x=x: step(loss, x)))
    return {"case": case.id, "flops": case.flops(), "gradient_bytes": case.gradient_bytes(), "rows": rows}


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
