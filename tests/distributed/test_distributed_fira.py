"""Fira under DDP and FSDP2 under torchrun: the worker scripts say what each rank checks."""

from pathlib import Path

import pytest
from launched import launch, passes


@pytest.mark.parametrize("world", (2, 4))
def test_like_one_process(world: int) -> None:
    passes("fira_worker.py", world)


@pytest.mark.parametrize("world", (2, 4))
def test_bytes_16_bits_loss_scaling_ddp_refusals(world: int) -> None:
    """And HSDP, on 4 ranks."""
    passes("fira_forms_worker.py", world)


def test_a_checkpoint_of_a_killed_run_resumes_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    """The same trajectory, to 1e-10 in float64, under fully_shard and without it."""
    worker, folder, checkpoints = "fira_checkpoint_worker.py", str(tmp_path / "run"), str(tmp_path / "checkpoints")
    (tmp_path / "run").mkdir()
    passes(worker, 2, "train", folder, folder)
    done = launch(f"tests/distributed/{worker}", 2, "killed", folder, checkpoints)
    assert done.returncode != 0 and done.stdout.count("rank is done") < 2
    for world in (4, 1):
        passes(worker, world, "resume", folder, checkpoints)
    passes(worker, 1, "plain", folder, checkpoints)
