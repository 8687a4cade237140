"""Memory layouts, compaction, determinism, fuzzed calls: nothing but values may decide the result."""

from typing import Any

import backends
import layouts
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import KINDS, lay, pairwise
from projection_cases import (
    BACKENDS,
    SKIPS,
    Case,
    call,
    check,
    compare,
    gradients_of,
    make,
    over_backends,
    over_kernels,
    reference,
    upstream_of,
)
from torch import Tensor
from torch.autograd import gradcheck

import pyelastic
from pyelastic.ops import _projection as launcher


@over_backends
@pytest.mark.parametrize("skip", ("identity", "projected"))
@pytest.mark.parametrize(
    ("x", "w", "r", "g"),
    pairwise(x=KINDS, w=KINDS, r=KINDS, g=("contiguous", "transposed", "sliced", "offset", "expanded")),
)
def test_layouts(backend: str, skip: str, x: str, w: str, r: str, g: str) -> None:
    """Inputs and incoming gradient in every pair of layouts; the parameters share theirs."""
    # What repeats rounds alike, and the bound of 16 bits takes errors for independent.
    dtype = torch.float32 if "expanded" in (x, w, r) else torch.bfloat16
    case = make(skip=skip, dtype=dtype, normalize=(x, g) != ("sliced", "offset"))
    kinds = {"x": x, "weight": w, "bias": w, "residual": r, "residual_weight": w}
    laid = case.having(**{name: lay(value, kinds[name]) for name, value in case.tensors.items()})
    compare(backend, laid, lay(upstream_of(laid), g))


@over_backends
@pytest.mark.parametrize("kind", ("heads", "channels first"))
def test_layouts_of_leading_dimensions(backend: str, kind: str) -> None:
    """[B, T, d] out of a packed [B, T, 3, d], and with its last dimension not the fastest."""
    case = make(2, 5, skip="projected")

    def laid(x: Tensor) -> Tensor:
        if kind == "heads":
            packed = torch.full((*x.shape[:-1], 3, x.shape[-1]), torch.nan, dtype=x.dtype)
            return packed[..., 1, :].copy_(x)
        return x.mT.contiguous().mT

    assert case.residual is not None
    compare(backend, case.having(x=laid(case.x), residual=laid(case.residual)), laid(upstream_of(case)))


CHECKED: tuple[dict[str, Any], ...] = ({}, {"skip": "identity"}, {"skip": "projected", "normalize": False})


@over_backends
@pytest.mark.parametrize("options", CHECKED, ids=str)
def test_gradcheck(backend: str, options: dict[str, Any]) -> None:
    """Finite differences of every input, with the gradient of y arriving in five layouts."""
    backends.skip_unsupported("projection", backend, torch.float64)
    case = make(3, d_in=4, d_out=3, d_r=2, dtype=torch.float64, **options)
    names = list(case.tensors)

    def f(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return pyelastic.projection(**given, normalize=case.normalize, backend=backend)

    inputs = tuple(value.requires_grad_() for value in case.tensors.values())
    for name, wrapped in layouts.layouts(f):
        assert gradcheck(wrapped, inputs), name


def bits(backend: str, case: Case, need: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    y, leaves = call(backend, case, need)
    if y.requires_grad:
        y.backward(upstream_of(case).to(y.device))
    return {"y": y.detach(), **gradients_of(leaves)}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], what: str = "") -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), f"{name} differs {what}"


@over_backends
@pytest.mark.parametrize("skip", SKIPS)
def test_gradients_only_where_needed(backend: str, skip: str) -> None:
    """All subsets of inputs: the gradients asked for, with the bits of the whole, and no others."""
    case = make(skip=skip)
    names = list(case.tensors)
    whole = bits(backend, case)
    for subset in range(1 << len(names)):
        need = tuple(name for i, name in enumerate(names) if subset >> i & 1)
        some = bits(backend, case, need)
        assert set(some) == {"y", *need}
        assert_equal(some, {name: whole[name] for name in some}, f"for {need}")


@over_backends
def test_inputs_are_unchanged(backend: str) -> None:
    case = make(skip="projected")
    before = {name: value.clone() for name, value in case.tensors.items()}
    y, _ = call(backend, case)
    upstream = upstream_of(case).to(y.device)
    kept = upstream.clone()
    y.backward(upstream)
    assert torch.equal(upstream, kept)
    assert_equal(before, case.tensors)


@over_backends
def test_a_result_that_is_not_normalised_may_be_changed_in_place(backend: str) -> None:
    """As after F.linear: only the normalisation's gradient needs y."""
    case = make(normalize=False, skip="identity")
    y, leaves = call(backend, case)
    upstream = upstream_of(case).to(y.device)
    kept = y.detach() > 0
    y.relu_().backward(upstream)
    truth = reference(case, torch.where(kept, upstream, 0.0))
    for name, grad in gradients_of(leaves).items():
        torch.testing.assert_close(grad.double().cpu(), truth.grads[name], rtol=1e-5, atol=1e-5)


