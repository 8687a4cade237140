"""Memory layouts, fuzzed calls, determinism, offsets: nothing but values may decide the result."""

from typing import Any

import backends
import layouts
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import pairwise
from maxsim_cases import (
    BACKENDS,
    LAYOUTS,
    OP,
    Case,
    call,
    compare,
    make,
    masks,
    over_backends,
    over_kernels,
    upstream_of,
)
from torch import Tensor
from torch.autograd import gradcheck

import pyelastic

KINDS = ("contiguous", "transposed", "sliced", "offset", "expanded", "heads")


def lay(x: Tensor, kind: str) -> Tensor:
    """x's values in another layout, padding filled with NaN; "heads": [N, L, d] out of a packed [N, L, 3, d]."""
    if kind == "heads":
        out = torch.full((*x.shape[:-1], 3, x.shape[-1]), torch.nan, dtype=x.dtype)[..., 1, :]
        return out.copy_(x)
    if kind == "expanded":
        return x[:1].clone().expand_as(x)
    flat = layouts.lay(x.reshape(-1, x.shape[-1]), kind)
    if kind == "sliced":  # no view [N, L, d] of a slice with rows left out
        return layouts.lay(x.reshape(x.shape[0], -1), kind).unflatten(1, x.shape[1:])
    return flat.view(x.shape)


@over_backends
@pytest.mark.parametrize(
    ("q", "d", "g", "dtype", "normalize"),
    pairwise(
        q=KINDS,
        d=KINDS,
        g=("contiguous", "transposed", "sliced", "expanded"),
        dtype=(torch.float32, torch.bfloat16, torch.float64),
        normalize=(False, True),
    ),
)
def test_layouts(backend: str, q: str, d: str, g: str, dtype: torch.dtype, normalize: bool) -> None:
    """Inputs and incoming gradient in every pair of layouts."""
    case = make(dtype=dtype, ld=13)
    case = Case(lay(case.queries, q), lay(case.documents, d), {"normalize": normalize})
    upstream = layouts.lay(upstream_of(case).view(3, 4), g)
    compare(backend, case, upstream[None])


CHECKED: tuple[dict[str, Any], ...] = (
    {}, {"normalize": True}, {"topk": 2}, {"temperature": 0.7}, {"reduction": "none"},
)  # fmt: skip


@over_backends
@pytest.mark.parametrize("options", CHECKED, ids=str)
def test_gradcheck(backend: str, options: dict[str, Any]) -> None:
    """Finite differences, with the gradient of the scores arriving in five layouts."""
    backends.skip_unsupported(OP, backend, torch.float64)
    case = masks(make(nq=2, nd=3, lq=3, ld=4, dim=3, dtype=torch.float64))

    def scores(q: Tensor, d: Tensor) -> Tensor:
        return pyelastic.maxsim(q, d, backend=backend, **case.options, **options)

    inputs = (case.queries.requires_grad_(), case.documents.requires_grad_())
    for name, wrapped in layouts.layouts(scores):
        assert gradcheck(wrapped, inputs), name


