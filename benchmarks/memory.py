"""Peak memory of one step, alone in a process: ``python -m benchmarks.memory B D C VARIANT`` prints bytes."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import bench_margin_softmax as bench
from benchmarks.harness import step


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main(batch: str, dim: str, classes: str, name: str) -> int:
    """Peak resident memory of a step above what inputs and a tiny warm-up step of the same code need."""
    tiny = bench.Case(8, int(dim), 64)
    step(bench.variants(tiny)[name], tiny.inputs(0))
    case = bench.Case(int(batch), int(dim), int(classes))
    loss, inputs = bench.variants(case)[name], case.inputs(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    step(loss, inputs)
    return _status("VmHWM") - before


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
