"""The quadratic order of the GPU backends: short sequences without states, and when it is taken."""

from typing import Any

import backends
import pytest
import torch
from norm_linear_attention_cases import OP, compare, make

from pyelastic.ops import _norm_linear_attention_gpu as gpu

KERNELS = ("run_state", "run_scan", "run_forward", "run_queries", "run_grad_state", "run_keys")


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    backends.require(request.param)
    if request.param not in backends.implemented(OP):
        pytest.skip(f"no {request.param} here")
    return str(request.param)


@pytest.fixture
def launched(backend: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched from now on."""
    from pyelastic.ops import _norm_linear_attention_cuda as cuda
    from pyelastic.ops import _norm_linear_attention_triton as triton

    launcher: Any = cuda._Problem if backend == "cuda" else triton._Forward
    names: list[str] = []

    def watch(name: str) -> None:
        original = getattr(launcher, name)

        def run(self: Any, *arguments: Any) -> None:
            names.append(name)
            original(self, *arguments)

        monkeypatch.setattr(launcher, name, run)

    for name in KERNELS:
        watch(name)
    return names


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(("n", "m"), [(1, 1), (17, 3), (3, 17), (49, 50)])
@pytest.mark.parametrize("rope", (None, "num", "both"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_no_states(
    backend: str, launched: list[str], causal: bool, n: int, m: int, rope: str | None, dtype: torch.dtype
) -> None:
    """Shared keys, a gate, and heads wide enough that this is the cheaper order; one launch, and two."""
    m = n if causal else m
    sizes = {"heads": 2, "kv_heads": 1, "d": 40, "dv": 48, "dtype": dtype}
    case = make(1, n, m, gate=True, rope=rope, learned=True, causal=causal, **sizes)
    compare(backend, case, final=False)
    assert launched == ["run_forward", "run_queries", "run_keys"]


@pytest.mark.parametrize("causal", (False, True))
def test_all_tokens_it_takes(backend: str, launched: list[str], causal: bool) -> None:
    compare(backend, make(1, 128, heads=1, d=128, dv=104, rope="num", causal=causal), final=False)
    assert launched == ["run_forward", "run_queries", "run_keys"]


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("mode", ("cos", "split"))
def test_maps(backend: str, launched: list[str], mode: str, causal: bool) -> None:
    compare(backend, make(1, 20, heads=1, d=24, dv=40, mode=mode, alpha=3.0, key_power=2.5, causal=causal), final=False)
    assert "run_state" not in launched


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"n": 128, "causal": True}, True),
        ({"n": 129, "causal": True}, False),
        ({"n": 9, "causal": True, "state": True}, False),
        ({"lengths": (9, 3), "causal": True}, False),
        ({"n": 5, "m": 6}, True),  # 6 x 5 pairs of 12 + 5 products against 11 tokens of 60
        ({"n": 9, "m": 9}, False),
    ],
)
def test_when_it_is_taken(backend: str, launched: list[str], options: dict[str, Any], taken: bool) -> None:
    compare(backend, make(1, heads=1, d=6, dv=5, **options), final=False)
    assert ("run_state" not in launched) is taken


def test_a_state_asked_for_takes_the_linear_order(backend: str, launched: list[str]) -> None:
    compare(backend, make(1, 12, heads=1, d=24, dv=24, causal=True), states=True)
    assert "run_state" in launched


def test_one_part_is_not_summed(backend: str, launched: list[str]) -> None:
    compare(backend, make(2, 40, heads=1, d=6, dv=5), final=False)
    assert launched == ["run_state", "run_forward", "run_queries", "run_grad_state", "run_keys"]
    assert gpu.CHUNK >= 40
