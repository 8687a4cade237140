"""Fira under DDP and FSDP2 under torchrun: the worker scripts say what each rank checks."""

from pathlib import Path

import pytest
import torch
from launched import launch, passes

on_cpu = pytest.mark.skipif(
    torch.__version__ < "2.7" and not torch.cuda.is_available(), reason="torch 2.6's fully_shard gathers on a GPU only"
)


@pytest.mark.parametrize("world", (2, 4))
def test_like_one_process(world: int) -> None:
    passes("fira_worker.py", world)


@on_cpu
@pytest.mark.parametrize("world", (2, 4))
def test_bytes_16_bits_loss_scaling_ddp_refusals(world: int) -> None:
    """And HSDP, on 4 ranks."""
    passes("fira_forms_worker.py", world)


@on_cpu
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
