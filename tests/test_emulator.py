"""The emulator of CUDA kernels: right on clean kernels under any order of threads, and each planted bug is caught.

tests/planted/cuda_bugs.cu has the bugs. Which build must catch which is measured and written down in CAUGHT_BY; that a
build catches more than it must is no failure. The asan build runs in a child process, which a finding ends.
"""

import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import emulated
import pytest
import torch

BUGS = {
    1: "missing barrier",
    2: "shared memory past the end",
    3: "write after read",
    4: "global memory past the end",
    5: "barrier in divergent code",
    6: "shuffle with exited lanes",
    7: "plain += across blocks",
    8: "all threads store one word",
    9: "uninitialised shared memory",
    10: "missing __syncwarp",
    11: "lost update",
    12: "shuffle source outside the mask",
    13: "misaligned vector load",
    14: "missing cp.async wait",
    15: "write after reads of many",
    16: "no fence before the ticket",
    17: "no fence after the ticket",
    18: "no barrier before the fence",
}
TICKETS = (16, 17, 18)
CAUGHT_BY = {
    "plain": {1, 2, 5, 6, 9, 10, 12, 14},
    "asan": {1, 2, 4, 5, 6, 9, 10, 12, 13, 14},
    "race": {1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15, 16, 17, 18},
}
SEEDS = 20
ROWS, COLUMNS = 16, 300


def planted(build: str) -> ModuleType:
    if not list(emulated.BUILD.glob(f"_planted_{build}.*")):
        pytest.skip("the emulator was not built; make test builds it")
    if str(emulated.BUILD) not in sys.path:
        sys.path.append(str(emulated.BUILD))
    return importlib.import_module(f"_planted_{build}")


def catches(module: ModuleType, bug: int, seed: int) -> str | None:
    """How the bug showed, or None: an error of the emulator, or a wrong result."""
    module.set_seed(seed)
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    if bug in (13, 14):
        x = x[0]
    # An allocation of its own that ends with the last element, for AddressSanitizer.
    x = x.clone()
    out = torch.zeros(ROWS)
    try:
        if bug in TICKETS:
            return None if last_block_sum(module, bug, x) else "wrong result"
        module.row_sum(bug, x.data_ptr(), ROWS, COLUMNS, out.data_ptr(), 0)
    except RuntimeError as error:
        return str(error)
    if bug in (13, 14):
        first = x[1:5] if bug == 13 else x[:4]
        right = torch.allclose(out[:1], first.sum(), atol=1e-4)
    elif bug == 7:
        right = torch.allclose(out[0], x.sum(), atol=1e-2)
    else:
        right = torch.allclose(out, x.sum(1), atol=1e-3)
    return None if right else "wrong result"


def last_block_sum(module: ModuleType, bug: int, x: torch.Tensor) -> bool:
    """Whether the sum of all of x, by the last block to come, is right and the ticket 0 again."""
    sums, ticket, out = torch.full((ROWS, 128), torch.nan), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    module.last_block_sum(bug, x.data_ptr(), ROWS, COLUMNS, sums.data_ptr(), ticket.data_ptr(), out.data_ptr(), 0)
    return torch.allclose(out[0], x.sum(), atol=1e-2) and int(ticket) == 0


def test_every_bug_is_caught_by_some_build() -> None:
    assert set().union(*CAUGHT_BY.values()) == set(BUGS)


@pytest.mark.parametrize(
    ("build", "bug"),
    [(build, bug) for build in ("plain", "race") for bug in sorted(CAUGHT_BY[build])],
    ids=lambda value: BUGS.get(value, value),
)
def test_planted_bug_is_caught(build: str, bug: int) -> None:
    module = planted(build)
    seen = [catches(module, bug, seed) for seed in range(SEEDS)]
    assert all(seen), f"caught with {sum(map(bool, seen))} of {SEEDS} seeds"


@pytest.mark.parametrize("bug", sorted(CAUGHT_BY["asan"]), ids=BUGS.get)
def test_planted_bug_is_caught_by_asan(bug: int) -> None:
    planted_here = list(emulated.BUILD.glob("_planted_asan.*"))
    if not planted_here or emulated.NAME == "asan":
        pytest.skip("the emulator was not built; make test builds it")
    done = run_asan(f"print('caught:', test_emulator.catches(module, {bug}, 0))")
    report = done.stderr + done.stdout
    caught = done.returncode != 0 and ("AddressSanitizer" in report or "runtime error" in report)
    assert caught or ("caught:" in report and "caught: None" not in report), report[-2000:]


def run_asan(code: str) -> subprocess.CompletedProcess[str]:
    from test_emulated_builds import _library

    here = Path(__file__).parent
    script = f"import sys; sys.path.insert(0, {str(here)!r}); import test_emulator, torch; "
    script += f"module = test_emulator.planted('asan'); {code}"
    preload = f"{_library('libasan.so')} {_library('libstdc++.so')}"
    environment = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


def check_clean(module: ModuleType, seed: int) -> None:
    """Every feature without a bug: no alarm, right values."""
    assert catches(module, 0, seed) is None
    x, out = torch.randn(4), torch.zeros(1)
    module.first_four(x.data_ptr(), out.data_ptr(), 0)
    assert torch.equal(out, ((x[0] + x[1]) + x[2] + x[3]).view(1))
    assert last_block_sum(module, 0, torch.randn(ROWS, COLUMNS))
    counts = torch.zeros(1, dtype=torch.int32)
    module.count(counts.data_ptr(), 5, 0)
    assert int(counts) == 5 * 64
    for bfloat16 in (False, True):
        dtype = torch.bfloat16 if bfloat16 else torch.float16
        a, b, product = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.zeros(16, 8)
        module.fragments(bfloat16, a.data_ptr(), b.data_ptr(), product.data_ptr(), 0)
        torch.testing.assert_close(product, (a.double() @ b.double().t()).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("build", ["plain", "race"])
@pytest.mark.parametrize("preemption", [0.0, 0.05])
def test_clean_kernels_raise_no_alarm(build: str, preemption: float) -> None:
    module = planted(build)
    module.set_preemption(preemption)
    try:
        for seed in range(SEEDS):
            check_clean(module, seed)
    finally:
        module.set_preemption(0.0)


def test_clean_kernels_raise_no_alarm_under_asan() -> None:
    if not list(emulated.BUILD.glob("_planted_asan.*")) or emulated.NAME == "asan":
        pytest.skip("the emulator was not built; make test builds it")
    done = run_asan("[test_emulator.check_clean(module, seed) for seed in range(20)]; print('all clean')")
    assert done.returncode == 0 and "all clean" in done.stdout, (done.stdout + done.stderr)[-2000:]


def test_launches_of_several_threads_wait_for_each_other() -> None:
    """The bindings release the GIL; the emulator's state is one."""
    module = planted("plain")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: catches(module, 0, 3), range(40))) == [None] * 40


def test_messages_name_kernel_block_thread_and_cause() -> None:
    module = planted("race")
    message = str(catches(module, 3, 1))
    assert "row_sum" in message and "race: " in message and "shared memory" in message and "thread" in message
    message = str(catches(planted("plain"), 5, 1))
    assert "reached by 104 of 128 threads" in message


def test_a_failed_launch_leaves_the_emulator_usable() -> None:
    module = planted("plain")
    assert catches(module, 5, 0) is not None
    assert catches(module, 0, 0) is None
