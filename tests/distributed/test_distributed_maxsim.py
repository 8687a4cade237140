"""MaxSim's negatives across ranks under torchrun: maxsim_worker.py says what each rank checks."""

import pytest
from launched import passes


@pytest.mark.parametrize("world", (2, 4))
def test_like_one_process(world: int) -> None:
    passes("maxsim_worker.py", world)