@over_backends
@pytest.mark.parametrize("need", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("layout", ("cross", "grouped"))
def test_gradients_only_where_needed(backend: str, need: tuple[bool, bool], layout: str) -> None:
    case = make(layout)
    whole, q, d = call(backend, case)
    whole.backward(torch.ones_like(whole))
    part, q2, d2 = call(backend, case, need)
    torch.testing.assert_close(part, whole)
    assert part.requires_grad == any(need)
    if any(need):
        part.backward(torch.ones_like(part))
    for mine, full, wanted in ((q2, q, need[0]), (d2, d, need[1])):
        assert (mine.grad is not None) == wanted
        if wanted:
            assert torch.equal(mine.grad, full.grad)


@over_kernels
def test_nothing_is_saved_without_gradients(backend: str) -> None:
    """No winners where no backward can come."""
    device = backends.device_of(backend)
    case = make()
    from pyelastic.ops import maxsim as op

    prepared = op.prepare(case.queries.to(device), case.documents.to(device))
    assert not op.saves(prepared.inputs, "winners")
    prepared = op.prepare(case.queries.to(device).requires_grad_(), case.documents.to(device))
    assert op.saves(prepared.inputs, "auto") and not op.saves(prepared.inputs, "recompute")
    with torch.no_grad():
        assert not op.saves(prepared.inputs, "winners")


@over_backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_unchanged(backend: str, layout: str) -> None:
    case = masks(make(layout)).having(normalize=True)
    tensors = [case.queries, case.documents, *(v for v in case.options.values() if isinstance(v, Tensor))]
    before = [t.clone() for t in tensors]
    out, *_ = call(backend, case)
    upstream = upstream_of(case).reshape(out.shape).to(out.device)
    kept = upstream.clone()
    out.backward(upstream)
    assert torch.equal(upstream, kept)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def bits(backend: str, case: Case) -> list[Tensor]:
    out, q, d = call(backend, case)
    out.backward(upstream_of(case).reshape(out.shape).to(out.device))
    return [out.detach(), q.grad, d.grad]


@over_backends
@pytest.mark.parametrize("options", ({}, {"normalize": True, "topk": 2}, {"temperature": 0.3}), ids=str)
def test_repeated_calls_are_bitwise_equal(backend: str, options: dict[str, Any]) -> None:
    case = make(nq=5, nd=6, lq=9, ld=33, dtype=torch.bfloat16).having(**options)
    first = bits(backend, case)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, bits(backend, case), strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("layout", ("cross", "grouped", "packed"))
@pytest.mark.parametrize("options", ({}, {"normalize": True, "topk": 2}, {"temperature": 0.3}), ids=str)
def test_thread_count_does_not_change_a_bit(
    dtype: torch.dtype, layout: str, options: dict[str, Any], restore_threads: None
) -> None:
    backend = backends.require("cpu")
    case = make(layout, nq=9, nd=11, lq=13, ld=37, dtype=dtype).having(**options)
    torch.set_num_threads(1)
    one = bits(backend, case)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for name, a, b in zip(("scores", "dq", "dd"), one, bits(backend, case), strict=True):
            assert torch.equal(a, b), f"{name} differs between 1 and {threads} threads"


@over_kernels
def test_recomputed_winners_are_the_saved_ones(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of one document too: dd bit by bit, dq up to the order of its sum."""
    case = make(nd=7).having(normalize=True)
    saved = bits(backend, case.having(save="winners"))
    from pyelastic.ops import _maxsim_cpu as launcher

    monkeypatch.setattr(launcher, "CHUNK_BYTES", 1)
    again = bits(backend, case.having(save="recompute"))
    assert torch.equal(saved[0], again[0]) and torch.equal(saved[2], again[2])
    torch.testing.assert_close(again[1], saved[1], rtol=1e-5, atol=1e-6)


@over_kernels
def test_the_budget_decides(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyelastic.ops import maxsim as op

    case = make()
    prepared = op.prepare(case.queries.requires_grad_(), case.documents)
    assert op.saves(prepared.inputs, "auto")
    monkeypatch.setattr(op, "SAVE_BUDGET", 3 * 7 * 4 * 2 - 1)  # a byte less than the winners take
    assert not op.saves(prepared.inputs, "auto")


@over_backends
def test_layouts_agree(backend: str) -> None:
    """The same pairs through cross, list, packed, grouped and pairs: the same scores."""
    case = make(nq=3, nd=6)
    cross, *_ = call(backend, case)
    every = torch.cartesian_prod(torch.arange(3), torch.arange(6))
    listed, *_ = call(backend, Case(case.queries, case.documents, {"pairs": every}))
    grouped, *_ = call(backend, Case(case.queries, case.documents.view(3, 2, 19, 20)))
    packed, *_ = call(backend, Case(case.queries.flatten(0, 1), case.documents.flatten(0, 1), {
        "cu_seqlens_q": torch.arange(4) * 7, "cu_seqlens_d": torch.arange(7) * 19,
    }))  # fmt: skip
    paired, *_ = call(backend, Case(case.queries, case.documents[:3], {"layout": "pairs"}))
    single = torch.stack([call(backend, Case(q, case.documents))[0] for q in case.queries])
    for other in (listed.view(3, 6), packed, single):
        torch.testing.assert_close(other, cross, rtol=1e-5, atol=1e-5)
    own = torch.stack([cross[i, 2 * i : 2 * i + 2] for i in range(3)])
    torch.testing.assert_close(grouped, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(paired, cross[:, :3].diagonal(), rtol=1e-5, atol=1e-5)


def test_wide_winners() -> None:
    """Documents beyond 65,534 tokens: winners take 32 bits."""
    backend = backends.require("cpu")
    q, d = torch.zeros(1, 2, 4), torch.zeros(1, 70_000, 4)
    q[0, 0, 0] = q[0, 1, 1] = 1.0
    d[0, 69_999, 0] = d[0, 65_535, 1] = 1.0
    q, d = q.requires_grad_(), d.requires_grad_()
    out = pyelastic.maxsim(q, d, backend=backend)
    out.sum().backward()
    assert out.item() == 2.0 and d.grad.abs().sum(-1).nonzero()[:, 1].tolist() == [65_535, 69_999]


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    """Documents beyond 2^31 elements: a view of little memory; the last document is found where it is."""
    backend = backends.require("cpu")
    import psutil

    if psutil.virtual_memory().available < 6 << 30:
        pytest.skip("needs 6 GiB")
    d = torch.zeros(4097, 4096, 128, dtype=torch.bfloat16)  # 2^31 + 2^19 elements, 4.3 GB of untouched pages
    d[-1, -1, 5] = 1.0
    q = torch.zeros(1, 1, 128, dtype=torch.bfloat16)
    q[0, 0, 5] = 2.0
    scores = pyelastic.maxsim(q, d, backend=backend)
    assert scores[0, -1] == 2.0 and not scores[0, :-1].any()


LENGTHS = st.lists(st.integers(0, 20), min_size=0, max_size=4)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(data=st.data())
def test_fuzz(backend: str, data: st.DataObject) -> None:
    """Any lengths, dtypes, masks, pairs and options against the truth."""
    draw = data.draw
    lengths_q, lengths_d = draw(LENGTHS), draw(LENGTHS)
    dim = draw(st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    options: dict[str, Any] = {
        "cu_seqlens_q": torch.tensor([0, *lengths_q]).cumsum(0),
        "cu_seqlens_d": torch.tensor([0, *lengths_d]).cumsum(0),
        "normalize": draw(st.booleans()) and dim > 1,
        "reduction": draw(st.sampled_from(["sum", "mean"])),
        "save": draw(st.sampled_from(["auto", "recompute"])),
    }
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    kind = draw(st.sampled_from(["max", "max", "topk", "smooth", "dims"]))
    if kind == "topk":
        options["topk"] = draw(st.integers(2, 5))
    elif kind == "smooth":
        options["temperature"] = draw(st.sampled_from([0.1, 1.0, 3.0]))
    elif dim > 1 and kind == "dims":
        options["dims"] = sorted(draw(st.sets(st.integers(1 + options["normalize"], dim), min_size=1, max_size=3)))
    q, d = (torch.randn(sum(n), dim, generator=random, dtype=torch.float64).to(dtype) for n in (lengths_q, lengths_d))
    for name, x in (("query_mask", q), ("document_mask", d)):
        if draw(st.booleans()):
            options[name] = torch.rand(len(x), generator=random) > 0.4
    if draw(st.booleans()):
        options["mask_mode"] = "zero"
    if lengths_q and lengths_d and draw(st.booleans()):
        pair = st.tuples(st.integers(0, len(lengths_q) - 1), st.integers(0, len(lengths_d) - 1))
        options["pairs"] = torch.tensor(draw(st.lists(pair, max_size=5))).long().reshape(-1, 2)
    compare(backend, Case(q, d, options))
