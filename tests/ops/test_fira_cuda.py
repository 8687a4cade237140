"""fira's CUDA launches: how many a group takes, and that the limiter, the last block's work, sums in one order.

What each parametrization covers: `options` the forms of the limiter; `state_dtype` both kernels that end with it.
"""

from __future__ import annotations

from typing import Any

import backends
import gpu_sanitize
import pytest
import torch
from fira_cases import problem, run

from pyelastic import _extension
from pyelastic.ops import _fira_cuda as launcher

pytestmark = pytest.mark.skipif("cuda" not in backends.implemented("fira"), reason="no GPU and no emulator")


@pytest.mark.parametrize(("options", "want"), [
    ({"alpha": 0.25}, ["project", "moments", "coefficients", "apply"]),
    ({"alpha": 1.0}, ["project", "moments", "residual", "coefficients", "apply"]),
    ({"alpha": 1.0, "mode": "galore"}, ["project", "moments", "coefficients", "apply"]),
])  # fmt: skip
def test_launches_of_a_group(options: dict[str, Any], want: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen matrices of both sides take as many as one."""
    module, emulated = _extension.load_cuda()
    seen: list[str] = []

    class Counted:
        def __getattr__(self, name: str) -> Any:
            if name != "cuda_fira_group":
                seen.append(name.removeprefix("cuda_fira_"))
            return getattr(module, name)

    monkeypatch.setattr(launcher._extension, "load_cuda", lambda: (Counted(), emulated))
    device = backends.device_of("cuda")
    run("cuda", *(problem(9, 8, 4, bool(i % 2), seed=i).clone(device=device) for i in range(16)), **options)
    assert seen == want


@pytest.mark.skipif(backends.EMULATOR is None, reason="sets the order of blocks")
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("options", [{}, {"per_matrix": True}, {"alpha": 1.0, "captured": 1 - 1e-6}], ids=str)
def test_whichever_block_is_last_the_bits_are_the_same(
    left: bool, state_dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Ten blocks of moments, five of the residual; the emulator runs them in another order for each seed."""
    m, n = (20, 300) if left else (300, 20)
    given = problem(m, n, 6, left, state_dtype=state_dtype, **options)
    results = []
    for seed in range(6):
        assert backends.EMULATOR is not None
        backends.EMULATOR.set_seed(seed)
        got = given.clone()
        run("cuda", got)
        results.append((got.w, got.state.limiter_norm, got.state.exp_avg, got.state.step))
    backends.EMULATOR.set_seed(0)
    assert float(results[0][3]) == 6 and float(results[0][1]) != float(given.state.limiter_norm)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(backends.EMULATOR is None, reason="on a GPU compute-sanitizer runs them")
def test_the_cases_of_the_sanitizer_reach_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = _extension.load_cuda()
    seen: set[tuple[str, bool]] = set()

    class Seen:
        def __getattr__(self, name: str) -> Any:
            def call(group: Any, stream: int) -> None:
                seen.add((name.removeprefix("cuda_fira_"), group.mma))
                getattr(module, name)(group, stream)

            return module.cuda_fira_group if name == "cuda_fira_group" else call

    monkeypatch.setattr(launcher._extension, "load_cuda", lambda: (Seen(), True))
    gpu_sanitize.run_fira("cpu")
    assert seen == {(name, mma) for name in launcher.KERNELS for mma in (False, True)}
