"""Sequence-parallel attention under torchrun: norm_linear_attention_worker.py says what each rank checks."""

import pytest
from launched import passes


@pytest.mark.parametrize("world", (2, 4))
def test_like_one_process(world: int) -> None:
    passes("norm_linear_attention_worker.py", world)
