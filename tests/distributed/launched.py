"""Start a worker script under torchrun, and see it end.

Starting processes costs seconds, so a worker script checks all there is to check of an op in one launch. Workers end
with ``end(...)``; what a rank asserts fails the launch, whose output the test then shows.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).parent
TIMEOUT = 30  # seconds that a collective waits for the other ranks


def launch(worker: str, world: int, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run tests/distributed/<worker> on ``world`` processes of this machine; the caller looks at the return code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return subprocess.run(
        [*command, str(HERE / worker), *arguments], env=environment, capture_output=True, text=True, timeout=timeout,
        cwd=HERE.parent.parent,
    )  # fmt: skip


def passes(worker: str, world: int, *arguments: str) -> str:
    """Standard output of a launch in which no rank failed."""
    done = launch(worker, world, *arguments)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    assert done.stdout.count("rank is done") == world, done.stdout[-4000:]
    return done.stdout


def begin() -> tuple[int, int]:
    """Rank and world size of a worker, its process group set up."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    torch.manual_seed(0)  # the same on all ranks: each makes the whole problem and takes its part
    return dist.get_rank(), dist.get_world_size()


def end() -> None:
    print("rank is done", flush=True)
    dist.destroy_process_group()
