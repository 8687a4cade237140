"""Start a script under torchrun, and see it end: one launch at a time, as two may choose one port.

Starting processes costs seconds, so a worker script checks all there is to check of an op in one launch. Workers end
with ``end(...)``; what a rank asserts fails the launch, whose output the test then shows.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).parent
LOCK = Path(tempfile.gettempdir()) / "pyelastic-torchrun.lock"
TIMEOUT = 120  # seconds that a collective waits for the other ranks; 30 were too few on a busy machine


def launch(worker: str, world: int, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository on ``world`` processes of this machine; the caller looks at the return code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONFAULTHANDLER": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return subprocess.run(
            [*command, str(HERE.parent / worker), *arguments], env=environment, capture_output=True, text=True,
            timeout=timeout, cwd=HERE.parent,
        )  # fmt: skip


def passes(worker: str, world: int, *arguments: str) -> str:
    """Standard output of a launch in which no rank failed; after an abort once more, with a warning (CONTRIBUTING)."""
    done = launch(f"tests/distributed/{worker}", world, *arguments)
    if "Signal 6 (SIGABRT)" in done.stderr:
        warnings.warn(f"{worker} on {world} ranks aborted; launched once more:\n{done.stderr[:8000]}", stacklevel=2)
        done = launch(f"tests/distributed/{worker}", world, *arguments)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[:8000]}\n...\n{done.stderr[-4000:]}"
    assert done.stdout.count("rank is done") == world, done.stdout[-4000:]
    return done.stdout


def begin(timeout: float = TIMEOUT) -> tuple[int, int]:
    """Rank and world size of a worker, its process group set up."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    torch.manual_seed(0)  # the same on all ranks: each makes the whole problem and takes its part
    return dist.get_rank(), dist.get_world_size()


def end() -> None:
    """Every rank has come here, so each leaves at once: gloo's threads have aborted processes that had only to exit.

    And it has hung while it was destroyed (torch 2.6, a busy machine), so that gets ten seconds.
    """
    dist.barrier()
    print("rank is done", flush=True)
    destroying = threading.Thread(target=dist.destroy_process_group, daemon=True)
    destroying.start()
    destroying.join(timeout=10)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
