"""The cpu kernel of every instruction set that this machine has, not only of the one it would choose."""

import os
import subprocess
import sys
from pathlib import Path

import backends
import pytest

HERE = Path(__file__).parent
RANK = ("baseline", "avx2", "avx512")


def child(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    """The choice is made once per process, so each instruction set needs its own."""
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYELASTIC_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("isa", RANK[:2])
def test_lower_instruction_sets(isa: str) -> None:
    """Shapes, scales, statistics and hard negatives once more; the best set runs in every other test."""
    backends.require("cpu")
    shown = child(isa, "-c", "from pyelastic import _extension as e; print(e.load().isa())")
    if shown.stdout.strip() != isa:
        pytest.skip(f"this machine runs {shown.stdout.strip()!r} instead of {isa}")
    chosen = "cpu and (test_shape or test_scale or test_each_auxiliary or Curricular or chunk)"
    files = [str(HERE / f"test_margin_softmax{topic}.py") for topic in ("", "_aux", "_layout")]
    done = child(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *files)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def test_an_unknown_instruction_set_is_an_error() -> None:
    backends.require("cpu")
    done = child("avx3", "-c", "from pyelastic import _extension as e; e.load()")
    assert done.returncode != 0 and "PYELASTIC_CPU_ISA" in done.stderr
