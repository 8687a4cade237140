"""Our own products with float32 sums on the CPU, against float64."""

import backends
import pytest
import torch
from torch import Tensor

import pyelastic
from pyelastic import _extension
from pyelastic.ops import _gemm

# rows, columns, depth
SIZES = [(1, 1, 1), (1, 40, 300), (40, 1, 7), (12, 32, 256), (13, 33, 257)]
SIZES += [(100, 700, 90), (700, 100, 90), (30, 50, 1100)]
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
DTYPES += [(torch.float16, torch.float32)]
KINDS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.require("cpu")
    if _extension.load().gemm_room(1, 1) < 0:
        pytest.skip("this instruction set has no products of ours")
    monkeypatch.setattr(_gemm, "kinds", lambda: KINDS)


def turned(x: Tensor, turn: bool) -> Tensor:
    """x, laid out by columns if `turn`, within a wider matrix."""
    rows, columns = reversed(x.shape) if turn else x.shape
    room = torch.full((rows, columns + 3), float("nan"), dtype=x.dtype)[:, :columns]
    room.copy_(x.t() if turn else x)
    return room.t() if turn else room


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("turn_a", (False, True))
@pytest.mark.parametrize("turn_b", (False, True))
@pytest.mark.parametrize("add", (False, True))
def test_products(
    size: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype], turn_a: bool, turn_b: bool, add: bool
) -> None:
    rows, columns, depth = size
    a, b = torch.randn(rows, depth, dtype=dtypes[0]), torch.randn(depth, columns, dtype=dtypes[1])
    before = torch.randn(rows, columns)
    out = before.clone() if add else torch.full_like(before, float("nan"))
    operands = turned(a, turn_a), turned(b, turn_b)
    assert _gemm._own(*operands, out)
    _gemm.multiply(*operands, out, add=add)
    want = a.double() @ b.double() + (before.double() if add else 0)
    # Rounding errors of a sum in any order: depth terms, each rounded once more than the sum before it.
    bound = (depth + 2) * 2.0**-24 * (a.double().abs() @ b.double().abs() + before.double().abs() * add)
    assert ((out.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("size", SIZES[-3:])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_bits_do_not_depend_on_the_thread_count(
    size: tuple[int, int, int], dtype: torch.dtype, restore_threads: None
) -> None:
    rows, columns, depth = size
    a, b = torch.randn(rows, depth, dtype=dtype), torch.randn(depth, columns, dtype=dtype)
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        found.append(torch.empty(rows, columns))
        _gemm.multiply(a, b, found[-1])
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_no_depth_is_zero_or_what_was_there() -> None:
    a, b = torch.empty(3, 0), torch.empty(0, 5)
    out = torch.ones(3, 5)
    _gemm.multiply(a, b, out, add=True)
    assert torch.equal(out, torch.ones(3, 5))
    _gemm.multiply(a, b, out)
    assert torch.equal(out, torch.zeros(3, 5))


def test_an_operand_without_unit_stride_is_converted() -> None:
    a, b, out = torch.randn(40, 20)[::2, ::2], torch.randn(10, 30, dtype=torch.bfloat16), torch.empty(20, 30)
    assert not _gemm.takes(a, b.dtype) and _gemm.takes(b, a.dtype)
    _gemm.multiply(a, b, out)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype) -> None:
    a, b = torch.randn(20, 30, dtype=dtype), torch.randn(30, 40, dtype=dtype)
    a[7, 3] = float("nan")
    out = torch.empty(20, 40)
    _gemm.multiply(a, b, out)
    assert out[7].isnan().all() and out[torch.arange(20) != 7].isfinite().all()


@pytest.mark.parametrize("own", (False, True))
def test_margin_softmax_with_either(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's choice is tested everywhere else, the other one here."""
    monkeypatch.setattr(_gemm, "kinds", lambda: KINDS if own else ())
    e, w, labels = torch.randn(33, 48), torch.randn(1000, 48), torch.randint(0, 1000, (33,))
    found = []
    for backend in ("cpu", "eager"):
        leaves = [x.clone().requires_grad_() for x in (e, w)]
        loss = pyelastic.margin_softmax(*leaves, labels, backend=backend)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=1e-6)
