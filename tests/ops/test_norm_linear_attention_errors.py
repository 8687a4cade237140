"""The error catalogue: each wrong call raises what the design fixes, naming the argument."""

from typing import Any

import pytest
import torch
from norm_linear_attention_cases import OP, call, make, over_kernels

import pyelastic
from pyelastic import LinearAttentionState
from pyelastic.ops.norm_linear_attention_step import empty_state

Q, K, V = torch.randn(2, 5, 4, 6), torch.randn(2, 5, 2, 6), torch.randn(2, 5, 2, 3)
STATE = empty_state(2, 2, 6, 3)
CU = torch.tensor([0, 2, 5])
ONE: dict[str, Any] = {"q": Q[:1], "k": K[:1], "v": V[:1]}
TABLES = pyelastic.rope_tables(5, 6)

CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q type": ({"q": [1.0]}, TypeError, r"q is list; expected a tensor \[B, N, H, d\]"),
    "k rank": ({"k": K[0]}, ValueError, r"k is \[5, 2, 6\]; expected 4 dimensions \[B, N, H, d\]"),
    "rank, bhnd": ({"v": V[0], "layout": "bhnd"}, ValueError, r"expected 4 dimensions \[B, H, N, d\]"),
    "gate rank": ({"gate": Q[0]}, ValueError, "gate is .* expected 4 dimensions"),
    "integer q": ({"q": Q.int()}, TypeError, "q is int32; expected one of float16, bfloat16, float32, float64"),
    "mixed dtypes": ({"v": V.half()}, TypeError, "q is torch.float32 and v is torch.float16; expected one dtype"),
    "batch": ({"k": K[:1], "v": V[:1]}, ValueError, r"k is \[1, 5, 2, 6\]"),
    "tokens of v": ({"v": V[:, :4]}, ValueError, r"v is \[2, 4, 2, 3\].*expected q \[B, N, Hq, d\]"),
    "width of k": ({"k": K[..., :5]}, ValueError, r"k is \[2, 5, 2, 5\]"),
    "no width": ({"q": Q[..., :0], "k": K[..., :0]}, ValueError, r"q is \[2, 5, 4, 0\]"),
    "no value": ({"v": V[..., :0]}, ValueError, "no width of 0"),
    "heads": ({"q": Q[:, :, :3]}, ValueError, "expected Hq to be a multiple of Hk"),
    "causal lengths": ({"q": Q[:, :4], "causal": True}, ValueError, "need as many keys as queries"),
    "gate shape": ({"gate": Q}, ValueError, r"gate is \[2, 5, 4, 6\]; expected \[2, 5, 4, 3\]"),
    "mode": ({"mode": "cosine"}, ValueError, "mode is 'cosine'; choose from split, cos"),
    "eps_mode": ({"eps_mode": "max"}, ValueError, "eps_mode is 'max'; choose from mean, sum"),
    "layout": ({"layout": "nbhd"}, ValueError, "layout is 'nbhd'; choose from bnhd, bhnd"),
    "key_power": ({"key_power": 0.0}, ValueError, "key_power is 0.0; expected a finite number above 0"),
    "alpha": ({"alpha": -1.0}, ValueError, "alpha is -1.0; expected a finite number of 0 or more"),
    "eps": ({"eps": float("nan")}, ValueError, "eps is nan"),
    "norm_eps": ({"norm_eps": float("inf")}, ValueError, "norm_eps is inf"),
    "lam shape": ({"lam": torch.ones(3)}, ValueError, r"lam is \[3\]; expected a number, \[\] or \[4\]"),
    "tau dtype": ({"tau": torch.ones(4).long()}, TypeError, "tau is int64"),
    "rope": ({"rope": "all"}, ValueError, "rope is 'all'; choose from num, both"),
    "tables alone": ({"rope_tables": TABLES}, ValueError, "rope is None and tables or a grid are given"),
    "odd d": ({"q": Q[..., :5], "k": K[..., :5], "rope": "num"}, ValueError, "rope needs an even d"),
    "grid": ({"rope": "num", "rope_grid": (2, 3)}, ValueError, r"rope_grid is \(2, 3\).*= 5 tokens"),
    "grid and tables": ({"rope": "num", "rope_grid": (1, 5), "rope_tables": TABLES}, ValueError, "only one of them"),
    "table width": ({"rope": "num", "rope_tables": (Q[0, :, 0, :2],) * 2}, ValueError, r"sin is \[5, 2\]; expected"),
    "short tables": ({"rope": "num", "rope_tables": tuple(t[:4] for t in TABLES)}, ValueError, "at least 5, 3 or 6"),
    "tables differ": ({"rope": "num", "rope_tables": (TABLES[0], Q[0, :, 0])}, ValueError, r"cos is \[5, 6\]"),
    "position": ({"rope": "num", "rope_tables": TABLES, "position": 1}, ValueError, "positions end at 6, .* have 5"),
    "position shape": (
        {"rope": "num", "rope_tables": TABLES, "position": torch.zeros(3).long()}, ValueError, r"position is \[3\]",
    ),
    "cu_seqlens rank": ({**ONE, "cu_seqlens": CU[None]}, ValueError, "cu_seqlens is .* expected 1 dimensions"),
    "cu_seqlens dtype": ({**ONE, "cu_seqlens": CU.float()}, ValueError, "of int32 or int64"),
    "cu_seqlens batch": ({"cu_seqlens": CU}, ValueError, "packed sequences need a batch of 1"),
    "cu_seqlens end": ({**ONE, "cu_seqlens": CU[:2]}, ValueError, r"cu_seqlens is \[0, 2\].*rise from 0 to 5"),
    "cu_seqlens falls": ({**ONE, "cu_seqlens": torch.tensor([0, 4, 3, 5])}, ValueError, "rise from 0 to 5"),
    "state shape": (
        {"initial_state": empty_state(2, 2, 5, 3)}, ValueError, r"initial_state.s is \[2, 2, 10, 3\].*\[2, 2, 12, 3\]",
    ),
    "state dtype": (
        {"initial_state": empty_state(2, 2, 6, 3, double=True)}, ValueError, "of torch.float64; expected .*float32",
    ),
    "state tokens": (
        {"initial_state": LinearAttentionState(STATE.s, STATE.z, STATE.tokens.int())}, ValueError, "of torch.int32",
    ),
    "backend": ({"backend": "cud"}, ValueError, "unknown backend 'cud'; choose from auto, cuda, triton, cpu, eager"),
    "devices": ({"v": V.to("meta")}, ValueError, "one device; q is on cpu, k is on cpu, v is on meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_wrong_call(name: str) -> None:
    changes, error, message = CALLS[name]
    with pytest.raises(error, match=message) as caught:
        pyelastic.norm_linear_attention(**{"q": Q, "k": K, "v": V, **changes})
    assert str(caught.value).startswith("norm_linear_attention: ")


STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "rope without tables": ({"rope": "num"}, "rope is 'num' and rope_tables is None; pass pyelastic.rope_tables"),
    "state layout": (
        {"state": LinearAttentionState(STATE.s.mT.contiguous().mT, STATE.z, STATE.tokens)}, "expected a contiguous",
    ),
    "beyond the tables": (
        {"rope": "num", "rope_tables": TABLES, "state": LinearAttentionState(*STATE[:2], torch.tensor([0, 5]))},
        "positions end at 6, and rope_tables have 5",
    ),
    "rank": ({"q": Q[0, :1]}, "q is .* expected 4 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_wrong_step(name: str) -> None:
    changes, message = STEPS[name]
    with pytest.raises(ValueError, match=message):
        given = {"q": Q[:, :1], "k": K[:, :1], "v": V[:, :1], "state": STATE, **changes}
        pyelastic.norm_linear_attention_step(**given)
    assert not STATE.s.any() and not STATE.tokens.any()


@pytest.mark.parametrize(("positions", "dim"), [(4, 5), ((2, 2), 6), (3, 0)])
def test_wrong_tables(positions: Any, dim: int) -> None:
    with pytest.raises(ValueError, match=f"rope_tables: dim is {dim}; expected a multiple of "):
        pyelastic.rope_tables(positions, dim)


def test_a_dtensor_is_refused() -> None:
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(TypeError, match=r"norm_linear_attention: v is a DTensor.*to_local"):
        pyelastic.norm_linear_attention(Q, K, V.as_subclass(DTensor))


@over_kernels
@pytest.mark.parametrize("causal", (False, True))
def test_double_backward_is_refused(backend: str, causal: bool) -> None:
    made, leaves = call(backend, make(1, 4, causal=causal))
    (grad,) = torch.autograd.grad(made["o"].square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"norm_linear_attention: double backward needs backend='eager'"):
        grad.square().sum().backward()


def test_eager_has_a_double_backward() -> None:
    made, leaves = call("eager", make(1, 4, dtype=torch.float64))
    (grad,) = torch.autograd.grad(made["o"].pow(3).sum(), leaves["q"], create_graph=True)
    grad.square().sum().backward()
    second = leaves["v"].grad
    assert second is not None and second.isfinite().all() and second.any()


def test_backends_say_why_not() -> None:
    given = [x.to("meta") for x in (Q, K, V)]
    reasons = pyelastic.backends(OP, *given)
    assert reasons.pop("eager") is None and None not in reasons.values()
    with pytest.raises(pyelastic.BackendError, match=r"norm_linear_attention: backend 'cpu' cannot run this call"):
        pyelastic.norm_linear_attention(*given, backend="cpu")
