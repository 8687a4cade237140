"""The referee under test: it accepts what is right, rejects what is wrong, and poison is poison."""

import itertools

import layouts
import oracle
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck


def product(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(rounded product, truth, A) of two matrices."""
    a, b = (torch.randn(17, 40).to(dtype) for _ in range(2))
    ref = a.double() @ b.double().T
    return (a.float() @ b.float().T).to(dtype), ref, a.double().abs() @ b.double().abs().T


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_accepts_a_product_and_rejects_its_mutants(dtype: torch.dtype) -> None:
    out, ref, A = product(dtype)
    assert oracle.prove(out, ref, A=A, K=40) == 9


def test_names_the_worst_element() -> None:
    out, ref, A = product(torch.float32)
    out[3, 5] += 1
    with pytest.raises(AssertionError, match=r"worst at \(3, 5\): out .*ref .*error .*bound"):
        oracle.check(out, ref, A=A, K=40)


def test_sees_nan_shape_dtype_and_bias() -> None:
    out, ref, A = product(torch.float32)
    nan, inf = torch.full_like(out, torch.nan), torch.full_like(out, torch.inf)
    for wrong in (nan, inf, out[:-1], out.T):
        with pytest.raises(AssertionError):
            oracle.check(wrong, ref, A=A, K=40)
    with pytest.raises(AssertionError, match="dtype"):
        oracle.check(out, ref, A=A, K=40, dtype=torch.float64)
    # A bias of half the bound on every element is inside the per-element rule only.
    bias = 2 * oracle.unit(torch.float32) * 40**0.5 * A
    with pytest.raises(AssertionError, match="RMS"):
        oracle.check((ref + bias).float(), ref, A=A, K=40)


def test_accepts_nan_where_the_truth_is_nan() -> None:
    out, ref, A = product(torch.float32)
    out[2], ref[2] = torch.nan, torch.nan
    assert oracle.check(out, ref, A=A, K=40) < 1


def test_compares_with_eager() -> None:
    out, ref, A = product(torch.float32)
    with pytest.raises(AssertionError, match="eager's"):
        worse = (ref + 1e-6 * ref.abs().max()).float()
        oracle.check(worse, ref, A=100 * A, K=40, eager=ref.float())
    oracle.check(out, ref, A=A, K=40, eager=out)


@pytest.mark.parametrize("kind", layouts.KINDS)
def test_layouts_keep_values(kind: str) -> None:
    for x in (torch.randn(5, 7), torch.arange(6), torch.randn(1, 3), torch.randn(0, 4)):
        laid = layouts.lay(x, kind)
        assert torch.equal(laid, x[:1].expand_as(x) if kind == "expanded" else x)
    strided = layouts.lay(torch.randn(5, 7), kind)
    assert strided.is_contiguous() == (kind in ("contiguous", "offset"))
    if kind == "offset":
        plain = layouts.lay(torch.randn(5, 7), "contiguous")
        assert strided.data_ptr() % 16 != plain.data_ptr() % 16


class AssumesContiguous(torch.autograd.Function):
    """A planted bug: the backward reads its gradient's memory as if it were contiguous."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return 2 * x

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        size = g.numel()
        flat = torch.as_strided(g, (min(size, g.untyped_storage().nbytes() // 8),), (1,))
        return 2 * torch.cat((flat, flat.new_zeros(size - len(flat)))).view(g.shape)


def test_layout_wrapper_catches_the_planted_bug() -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    caught = [
        name for name, f in layouts.layouts(AssumesContiguous.apply) if not gradcheck(f, (x,), raise_exception=False)
    ]
    assert {"expanded", "sliced", "strided"} <= set(caught)
    assert "contiguous" not in caught  # which is why plain gradcheck is not enough
    for name, right in layouts.layouts(lambda x: 2 * x.sin()):
        assert gradcheck(right, (x,)), name


def test_pairwise_covers_every_pair() -> None:
    axes = {"a": (1, 2, 3), "b": "xyz", "c": (True, False), "d": (None, 0)}
    rows = layouts.pairwise(**axes)
    for i, j in itertools.combinations(range(4), 2):
        values = list(axes.values())
        seen = {(row[i], row[j]) for row in rows}
        assert seen == set(itertools.product(values[i], values[j]))
    assert len(rows) < 3 * 3 * 2 * 2 / 2


def test_uninitialised_memory_is_poisoned() -> None:
    x = torch.randn(3, 4)
    for made in (
        torch.empty(5),
        torch.empty_like(x),
        x.new_empty(5, 5),
        torch.empty_strided((2, 3), (3, 1)),
    ):
        assert bool(made.isnan().all())
    assert bool((torch.empty(5, dtype=torch.int64) == torch.iinfo(torch.int64).max).all())
