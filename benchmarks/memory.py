"""Peak memory of one step, alone in a process: ``python -m benchmarks.memory OP CASE VARIANT DEVICE`` prints bytes."""

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


def main(op: str, case_id: str, name: str, device: str) -> int:
    """Peak memory of a step above what inputs and a tiny warm-up step of the same code need."""
    bench = harness.load(op)
    case = bench.case(case_id)
    tiny = case.tiny()
    harness.step(bench, bench.variants(tiny, device)[name].run, tiny.inputs(0, device))
    run, inputs = bench.variants(case, device)[name].run, case.inputs(0, device)
    if device == "cuda":
        if not bench.LEAVES:
            harness.step(bench, run, inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        harness.step(bench, run, inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    if not bench.LEAVES:  # what an optimizer keeps is not memory of its step
        harness.step(bench, run, inputs)
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    harness.step(bench, run, inputs)
    return _status("VmHWM") - before


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
