"""Memory layouts, fuzzed calls, determinism: nothing but values may decide the result."""

import itertools
from typing import Any

import backends
import layouts
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import KINDS, lay, pairwise
from margin_softmax_cases import (
    BACKENDS,
    OP,
    VARIANTS,
    Case,
    call,
    compare,
    loss_dtype,
    make,
    over_backends,
    over_variants,
    weighted_upstream,
)
from torch import Tensor
from torch.autograd import gradcheck

import pyelastic
from pyelastic import _dispatch
from pyelastic import margins as M

KERNELS = [b for b in BACKENDS if b != "eager"]
over_kernels = pytest.mark.parametrize("backend", KERNELS)


@over_backends
@pytest.mark.parametrize(
    ("e", "w", "y", "g", "dtype"),
    pairwise(
        e=KINDS,
        w=KINDS,
        y=("contiguous", "sliced", "offset", "expanded"),
        g=("contiguous", "sliced", "offset", "expanded"),
        dtype=(torch.float32, torch.bfloat16, torch.float64),
    ),
)
def test_layouts(backend: str, e: str, w: str, y: str, g: str, dtype: torch.dtype) -> None:
    """Inputs, labels and incoming gradient in every pair of layouts, padding filled with NaN."""
    case = make(12, 35, 19, dtype=dtype)
    laid = Case(lay(case.embeddings, e), lay(case.weight, w), lay(case.labels, y))
    upstream = lay(weighted_upstream(case), g)
    compare(backend, laid, M.ArcFace(), reduction="none", upstream=upstream)


@over_backends
@pytest.mark.parametrize("kind", ("transposed", "sliced", "expanded"))
def test_weight_of_the_official_layout(backend: str, kind: str) -> None:
    """[D, C] parameters come as weight.t(); sub-centres and sampling read the same strides."""
    case = make(subcenters=2)
    case.weight = lay(case.weight, kind)
    compare(backend, case, M.CosFace(), subcenters=2)
    classes = torch.cat((case.labels, torch.arange(0, 37, 5))).unique()
    compare(backend, case, M.CosFace(), subcenters=2, classes=classes)


@over_backends
@pytest.mark.parametrize("kind", ("contiguous", "sliced", "offset", "expanded"))
def test_layouts_of_the_optional_vectors(backend: str, kind: str) -> None:
    case = make()
    compare(
        backend,
        case,
        M.ArcFace(),
        margins=lay(torch.linspace(0.1, 0.6, 13), kind),
        sample_weight=lay(torch.linspace(0.5, 2.0, 13), kind),
    )


CHECKED = ("ArcFace-none", "CosFace", "Combined", "MagFace-none", "Curricular")


@over_backends
@pytest.mark.parametrize("variant", CHECKED)
def test_gradcheck(backend: str, variant: str) -> None:
    """Finite differences, with the gradient of the loss arriving in five layouts."""
    backends.skip_unsupported(OP, backend, torch.float64)
    case = make(4, 5, 3, dtype=torch.float64, seed=6)
    e, w = case.embeddings.requires_grad_(), case.weight.requires_grad_()

    def rows(e: Tensor, w: Tensor) -> Tensor:
        loss: Tensor = pyelastic.margin_softmax(
            e,
            w,
            case.labels,
            margin=VARIANTS[variant],
            scale=4.0,
            reduction="none",
            label_smoothing=0.1,
            z_loss=1e-2,
            backend=backend,
        )
        return loss

    for name, wrapped in layouts.layouts(rows):
        assert gradcheck(wrapped, (e, w)), name


@over_backends
@pytest.mark.parametrize("name", ("lse", "cos_target"))
def test_gradcheck_of_auxiliaries(backend: str, name: str) -> None:
    backends.skip_unsupported(OP, backend, torch.float64)
    case = make(4, 6, 3, dtype=torch.float64, seed=6)
    e, w = case.embeddings.requires_grad_(), case.weight.requires_grad_()

    def one(e: Tensor, w: Tensor) -> Tensor:
        _, aux = pyelastic.margin_softmax(
            e, w, case.labels, scale=4.0, subcenters=2, return_aux=(name,), backend=backend
        )
        out: Tensor = getattr(aux, name)
        return out

    case.labels %= 3
    assert gradcheck(one, (e, w))


