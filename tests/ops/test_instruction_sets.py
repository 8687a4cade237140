"""The cpu kernels of every instruction set that this machine has, not only of the best, which every other test runs."""

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import backends
import pytest

HERE = Path(__file__).parent
SETS = ("baseline", "avx2", "avx512", "avx512bf16")  # the best is amx
WHICH = "from pyelastic import _extension as e; print(e.load().isa())"
# Tests of each op, chosen by -k from files.
CHOSEN = {
    "fira": ("one_step or moments or rounding or layouts or float64_kernels", "fira", "fira_options"),
    "margin_softmax": (
        "test_shape or test_scale or test_each_auxiliary or Curricular or chunk",
        "margin_softmax",
        "margin_softmax_aux",
        "margin_softmax_layout",
    ),
    "maxsim": ("(test_layout or test_options or test_lengths or test_dimension) and not other_dtypes", "maxsim"),
    "norm_linear_attention": ("test_options or test_widths or test_zero or test_key_power", "norm_linear_attention"),
    "projection": ("test_options or test_sizes or test_mixed or test_zero_rows", "projection"),
}
# Milliseconds of a training step, best of 7: the kernel's and the eager one's.
RACE = """
import time, torch, pyelastic
torch.set_num_threads(1)
torch.manual_seed(0)

def best(step):
    step()
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)

def step(backend):
    {step}

print(best(lambda: step("cpu")), best(lambda: step("eager")))
"""
STEPS = {
    "margin_softmax": """
    e, w = (torch.randn(n, 64, requires_grad=True) for n in (64, 8192))
    pyelastic.margin_softmax(e, w, torch.arange(64), backend=backend).sum().backward()""",
    "maxsim": """
    q, d = (torch.randn(n, length, 64, requires_grad=True) for n, length in ((8, 32), (16, 128)))
    pyelastic.maxsim(q, d, backend=backend).sum().backward()""",
    "norm_linear_attention": """
    q, k, v = (torch.randn(1, 512, 2, 64, requires_grad=True) for _ in range(3))
    pyelastic.norm_linear_attention(q, k, v, causal=True, backend=backend).sum().backward()""",
}


def child(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Python under an instruction set ("": the best): it is chosen once per process. On one thread, for speed."""
    environment = {**os.environ, "PYELASTIC_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)


@lru_cache
def shown(isa: str) -> str:
    return child(isa, "-c", WHICH).stdout.strip()


@pytest.mark.parametrize("op", CHOSEN)
@pytest.mark.parametrize("isa", SETS)
def test_lower_instruction_sets(op: str, isa: str) -> None:
    """Options, sizes and edges once more."""
    backends.require("cpu")
    if shown(isa) != isa or shown("") == isa:
        pytest.skip(f"this machine runs {shown('')!r}, and {shown(isa)!r} if asked for {isa}")
    chosen, *files = CHOSEN[op]
    paths = [str(HERE / f"test_{file}.py") for file in files]
    done = child(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", f"cpu and ({chosen})", *paths)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("op", STEPS)
@pytest.mark.parametrize("isa", SETS)
def test_no_kernel_is_much_slower_than_eager(op: str, isa: str) -> None:
    """Twice the eager step's time is far above what any takes, and far below a kernel whose vectors lie in memory."""
    backends.require("cpu")
    if shown(isa) != isa:
        pytest.skip(f"this machine runs {shown(isa)!r} if asked for {isa}")
    done = child(isa, "-c", RACE.format(step=STEPS[op].strip()))
    assert done.returncode == 0, done.stderr[-1000:]
    ours, eager = map(float, done.stdout.split())
    assert ours < 2 * eager, f"{ours:.1f} ms, eager {eager:.1f} ms"


def test_an_unknown_instruction_set_is_an_error() -> None:
    backends.require("cpu")
    done = child("avx3", "-c", WHICH)
    assert done.returncode != 0 and "PYELASTIC_CPU_ISA" in done.stderr