@over_kernels
def test_a_normalised_result_changed_in_place_is_an_error(backend: str) -> None:
    y, _ = call(backend, make())
    y.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@over_backends
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_repeated_calls_are_bitwise_equal(backend: str, dtype: torch.dtype) -> None:
    case = make(70, d_in=33, skip="projected", dtype=dtype)
    first = bits(backend, case)
    for _ in range(2):
        assert_equal(first, bits(backend, case))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize(
    ("rows", "d_in", "d_out"), [(1100, 304, 128), (700, 768, 64), (523, 128, 768), (300, 576, 128), (37, 16, 64)]
)
@pytest.mark.parametrize("skip", ("identity", "projected"))
def test_thread_count_does_not_change_a_bit(
    rows: int, d_in: int, d_out: int, skip: str, dtype: torch.dtype, restore_threads: None
) -> None:
    """At widths that are multiples of 16, of 64 in float64; others, and fewer than 16 rows, are up to the BLAS."""
    backend = backends.require("cpu")
    case = make(rows, d_in=d_in, d_out=d_out, skip=skip, d_r=80, dtype=dtype)
    torch.set_num_threads(1)
    one = bits(backend, case)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_equal(one, bits(backend, case), f"between 1 and {threads} threads")


# --- rows without a gradient -----------------------------------------------------------------------------------


def sparse(case: Case, rows: tuple[int, ...], backend: str) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """y, gradients and upstream of a call in which only ``rows`` have a gradient."""
    upstream = torch.zeros_like(upstream_of(case))
    upstream[list(rows)] = upstream_of(case)[list(rows)]
    y, leaves = call(backend, case)
    y.backward(upstream.to(y.device))
    return y, gradients_of(leaves), upstream


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """How many rows each backward gathered; None: it took all."""
    seen: list[int | None] = []
    compact = launcher._compact

    def spy(*arguments: Any) -> Tensor | None:
        kept = compact(*arguments)
        seen.append(None if kept is None else len(kept))
        return kept

    monkeypatch.setattr(launcher, "_compact", spy)
    return seen


@over_backends
@pytest.mark.parametrize("rows", ((), (0,), (39,), (3, 4, 17, 31), tuple(range(19)), tuple(range(20))), ids=len)
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("normalize", (False, True))
def test_rows_without_gradient(
    backend: str, rows: tuple[int, ...], skip: str, normalize: bool, gathered: list[int | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The right gradients, exactly 0 for the others; the CPU gathers rows below half of them, never at half."""
    monkeypatch.setattr(launcher, "CPU_ROWS", 8)
    case = make(40, skip=skip, normalize=normalize, dtype=torch.bfloat16)
    y, grads, upstream = sparse(case, rows, backend)
    check(backend, case, reference(case, upstream), y, grads)
    others = [i for i in range(40) if i not in rows]
    assert not grads["x"][others].any() and (skip == "none" or not grads["residual"][others].any())
    if not rows:
        assert not any(grad.any() for grad in grads.values())
    if backend == "cpu":
        assert gathered == [len(rows) if len(rows) < 20 else None]


def test_gathering_rows_changes_no_row(gathered: list[int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """dx and dr of the compacted backward are those of the whole one, parameters up to the order of their sums."""
    backend = backends.require("cpu")
    case = make(40, skip="projected", dtype=torch.float64)
    _, some, _ = sparse(case, (1, 2, 30), backend)
    monkeypatch.setattr(launcher, "COMPACT_BELOW", 0.0)
    _, whole, _ = sparse(case, (1, 2, 30), backend)
    assert gathered == [3, None]
    for name, grad in some.items():
        torch.testing.assert_close(grad, whole[name], rtol=1e-13, atol=1e-13)


def test_a_nan_in_a_gradient_is_a_gradient(gathered: list[int | None]) -> None:
    backend = backends.require("cpu")
    case = make(40)
    upstream = torch.zeros_like(upstream_of(case))
    upstream[7, 3] = torch.nan
    y, leaves = call(backend, case)
    y.backward(upstream)
    grads = gradients_of(leaves)
    assert gathered == [1] and grads["x"][7].isnan().all() and grads["weight"].isnan().all()
    assert not grads["x"][:7].any() and not grads["x"][8:].any()


# --- fuzz ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(data=st.data())
def test_fuzz(backend: str, data: st.DataObject) -> None:
    """Any sizes, dtypes, options and rows without gradient against the truth."""
    draw = data.draw
    lead = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(lambda n: torch.Size(n).numel() < 200))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    narrow = [torch.float32, torch.bfloat16, torch.float16]
    others = st.sampled_from([torch.float64] if dtype == torch.float64 else narrow)
    case = make(
        *lead,
        d_in=draw(st.integers(1, 40)),
        d_out=draw(st.integers(1, 40)),
        skip=draw(st.sampled_from(SKIPS)),
        d_r=draw(st.integers(1, 20)),
        bias=draw(st.booleans()),
        normalize=draw(st.booleans()),
        dtype=dtype,
        parameters=draw(others),
        r_dtype=draw(others),
        seed=draw(st.integers(0, 999)),
    )
    upstream = upstream_of(case)
    upstream[torch.rand(case.lead) < draw(st.sampled_from([0.0, 0.3, 0.9]))] = 0
    compare(backend, case, upstream)


@pytest.mark.parametrize("rows", (0, 1, 7, 8, 9, 63, 64, 65, 66, 67, 128, 129, 130, 131, 1000))
def test_chunks_cover_all_rows_once(rows: int) -> None:
    parts = list(launcher.chunks(rows, 64))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(rows))
    lengths = [part.stop - part.start for part in parts]
    assert all(n <= 65 for n in lengths) and all(n >= 2 for n in lengths[1:])


@over_kernels
def test_chunks_of_any_size_agree(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(23, skip="projected", dtype=torch.float32)
    truth = reference(case, upstream_of(case))
    for rows in (1, 2, 22, 23, 24):
        monkeypatch.setattr(launcher, "CPU_ROWS", rows)
        monkeypatch.setattr(launcher, "GPU_ROWS", rows)
        found = bits(backend, case)
        check(backend, case, truth, found.pop("y"), found)