@over_backends
@over_variants
def test_inputs_are_unchanged(backend: str, variant: str) -> None:
    case = make(subcenters=2)
    vectors: dict[str, Any] = {
        "sample_weight": torch.linspace(0.5, 2.0, 13),
        "classes": torch.cat((case.labels, torch.arange(0, 37, 5))).unique(),
    }
    if VARIANTS[variant].accepts_margins:
        vectors["margins"] = torch.linspace(0.1, 0.6, 13)
    given_tensors = [case.embeddings, case.weight, case.labels, *vectors.values()]
    before = [t.clone() for t in given_tensors]
    loss, e, w = call(backend, case, VARIANTS[variant], subcenters=2, reduction="none", **vectors)
    upstream = weighted_upstream(case).to(loss.device)
    kept = upstream.clone()
    loss.backward(upstream)
    assert torch.equal(upstream, kept)
    for now, then in zip((e, w, *given_tensors), (before[0], before[1], *before), strict=True):
        assert torch.equal(now.cpu(), then) and now.dtype == then.dtype


def bits(backend: str, case: Case, **options: Any) -> list[Tensor]:
    (loss, aux), e, w = call(backend, case, M.ArcFace(), return_aux=True, **options)
    loss.backward()
    return [loss.detach(), e.grad, w.grad, *(a.detach() for a in aux)]


@over_backends
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_repeated_calls_are_bitwise_equal(backend: str, dtype: torch.dtype) -> None:
    case = make(70, 700, 33, dtype=dtype)
    first = bits(backend, case, label_smoothing=0.1)
    for _ in range(3):
        again = bits(backend, case, label_smoothing=0.1)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("options", ({}, {"label_smoothing": 0.1}, {"scale": 128.0}))
def test_thread_count_does_not_change_a_bit(
    dtype: torch.dtype, options: dict[str, Any], restore_threads: None
) -> None:
    backend = backends.require("cpu")
    case = make(97, 3001, 61, dtype=dtype)
    torch.set_num_threads(1)
    one = bits(backend, case, **options)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        many = bits(backend, case, **options)
        names = ("loss", "dE", "dW", "aux loss", "lse", "cos", "margin", "rank", "max", "el2n", "H")
        for name, a, b in zip(names, one, many, strict=True):
            assert torch.equal(a, b), f"{name} differs between 1 and {threads} threads"


@over_kernels
def test_more_than_one_chunk_of_classes(backend: str) -> None:
    """Enough classes that the kernel walks over several tiles, the last one ragged."""
    share = 16 if backend == "triton" else 1  # whose tiles are small, and whose interpreter is slow
    compare(backend, make(40, 40_009 // share, 12), M.ArcFace())
    compare(backend, make(40, 13_003 // share, 12, subcenters=3), M.CurricularFace(t=0.1), subcenters=3)


@over_backends
def test_rows_do_not_see_each_other(backend: str) -> None:
    """Any split of the batch gives the same rows; permuting classes permutes nothing but dW."""
    dtype = backends.widest(OP, backend)
    case = make(20, 50, 16, dtype=dtype)
    near = {"rtol": 1e-10, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-6}
    whole = call(backend, case, M.ArcFace(), reduction="none")[0]
    parts = [
        call(backend, Case(case.embeddings[a:b], case.weight, case.labels[a:b]), M.ArcFace(),
             reduction="none")[0]
        for a, b in ((0, 1), (1, 8), (8, 20))
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts), whole, **near)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(50))
    moved = Case(case.embeddings, case.weight[order], place[case.labels])
    shuffled, _, w2 = call(backend, moved, M.ArcFace(), reduction="none")
    torch.testing.assert_close(shuffled, whole, **near)
    (loss, _, w), (loss2, _, w2) = (call(backend, c, M.ArcFace()) for c in (case, moved))
    loss.backward()
    loss2.backward()
    # An element of dW is a sum of terms as large as the largest; BLAS adds up their cosines in an order by place.
    if dtype != torch.float64:
        near["atol"] = near["rtol"] * w.grad.abs().max().item()
    torch.testing.assert_close(w2.grad, w.grad[order.to(w.device)], **near)


def test_backends_agree_on_all_layout_pairs_of_float64() -> None:
    """A direct comparison, free of the reference and its bound."""
    able = [b for b in BACKENDS if "float64" in _dispatch.registry()[OP][b].dtypes]
    assert {"eager", "cpu"} <= set(able)
    for e, w in itertools.product(KINDS, KINDS):
        case = make(6, 9, 5, dtype=torch.float64)
        laid = Case(lay(case.embeddings, e), lay(case.weight, w), case.labels)
        got = {}
        for backend in able:
            loss, x, z = call(backend, laid, M.CosFace())
            loss.backward()
            got[backend] = (loss.detach().cpu(), x.grad.cpu(), z.grad.cpu())
        for backend in able:
            for a, b in zip(got[backend], got["eager"], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("apart", ("rows", "columns"))
def test_addresses_beyond_2_to_the_31(backend: str, apart: str) -> None:
    """Elements 2^29 apart, five of them: an offset in int32 would leave the storage, or read a wrong row."""
    small = make(4, 5, 5, dtype=torch.float16)
    case = Case(small.embeddings, small.weight, small.labels)
    far = (1 << 29) + 8
    storage = torch.UntypedStorage(2 * (5 * far + 5), device=backends.device_of(backend))  # committed as it is touched
    strides = (far, 1) if apart == "rows" else (1, far)
    case.weight = torch.empty(0, dtype=torch.float16, device=storage.device).set_(storage, 0, (5, 5), strides)
    case.weight.copy_(small.weight)
    for a, b in zip(bits(backend, small), bits(backend, case), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("variant", ("ArcFace-none", "MagFace", "Curricular"))
@pytest.mark.parametrize("options", ({}, {"label_smoothing": 0.1, "z_loss": 1e-3}), ids=str)
def test_saves_vectors_besides_the_inputs(backend: str, variant: str, options: dict[str, Any]) -> None:
    """O(B) between forward and backward: nothing of B x C, and nothing of B x D but a cast that the norms need."""
    case = make(24, 400, 200)
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss, e, w = call(backend, case, VARIANTS[variant], **options)
    for x in (e, w):
        sizes.pop(x.untyped_storage().data_ptr(), None)
    rows = 24 * 200 * (2 if VARIANTS[variant].needs_norms else 0)  # ignored rows set to zero, and where
    assert loss.requires_grad and sum(sizes.values()) <= rows + 60 * 24


SIZE = st.sampled_from([1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65]) | st.integers(1, 70)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("eager", "cpu")])
@settings(max_examples=60)
@given(data=st.data())
def test_fuzz(backend: str, data: st.DataObject) -> None:
    fuzz(backend, data.draw)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("cuda", "triton")])
