"""Class-sharded margin softmax under torchrun: the worker scripts say what each rank checks."""

from pathlib import Path

import pytest
from launched import launch, passes

WORKER = "margin_softmax_worker.py"


@pytest.mark.parametrize("world", (2, 4))
def test_like_one_process(world: int) -> None:
    passes(WORKER, world)


def test_a_checkpoint_resumes_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    """After a kill the same trajectory, to 1e-10 in float64: losses and weight."""
    passes("checkpoint_worker.py", 2, "train", str(tmp_path))
    for world in (4, 1):
        passes("checkpoint_worker.py", world, "resume", str(tmp_path))


def test_a_killed_rank_ends_the_others() -> None:
    done = launch("tests/distributed/killed_worker.py", 2, timeout=60)
    assert done.returncode != 0 and "rank is done" not in done.stdout
