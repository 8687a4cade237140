"""Fira under DDP and FSDP2 under torchrun: the worker scripts say what each rank checks."""

import pytest
from launched import passes


@pytest.mark.parametrize("world", (2, 4))
def test_like_one_process(world: int) -> None:
    passes("fira_worker.py", world)
