"""projection in one kernel (`linear`): tiles, depths, skips, special rows, and when it is used. csrc/projection.h."""

import backends
import oracle
import projection_rows as rows
import pytest
import torch
from torch import Tensor

from pyelastic.ops import _projection as launcher

BACKENDS = tuple(name for name in ("cuda", "triton") if name in backends.implemented("projection"))
over_backends = pytest.mark.parametrize("backend", BACKENDS)
HALVES = (torch.float16, torch.bfloat16)


def linear_case(
    backend: str, n: int, d_out: int, depth: int, *, dtype: torch.dtype = torch.bfloat16, skip: int | None = None,
    bias: bool = True, normalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Check `linear` on random rows; skip: depth of a projected residual, 0 of one that is added. y, truth and A."""
    device = backends.device_of(backend)
    x, w = torch.randn(n, depth).to(dtype), torch.randn(d_out, depth).to(dtype)
    b = torch.randn(d_out) if bias else None
    r = None if skip is None else torch.randn(n, skip or d_out).to(dtype)
    r_w = torch.randn(d_out, skip).to(dtype) if skip else None
    k = rows.kernels(backend)
    on = [None if t is None else t.to(device) for t in (x, w, b, r, r_w)]
    assert k.fuses(on[0], on[1], on[3], on[4])  # type: ignore[arg-type]
    out = torch.full((n, d_out), torch.nan, dtype=dtype, device=device)
    inverse = torch.full((n,), torch.nan, device=device) if normalize else None
    k.linear(*on, out, inverse)  # type: ignore[arg-type]
    truth, absolute = x.double() @ w.double().t(), x.double().abs() @ w.double().abs().t()
    added = [b.double()] if b is not None else []
    if r is not None:
        added.append(r.double() if r_w is None else r.double() @ r_w.double().t())
        absolute += r.double().abs() if r_w is None else r.double().abs() @ r_w.double().abs().t()
    for term in added:
        truth = truth + term
    absolute += b.double().abs() if b is not None else 0.0
    terms = depth + (skip or 0)
    if inverse is not None:
        norm = torch.linalg.vector_norm(truth, dim=1, keepdim=True)
        slope = 1 + (truth.abs() * absolute).sum(1) / norm[:, 0] ** 2
        oracle.check(inverse, 1 / norm[:, 0], A=slope / norm[:, 0], K=terms, dtype=torch.float32, name="inverse")
        truth, absolute = truth / norm, absolute / norm + slope[:, None] * (truth / norm).abs()
    oracle.check(out, truth, A=absolute, K=terms, dtype=dtype, name="y")
    return out.cpu(), truth, absolute


@over_backends
@pytest.mark.parametrize("d_out", (1, 16, 37, 63, 64, 65, 96, 128, 129, 200, 256))
def test_widths(backend: str, d_out: int) -> None:
    for dtype in HALVES:
        linear_case(backend, 19, d_out, 40, dtype=dtype)


@over_backends
@pytest.mark.parametrize("n", (1, 15, 64, 127, 128, 129, 300))
def test_rows_around_a_tile(backend: str, n: int) -> None:
    linear_case(backend, n, 48, 24)


@over_backends
@pytest.mark.parametrize("depth", (8, 64, 72, 128, 136, 320))
def test_depths_around_a_step(backend: str, depth: int) -> None:
    linear_case(backend, 33, 40, depth)


@over_backends
@pytest.mark.parametrize("skip", (None, 0, 8, 64, 72))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("bias", (True, False))
def test_options(backend: str, skip: int | None, normalize: bool, bias: bool) -> None:
    for d_out in (40, 136):
        linear_case(backend, 21, d_out, 72, skip=skip, normalize=normalize, bias=bias, dtype=torch.float16)


@over_backends
@pytest.mark.parametrize("skip", (None, 24))
def test_the_bounds_reject_wrong_results(backend: str, skip: int | None) -> None:
    y, truth, absolute = linear_case(backend, 21, 40, 72, skip=skip)
    assert oracle.prove(y, truth, A=absolute, K=72 + (skip or 0)) >= 9


@pytest.mark.skipif("triton" not in BACKENDS, reason="no GPU and no interpreter")
@pytest.mark.parametrize("d_out", (5, 128, 200, 256))
def test_float32(d_out: int) -> None:
    """Products of float32 are as exact as float32 (six of bfloat16 parts)."""
    linear_case("triton", 21, d_out, 40, dtype=torch.float32, skip=24)


@over_backends
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, of the interpreter: inf * 0
def test_rows_without_a_direction_and_rows_beyond_range(backend: str) -> None:
    device = backends.device_of(backend)
    x = torch.randn(5, 16).bfloat16()
    x[0], x[1] = 0, 1e-20
    x[2] *= 1e20
    x[3, 3], x[4, 3] = torch.inf, torch.nan
    w, k = torch.randn(24, 16).bfloat16(), rows.kernels(backend)
    out, inverse = torch.empty(5, 24, dtype=x.dtype, device=device), torch.empty(5, device=device)
    k.linear(x.to(device), w.to(device), None, None, None, out, inverse)
    want = torch.nn.functional.normalize(x.double() @ w.double().t(), dim=1)
    assert torch.equal(out.isnan().cpu(), want.isnan())
    torch.testing.assert_close(out[:3].cpu().double(), want[:3], rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(inverse[:2].cpu(), torch.full((2,), 1e12))


@over_backends
def test_the_op_uses_it_and_never_makes_z(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No product of torch's in a forward pass of 16-bit tensors; widths that no tile holds go the other way."""
    products = []
    add = launcher.Kernels.add_product

    def counted(k: launcher.Kernels, *arguments: Tensor, fresh: bool) -> None:
        products.append(arguments)
        add(k, *arguments, fresh=fresh)

    monkeypatch.setattr(launcher.Kernels, "add_product", counted)
    device = backends.device_of(backend)
    for d_out, want in ((128, 0), (600, 1)):
        x, w = (torch.randn(n, 16, dtype=torch.bfloat16, device=device) for n in (9, d_out))
        products.clear()
        rows.door.projection(x, w, backend=backend)
        assert len(products) == want


@over_backends
def test_rows_that_start_anywhere(backend: str) -> None:
    """Rows that the kernel cannot copy are multiplied by torch, or by Triton; the result is the same."""
    device = backends.device_of(backend)
    wide, w = torch.randn(9, 41).bfloat16().to(device), torch.randn(24, 40).bfloat16().to(device)
    got = rows.door.projection(wide[:, 1:], w, backend=backend)
    torch.testing.assert_close(got, rows.door.projection(wide[:, 1:].clone(), w, backend=backend), rtol=2e-2, atol=1e-3)
