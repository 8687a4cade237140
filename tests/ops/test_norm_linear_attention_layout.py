"""Memory layouts, subsets of gradients, determinism, fuzzed calls: nothing but values may decide the result."""

from typing import Any

import backends
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import layouts, pairwise
from norm_linear_attention_cases import (
    BACKENDS,
    OP,
    Case,
    call,
    compare,
    make,
    over_backends,
    over_kernels,
    upstream_of,
)
from torch import Tensor
from torch.autograd import gradcheck

import pyelastic
from pyelastic.ops import _norm_linear_attention_gpu as gpu
from pyelastic.ops import norm_linear_attention as op

KINDS = ("contiguous", "packed", "heads first", "last first", "sliced", "offset", "expanded")


def lay(x: Tensor, kind: str) -> Tensor:
    """x [B, N, H, d] in another layout, beside NaNs; "expanded" repeats the first head at stride 0."""
    x = x.detach()
    b, n, h, d = x.shape
    carrier = lambda *shape: torch.full(shape, torch.nan, dtype=x.dtype)  # noqa: E731
    if kind == "contiguous":
        return x.clone()
    if kind == "expanded":
        return x[:, :, :1].clone().expand_as(x)
    out = {
        "packed": lambda: carrier(b, n, 3, h, d)[:, :, 1],
        "heads first": lambda: carrier(b, h, n, d).transpose(1, 2),
        "last first": lambda: carrier(d, b, n, h).permute(1, 2, 3, 0),
        "sliced": lambda: carrier(b, n + 2, h, d + 3)[:, 1:-1, :, 1:-2],
        "offset": lambda: carrier(x.numel() + 1)[1:].view(x.shape),
    }[kind]()
    return out.copy_(x)


@over_backends
@pytest.mark.parametrize(
    ("q", "k", "v", "g", "causal"), pairwise(q=KINDS, k=KINDS, v=KINDS, g=KINDS, causal=(False, True))
)
def test_layouts(backend: str, q: str, k: str, v: str, g: str, causal: bool) -> None:
    case = make(2, 7, causal=causal, gate=True, rope="num" if q > k else None)
    assert case.gate is not None
    laid = case.having(q=lay(case.q, q), k=lay(case.k, k), v=lay(case.v, v), gate=lay(case.gate, g))
    compare(backend, laid, upstream={"o": lay(upstream_of(case)["o"], g)})


@over_kernels
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_of_bfloat16(backend: str, kind: str, causal: bool) -> None:
    """Widths that tensor cores take; rows of every tensor and of the gradient on 16 bytes, or not."""
    case = make(2, 20, d=8, dv=24, heads=4, kv_heads=2, gate=True, causal=causal, rope="num", dtype=torch.bfloat16)
    assert case.gate is not None
    laid = case.having(q=lay(case.q, kind), k=lay(case.k, kind), v=lay(case.v, kind), gate=lay(case.gate, kind))
    compare(backend, laid, upstream={"o": lay(upstream_of(case)["o"], kind)}, final=causal)


