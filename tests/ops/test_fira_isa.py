"""fira's cpu kernels of every instruction set that this machine has, not only of the one it would choose."""

from pathlib import Path

import backends
import pytest
from test_margin_softmax_isa import RANK, child

HERE = Path(__file__).parent


@pytest.mark.parametrize("isa", RANK[:2])
def test_lower_instruction_sets(isa: str) -> None:
    """Shapes, moments, small moments, rounding and layouts once more; the best set runs in every other test."""
    backends.require("cpu")
    shown = child(isa, "-c", "from pyelastic import _extension as e; print(e.load().isa())")
    if shown.stdout.strip() != isa:
        pytest.skip(f"this machine runs {shown.stdout.strip()!r} instead of {isa}")
    chosen = "cpu and (one_step or moments or rounding or layouts or float64_kernels)"
    files = [str(HERE / f"test_fira{topic}.py") for topic in ("", "_options")]
    done = child(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *files)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
