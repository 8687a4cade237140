"""The CPU kernels' own cases: parts and tiles, numbers of threads."""

import backends
import pytest
import torch
from norm_linear_attention_cases import call, calls_of, compare, make, upstream_of
from torch import Tensor

import pyelastic
from pyelastic.ops import _norm_linear_attention_cpu as launcher


def cut(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    """Sequences of more than ``part`` tokens have several parts, causal ones too."""
    monkeypatch.setattr(launcher, "PART", part)
    monkeypatch.setattr(launcher, "SERIAL_TOKENS", part)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("heads", (1, 16))
@pytest.mark.parametrize("n", (63, 64, 65, 128, 129, 200))
def test_parts_and_tiles(causal: bool, heads: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts of two tiles, whose last one is short; 16 heads: one walk over the sequence."""
    backends.require("cpu")
    cut(monkeypatch, 128 if n > 65 else 64)
    case = make(1, n, heads=heads, d=4, dv=3, causal=causal, state=True, learned=True, rope="num", gate=n == 200)
    compare("cpu", case, states=True)


@pytest.mark.parametrize("rope", (None, "num", "both"))
def test_parts_of_packed_sequences(rope: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    backends.require("cpu")
    cut(monkeypatch, 64)
    for causal in (False, True):
        case = make(lengths=(130, 0, 64, 65, 1), heads=2, kv_heads=1, causal=causal, rope=rope, state=True)
        compare("cpu", case, states=True)


def test_ways_of_the_causal_form_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """One walk, and parts whose states are summed first."""
    backends.require("cpu")
    case = make(1, 300, d=8, causal=True, dtype=torch.float64)
    serial, _ = call("cpu", case, need=())
    cut(monkeypatch, 64)
    parts, _ = call("cpu", case, need=())
    for name, value in serial.items():
        torch.testing.assert_close(value, parts[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(("heads", "n"), [(1, 600), (16, 600), (16, 60)])
def test_thread_count_does_not_change_a_bit(
    dtype: torch.dtype,
    causal: bool,
    heads: int,
    n: int,
    restore_threads: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backends.require("cpu")
    monkeypatch.setattr(launcher, "WORTH_A_THREAD", 1)
    case = make(1, n, heads=heads, d=64 if n == 60 else 8, dv=8, causal=causal, learned=True, dtype=dtype)

    def bits() -> dict[str, Tensor]:
        made, leaves = call("cpu", case, final=n > 60)
        made["o"].backward(upstream_of(case)["o"])
        grads = {n: x.grad for n, x in leaves.items() if x.grad is not None}
        return {**{n: x.detach() for n, x in made.items()}, **grads}

    torch.set_num_threads(1)
    one = bits()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for name, value in bits().items():
            assert torch.equal(value, one[name]), f"{name} differs between 1 and {threads} threads"


@pytest.mark.parametrize("final", (False, True))
def test_values_wider_than_the_features(final: bool) -> None:
    """Whose rows, with a gate, once ran over the room of a row of features."""
    backends.require("cpu")
    compare("cpu", make(1, 30, d=4, dv=70, gate=True), states=final)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(("n", "m"), [(1, 1), (15, 15), (16, 33), (64, 64), (64, 20), (65, 65)])
@pytest.mark.parametrize("rope", (None, "num", "both"))
def test_quadratic_order(causal: bool, n: int, m: int, rope: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to one tile of tokens, with shared keys and a gate, also where it is not the cheaper order."""
    backends.require("cpu")
    m = n if causal else m
    orders = calls_of(launcher._Problem, monkeypatch, lambda problem, name: (name, problem.quadratic))
    compare("cpu", make(2, n, m, heads=4, kv_heads=2, d=48, dv=32, gate=True, rope=rope, learned=True, causal=causal))
    short = max(n, m) <= 64 and (causal or n * m * (8 * 48 + 3 * 32) < 6 * 48 * 32 * (n + m))
    assert (("forward", True) in orders, ("backward", True) in orders) == (short, short)


def test_order_does_not_change_the_result() -> None:
    backends.require("cpu")
    case = make(2, 40, d=64, dv=64, heads=2, dtype=torch.float64, rope="num", gate=True, learned=True)
    upstream = upstream_of(case)["o"]
    found = []
    for final in (False, True):
        made, leaves = call("cpu", case, final=final)
        made["o"].backward(upstream)
        found.append({"o": made["o"].detach(), **{n: x.grad for n, x in leaves.items()}})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", (20, 300))
def test_heads_first_stay_heads_first(n: int) -> None:
    """o and gradients lie as q, k and v do, so that nothing is copied on the way."""
    backends.require("cpu")
    case = make(2, n, heads=3, d=16, dv=8, gate=True, rope="num")
    leaves = [x.transpose(1, 2).contiguous().requires_grad_() for x in (case.q, case.k, case.v)]
    sin, cos = pyelastic.rope_tables(n, 16)
    o = pyelastic.norm_linear_attention(*leaves, rope="num", rope_tables=(sin, cos), layout="bhnd", backend="cpu")
    made = torch.autograd.grad(o, leaves, torch.ones_like(o))
    assert o.is_contiguous() and all(x.is_contiguous() for x in made)
    plain = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in leaves]
    other = pyelastic.norm_linear_attention(*plain, rope="num", rope_tables=(sin, cos), backend="cpu")
    theirs = torch.autograd.grad(other, plain, torch.ones_like(other))
    assert other.is_contiguous() and torch.equal(other, o.transpose(1, 2))
    for a, b in zip(made, theirs, strict=True):
        assert b.is_contiguous() and torch.equal(a.transpose(1, 2), b)