@over_backends
def test_heads_before_tokens(backend: str) -> None:
    case = make(2, 5, gate=True, heads=4, kv_heads=2)
    want, _ = call(backend, case, need=(), final=False)
    swapped = {n: getattr(case, n).transpose(1, 2) for n in ("q", "k", "v", "gate")}
    given = {n: x.to(backends.device_of(backend)) for n, x in swapped.items()}
    o = pyelastic.norm_linear_attention(**given, layout="bhnd", backend=backend)
    assert torch.equal(o.transpose(1, 2), want["o"])


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])
def test_a_packed_projection_is_not_copied(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyelastic.ops import _norm_linear_attention as launcher

    qkv = torch.randn(2, 6, 3, 2, 8, device=backends.device_of(backend))
    seen = []
    original = launcher.last_contiguous

    def spy(x: Tensor) -> Tensor:
        seen.append(original(x) is x)
        return original(x)

    monkeypatch.setattr(launcher, "last_contiguous", spy)
    pyelastic.norm_linear_attention(*qkv.unbind(2), backend=backend)
    assert len(seen) >= 3 and all(seen)


@over_kernels
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("n", (20, 150))
def test_heads_first_stay_heads_first(backend: str, n: int, causal: bool) -> None:
    """o and gradients lie as q, k, v and the gate do, with the bits of the other order."""
    case = make(2, n, heads=4, kv_heads=2, d=16, dv=8, gate=True, rope="num", causal=causal)
    assert case.tables is not None and case.gate is not None
    device = backends.device_of(backend)
    tables = tuple(t.to(device) for t in case.tables)
    found = {}
    for layout in ("bhnd", "bnhd"):
        given = {name: getattr(case, name).to(device) for name in ("q", "k", "v", "gate")}
        if layout == "bhnd":
            given = {name: x.transpose(1, 2).contiguous() for name, x in given.items()}
        leaves = {name: x.requires_grad_() for name, x in given.items()}
        how = {"rope": "num", "rope_tables": tables, "causal": causal, "layout": layout, "backend": backend}
        o = pyelastic.norm_linear_attention(**leaves, **how)
        assert isinstance(o, Tensor)
        upstream = upstream_of(case)["o"].to(device)
        upstream = upstream.transpose(1, 2).contiguous() if layout == "bhnd" else upstream
        made = (o, *torch.autograd.grad(o, tuple(leaves.values()), upstream))
        assert all(x.is_contiguous() for x in made), layout
        found[layout] = [x.detach().transpose(1, 2) if layout == "bhnd" else x.detach() for x in made]
    for a, b in zip(*found.values(), strict=True):
        assert torch.equal(a, b)


def shuffled(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """x with its dimensions in memory in that order."""
    back = sorted(range(x.ndim), key=order.__getitem__)
    return x.detach().permute(order).contiguous().permute(back)


@over_kernels
@pytest.mark.parametrize(("causal", "packed"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_each_tensor_has_an_order_of_its_own(
    backend: str, dtype: torch.dtype, causal: bool, packed: bool
) -> None:
    """q, v and the gradient heads first, k tokens first, a gate with batches inside: each result as its own tensor."""
    lengths = (5, 0, 17) if packed else None
    case = make(2, 22, heads=4, kv_heads=2, d=8, dv=6, gate=True, dtype=dtype, causal=causal, lengths=lengths)
    assert case.gate is not None
    first, inside = (0, 2, 1, 3), (2, 1, 0, 3)
    laid = case.having(
        q=shuffled(case.q, first), v=shuffled(case.v, first), gate=shuffled(case.gate, inside)
    )
    upstream = {"o": shuffled(upstream_of(case)["o"], first)}
    compare(backend, laid, upstream=upstream)
    made, leaves = call(backend, laid, final=False)
    gradients = torch.autograd.grad(made["o"], tuple(leaves.values()), upstream["o"].to(made["o"].device))
    for of, result in (("q", made["o"]), *zip(leaves, gradients, strict=True)):
        in_order = result if of == "k" else result.transpose(1, 2)
        assert in_order.is_contiguous(), (of, result.stride())


@over_kernels
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)])
def test_a_strided_gradient_is_not_copied(
    backend: str, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(2, 9, causal=True)
    upstream = shuffled(upstream_of(case)["o"], order)
    seen = []
    module = op.LAUNCHERS[backend] if backend == "cpu" else gpu
    original = module.last_contiguous

    def spy(x: Tensor) -> Tensor:
        seen.append(original(x) is x and x.stride() == upstream.stride())
        return original(x)

    monkeypatch.setattr(module, "last_contiguous", spy)
    made, _ = call(backend, case)
    made["o"].backward(upstream.to(made["o"].device))
    assert seen == [True]


CHECKED: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True, "rope": "num", "learned": True},
    {"mode": "cos", "rope": "both", "gate": True, "alpha": 3.0},
    {"state": True, "causal": True, "heads": 2, "kv_heads": 1},
)


@over_backends
@pytest.mark.parametrize("options", CHECKED, ids=str)
def test_gradcheck(backend: str, options: dict[str, Any]) -> None:
    """Finite differences of every input, with the gradient of o arriving in five layouts."""
    backends.skip_unsupported(OP, backend, torch.float64)
    case = make(1, 4, d=2, dv=2, dtype=torch.float64, eps=1e-2, **{"heads": 1, **options})
    names = list(case.tensors)

    def f(*values: Tensor) -> Tensor:
        laid = case.having(**dict(zip(names, values, strict=True)))
        state = None
        if laid.s0 is not None:
            state = pyelastic.LinearAttentionState(laid.s0, laid.z0, torch.tensor(laid.before))
        o = pyelastic.norm_linear_attention(
            laid.q,
            laid.k,
            laid.v,
            gate=laid.gate,
            lam=laid.lam,
            tau=laid.tau,
            norm_scale=laid.norm_scale,
            mode=laid.mode,
            rope=laid.rope,
            rope_tables=laid.tables,
            causal=laid.causal,
            alpha=laid.alpha,
            eps=laid.eps,
            initial_state=state,
            backend=backend,
        )
        assert isinstance(o, Tensor)
        return o

    inputs = tuple(value.requires_grad_() for value in case.tensors.values())
    for name, wrapped in layouts(f):
        assert gradcheck(wrapped, inputs), name


