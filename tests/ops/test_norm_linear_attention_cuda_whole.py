"""CUDA's form with a block per sequence and kv head, forced for few of them; tensor cores, d and dv up to 64."""

from typing import Any

import backends
import pytest
import torch
from norm_linear_attention_cases import OP, call, calls_of, compare, make, polaformer, upstream_of

from pyelastic.ops import _norm_linear_attention_cuda as launcher

pytestmark = pytest.mark.skipif("cuda" not in backends.implemented(OP), reason="no GPU and no emulator")
PASSES = ["whole_forward", "whole_backward"]
over_orders = pytest.mark.parametrize("causal", (False, True))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Any number of heads is enough; names of the kernels that calls run."""
    monkeypatch.setattr(launcher, "WHOLE_HEADS", 0)
    return calls_of(launcher._Problem, monkeypatch)


# Tokens, d, dv and what else: every option at least once, in either order.
CASES: list[tuple[int, int, int, dict[str, Any]]] = [
    (1, 8, 8, {"gate": True, "state": True, "learned": True}),
    (63, 40, 64, {"rope": "num", "mode": "cos"}),
    (65, 64, 40, {"rope": "both", "gate": True, "state": True, "eps_mode": "sum", "heads": 1}),
    (200, 8, 40, {"rope": "num", "state": True, "learned": True, "gate": True}),
    (66, 64, 64, {"key_power": 2.5, "heads": 1}),
]


@over_orders
@pytest.mark.parametrize(("n", "d", "dv", "options"), CASES, ids=str)
def test_results_and_gradients(
    called: list[str], n: int, d: int, dv: int, options: dict[str, Any], causal: bool
) -> None:
    """Of an odd number of tokens, with a gradient of the final state; two query heads a kv head."""
    sizes = {"heads": 4 if n == 1 else 2, "kv_heads": 2 if n == 1 else 1, "d": d, "dv": dv, "dtype": torch.bfloat16}
    compare("cuda", make(2 if n == 1 else 1, n, causal=causal, **{**sizes, **options}), states=True)
    assert called == PASSES


def test_more_keys_than_queries(called: list[str]) -> None:
    compare("cuda", make(2, 70, 131, heads=2, kv_heads=1, d=8, dv=16, gate=True, dtype=torch.bfloat16), states=True)
    assert called == PASSES


@over_orders
@pytest.mark.parametrize("rope", (None, "num"))
def test_packed(called: list[str], rope: str | None, causal: bool) -> None:
    sizes = {"heads": 2, "kv_heads": 1, "d": 16, "dv": 8, "dtype": torch.bfloat16}
    case = make(lengths=(70, 0, 1, 129), causal=causal, rope=rope, state=True, learned=True, **sizes)
    compare("cuda", case, states=True)
    assert called == PASSES


@over_orders
def test_polaformer(called: list[str], causal: bool) -> None:
    """Against eager in float64."""
    found = polaformer(150, 24, torch.bfloat16, causal)
    assert sorted(called) == sorted(2 * PASSES)  # both signs
    for made, truth in found:
        assert (made.cpu().double() - truth).norm() / truth.norm() < 1e-2


def results(case: Any) -> list[torch.Tensor]:
    made, leaves = call("cuda", case)
    upstream = upstream_of(case, states=True)
    torch.autograd.backward(list(made.values()), [upstream[n].to(made[n].device) for n in made])
    return [*(x.detach() for x in made.values()), *(x.grad for x in leaves.values() if x.grad is not None)]


@over_orders
def test_both_forms_agree(called: list[str], monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """And so do a forward of one with a backward of the other, which read the same states."""
    sizes = {"heads": 4, "kv_heads": 2, "d": 16, "dv": 24, "dtype": torch.bfloat16}
    case = make(1, 150, causal=causal, gate=True, state=True, learned=True, rope="num", **sizes)
    whole = results(case)
    assert called == PASSES
    monkeypatch.setattr(launcher, "WHOLE_HEADS", 1 << 40)
    parts = results(case)
    assert not set(called[2:]) & set(PASSES)
    for a, b in zip(whole, parts, strict=True):
        assert (a.double() - b.double()).norm() <= 2**-7 * b.double().norm()


def test_which_calls_go_whole(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(**options: Any) -> bool:
        called.clear()
        call("cuda", make(**{"batch": 1, "n": 5, "d": 8, "dv": 8, "dtype": torch.bfloat16, **options}), need=())
        return called == PASSES[:1]

    assert ran() and ran(d=64, dv=64)
    assert not ran(d=72) and not ran(dv=72) and not ran(d=12) and not ran(dtype=torch.float16)
    monkeypatch.setattr(launcher, "WHOLE_HEADS", 6)
    assert ran(batch=2, heads=6, kv_heads=3) and ran(lengths=(3, 0, 2), heads=4, kv_heads=2)
    assert not ran(batch=2, heads=8, kv_heads=2)


@over_orders
def test_no_tokens(called: list[str], causal: bool) -> None:
    compare("cuda", make(2, 0, d=8, dv=8, state=True, causal=causal, dtype=torch.bfloat16), states=True)
    assert called == PASSES


@pytest.mark.skipif(backends.EMULATOR is None, reason="the order of threads is the emulator's to choose")
@over_orders
def test_order_of_threads_and_blocks_changes_no_bit(called: list[str], causal: bool) -> None:
    emulator = backends.EMULATOR
    assert emulator is not None
    case = make(1, 70, heads=2, kv_heads=1, d=8, dv=8, causal=causal, gate=True, rope="num", dtype=torch.bfloat16)
    found = []
    for seed in range(2):
        emulator.set_seed(seed)
        found.append(results(case))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