@settings(max_examples=25)  # emulated and interpreted
@given(data=st.data())
def test_fuzz_of_gpu_backends(backend: str, data: st.DataObject) -> None:
    fuzz(backend, data.draw)


def fuzz(backend: str, draw: Any) -> None:
    """Any shape, dtype pair, layout, label pattern and combination of options against the truth."""
    batch, classes = draw(st.integers(0, 9) | SIZE), draw(SIZE)
    dim = draw(SIZE.filter(lambda d: d > 1))  # in one dimension every |cos| is 1
    k = draw(st.sampled_from([1, 1, 1, 2, 3]))
    half = (torch.float32, torch.bfloat16, torch.float16)
    double = [(torch.float64,) * 2] if backends.widest(OP, backend) == torch.float64 else []
    e_dtype, w_dtype = draw(st.sampled_from([*double, *itertools.product(half, half)]))
    rounded = backends.half_operands(backend, e_dtype, w_dtype)
    if rounded:
        k = 1  # float16 may choose another sub-centre, by which results jump
    case = make(batch, classes, dim, seed=draw(st.integers(0, 99)), subcenters=k)
    case.embeddings = lay(case.embeddings.to(e_dtype), draw(st.sampled_from(KINDS)))
    case.weight = lay(case.weight.to(w_dtype), draw(st.sampled_from(KINDS[:4])))
    ignored = draw(st.lists(st.integers(0, max(batch - 1, 0)), max_size=3)) if batch else []
    case.labels[ignored] = -1
    options: dict[str, Any] = {
        "ignore_index": -1,
        "subcenters": k,
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
        # One rounding of a logit moves a whole row: with few rows and a large scale an RMS is no mean of many errors.
        "scale": draw(st.sampled_from([1.0, 4.0] if rounded else [1.0, 16.0, 64.0, 128.0])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1])),
        "z_loss": draw(st.sampled_from([0.0, 0.0, 1e-3])),
    }
    if draw(st.booleans()):
        positives = case.labels[case.labels >= 0]
        options["classes"] = torch.cat((positives, torch.arange(0, classes, 2))).unique()
    if draw(st.booleans()):
        options["sample_weight"] = torch.linspace(0.0, 2.0, batch)
    # Continuous in every input; the margins with a threshold jump and are tested on fixed data.
    margin = draw(st.sampled_from([M.NormFace(), M.CosFace(), M.ArcFace(), M.Combined(0.9, 0.3, 0.1)]))
    upstream = weighted_upstream(case) if options["reduction"] == "none" else None
    if upstream is not None:
        upstream = upstream.to(loss_dtype(e_dtype))
    compare(backend, case, margin, upstream=upstream, **options)
