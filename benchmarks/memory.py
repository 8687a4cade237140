"""Peak memory of one step, alone in a process: ``python -m benchmarks.memory OP CASE VARIANT DEVICE``.

Prints the bytes, and how many of them are the step's gradients.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from benchmarks import harness


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main(op: str, case_id: str, name: str, device: str) -> tuple[int, int]:
    """Peak memory of a step above what inputs and a tiny warm-up step of the same code need."""
    bench = harness.load(op)
    case = bench.case(case_id)
    tiny = case.tiny()
    warm = bench.variants(tiny, device)[name]
    harness.step(tiny, warm.run, warm.take(tiny.inputs(0, device)))
    variant = bench.variants(case, device)[name]
    run, inputs = variant.run, variant.take(case.inputs(0, device))
    if getattr(bench, "STATEFUL", False):  # what an optimizer keeps is not memory of its step
        harness.step(case, run, inputs)
        ctypes.CDLL(None).malloc_trim(0)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        _, *gradients = harness.step(case, run, inputs)
        torch.cuda.synchronize()
        needed = torch.cuda.max_memory_allocated() - start
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        _, *gradients = harness.step(case, run, inputs)
        needed = _status("VmHWM") - before
    return needed, sum(gradient.nbytes for gradient in gradients)


if __name__ == "__main__":
    print(*main(*sys.argv[1:]))