def bits(backend: str, case: Case, need: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    made, leaves = call(backend, case, need)
    if made["o"].requires_grad:
        made["o"].backward(upstream_of(case)["o"].to(made["o"].device))
    found = {n: x.grad for n, x in leaves.items() if x.grad is not None}
    return {"o": made["o"].detach(), **found}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], what: str = "") -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), f"{name} differs {what}"


@over_backends
@pytest.mark.parametrize("causal", (False, True))
def test_gradients_only_where_needed(backend: str, causal: bool) -> None:
    """Subsets of inputs: the gradients asked for, with the bits of the whole, and no others."""
    case = make(1, 6, gate=True, state=True, learned=True, causal=causal)
    whole = bits(backend, case)
    names = list(case.tensors)
    subsets = [(n,) for n in names] + [tuple(m for m in names if m != n) for n in names] + [()]
    for need in subsets:
        some = bits(backend, case, need)
        assert set(some) == {"o", *need}
        assert_equal(some, {name: whole[name] for name in some}, f"for {need}")


@over_backends
def test_inputs_are_unchanged(backend: str) -> None:
    case = make(1, 6, gate=True, state=True, learned=True, causal=True)
    before = {name: value.clone() for name, value in case.tensors.items()}
    made, _ = call(backend, case)
    upstream = upstream_of(case)["o"].to(made["o"].device)
    kept = upstream.clone()
    made["o"].backward(upstream)
    assert torch.equal(upstream, kept)
    assert_equal(before, case.tensors)


@over_backends
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("causal", (False, True))
def test_repeated_calls_are_bitwise_equal(backend: str, dtype: torch.dtype, causal: bool) -> None:
    case = make(1, 70, d=8, learned=True, dtype=dtype, causal=causal)
    first = bits(backend, case)
    for _ in range(2):
        assert_equal(first, bits(backend, case))


@over_backends
def test_order_of_tokens_does_not_matter(backend: str) -> None:
    """Bidirectional, without RoPE: permuted keys give the same output, permuted queries permuted ones."""
    case = make(2, 40, d=8)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    want = call(backend, case, need=())[0]["o"]
    keys = call(backend, case.having(k=case.k[:, order], v=case.v[:, order]), need=())[0]["o"]
    torch.testing.assert_close(keys, want, rtol=1e-4, atol=1e-5)
    queries = call(backend, case.having(q=case.q[:, order]), need=())[0]["o"]
    torch.testing.assert_close(queries, want[:, order.to(want.device)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40)
@given(data=st.data())
def test_fuzz(backend: str, data: st.DataObject) -> None:
    """Any sizes, dtypes and options against the truth."""
    draw = data.draw
    causal, kv = draw(st.booleans()), draw(st.integers(1, 2))
    n = draw(st.integers(0, 40))
    packed = draw(st.booleans())
    case = make(
        draw(st.integers(0, 2)),
        n,
        n if causal else draw(st.integers(1, 40)),
        heads=kv * draw(st.integers(1, 2)),
        kv_heads=kv,
        d=2 * draw(st.integers(1, 10)),
        dv=draw(st.integers(1, 20)),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])),
        gate=draw(st.booleans()),
        state=draw(st.booleans()),
        learned=draw(st.booleans()),
        rope=draw(st.sampled_from([None, "num", "both"])),
        lengths=draw(st.lists(st.integers(0, 20), min_size=1, max_size=4)) if packed else None,
        mode=draw(st.sampled_from(["split", "cos"])),
        causal=causal,
        key_power=draw(st.sampled_from([1.0, 2.0, 3.0, 2.5])),
        eps=draw(st.sampled_from([1e-6, 1e-2])),
        eps_mode=draw(st.sampled_from(["mean", "sum"])),
        seed=draw(st.integers(0, 999)),
    )
    compare(backend, case, states=True)
