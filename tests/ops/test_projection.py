"""projection against its formulas: options, dtypes, sizes, zero and non-finite rows, the tolerance proof."""

import backends
import oracle
import pytest
import torch
from layouts import pairwise
from projection_cases import (
    BACKENDS,
    DTYPES,
    HALF,
    SKIPS,
    call,
    compare,
    grade,
    gradients_of,
    make,
    over_backends,
    over_kernels,
    reference,
    upstream_of,
)
from torch.nn import functional as F

from pyelastic.ops import _projection as launcher


@over_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("normalize", (False, True))
def test_options(backend: str, dtype: torch.dtype, skip: str, bias: bool, normalize: bool) -> None:
    compare(backend, make(dtype=dtype, skip=skip, bias=bias, normalize=normalize))


@over_backends
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize(
    ("x", "parameters", "r"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("normalize", (False, True))
def test_mixed_dtypes(
    backend: str, skip: str, x: torch.dtype, parameters: torch.dtype, r: torch.dtype, normalize: bool
) -> None:
    """Parameters and residual in dtypes of their own, and so are their gradients."""
    compare(backend, make(dtype=x, parameters=parameters, r_dtype=r, skip=skip, normalize=normalize))


@over_backends
@pytest.mark.parametrize(
    ("rows", "d_in", "d_out", "skip", "dtype"),
    pairwise(
        rows=(0, 1, 2, 7, 8, 9, 33, 65),
        d_in=(1, 3, 16, 20),
        d_out=(1, 2, 7, 8, 9, 33),
        skip=SKIPS,
        dtype=(torch.float32, torch.float64, torch.bfloat16),
    ),
)
def test_sizes(
    backend: str, rows: int, d_in: int, d_out: int, skip: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing, one, odd sizes and those around a chunk of 8 rows; threads take 32 rows, vectors 8 elements."""
    monkeypatch.setattr(launcher, "CPU_ROWS", 8)
    monkeypatch.setattr(launcher, "GPU_ROWS", 8)
    compare(backend, make(rows, d_in=d_in, d_out=d_out, skip=skip, d_r=1 + rows % 5, dtype=dtype))


@over_backends
@pytest.mark.parametrize("depth", (255, 256, 257, 513))
def test_depth_of_the_products(backend: str, depth: int) -> None:
    """Sums around the slices of 256: d_in and d_r forward, d_out and rows backward."""
    compare(backend, make(3, d_in=depth, d_out=5, d_r=depth, skip="projected"))
    compare(backend, make(2, d_in=3, d_out=depth, skip="identity"))
    compare(backend, make(depth, d_in=2, d_out=3, d_r=2, skip="projected"))


@over_backends
@pytest.mark.parametrize("lead", ((), (1,), (2, 3), (2, 1, 3), (2, 0), (0, 4)), ids=str)
@pytest.mark.parametrize("skip", SKIPS)
def test_leading_dimensions(backend: str, lead: tuple[int, ...], skip: str) -> None:
    case = make(*lead, skip=skip)
    if not lead:
        case = case.having(x=case.x[0], residual=None if case.residual is None else case.residual[0])
    compare(backend, case)


@over_backends
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_zero_rows(backend: str, dtype: torch.dtype) -> None:
    """A zero row stays zero, and its gradient is g / 1e-12, as that of F.normalize."""
    case = make(dtype=dtype, bias=False, skip="projected")
    assert case.residual is not None and case.residual_weight is not None
    for row in (0, 5, 12):
        case.x[row] = case.residual[row] = 0
    truth = compare(backend, case)
    assert not truth.y[5].any() and truth.grads["x"][5].abs().max() > 1e9
    rows = [t.double().requires_grad_() for t in (case.x, case.weight, case.residual, case.residual_weight)]
    F.normalize(rows[0] @ rows[1].T + rows[2] @ rows[3].T, dim=-1).backward(upstream_of(case).double())
    assert rows[0].grad is not None
    torch.testing.assert_close(truth.grads["x"], rows[0].grad, rtol=1e-9, atol=1e-9)


@over_backends
@pytest.mark.parametrize("length", (1e-15, 1e-13, 1e-9, 1e9, 1e15))
def test_short_and_long_rows(backend: str, length: float) -> None:
    """Norms on both sides of the clamp, and squares near the ends of float32's range."""
    case = make(bias=False)
    compare(backend, case.having(x=case.x * length))


def test_rows_whose_squares_overflow() -> None:
    """The CPU kernel sums squares in float64."""
    backend = backends.require("cpu")
    case = make(bias=False)
    compare(backend, case.having(x=case.x * 1e30))


@over_backends
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("normalize", (False, True))
def test_not_finite(backend: str, value: float, normalize: bool) -> None:
    """A row's NaN or Inf reaches that row of y and of dx, the parameters' gradients, and no other row."""
    case = make(normalize=normalize)
    case.x[4, 2] = value
    upstream = upstream_of(case)
    y, leaves = call(backend, case)
    y.backward(upstream.to(y.device))
    truth = reference(case, upstream)
    y, grads = y.detach().cpu(), {name: g.cpu() for name, g in gradients_of(leaves).items()}
    assert torch.equal(y.isfinite(), truth.y.isfinite()) and torch.equal(y.isnan(), truth.y.isnan())
    assert not y[4].isfinite().all() and y[torch.arange(13) != 4].isfinite().all()
    for name, grad in grads.items():
        assert torch.equal(grad.isfinite(), truth.grads[name].isfinite()), name
    assert not grads["weight"].isfinite().any(1 if normalize else 0).all()
    assert grads["x"][torch.arange(13) != 4].isfinite().all()


@over_backends
@pytest.mark.parametrize("where", ("weight", "bias", "residual", "gradient"))
def test_nan_of_other_inputs(backend: str, where: str) -> None:
    case = make(skip="identity")
    upstream = upstream_of(case)
    place = upstream if where == "gradient" else case.tensors[where]
    place[(2,) * place.ndim] = torch.nan
    y, leaves = call(backend, case)
    y.backward(upstream.to(y.device))
    truth = reference(case, upstream)
    assert torch.equal(y.detach().cpu().isfinite(), truth.y.isfinite())
    for name, grad in gradients_of(leaves).items():
        assert torch.equal(grad.cpu().isfinite(), truth.grads[name].isfinite()), name
        assert not grad.isfinite().all(), name


@over_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", (False, True))
def test_tolerance_proof(backend: str, dtype: torch.dtype, normalize: bool) -> None:
    """The bound that accepts this backend's result rejects every planted wrong one."""
    # Of seed 0 an element rounded to bfloat16 is so near the edge that 1 % of it goes unnoticed.
    case = make(17, d_in=24, d_out=12, skip="projected", dtype=dtype, normalize=normalize, seed=1)
    # A part that all rows share: sums over rows that cancel say little about 1 % in 16 bits.
    upstream = upstream_of(case) + torch.linspace(-3.0, 3.0, 12).to(dtype)
    truth = reference(case, upstream)
    y, leaves = call(backend, case)
    y.backward(upstream.to(y.device))
    dropped = {
        "bias dropped": case.having(bias=None),
        "residual dropped": case.having(residual=None, residual_weight=None),
        "last row of another bias": case.having(bias=case.tensors["bias"].roll(1)),
        "normalisation": case.having(normalize=not normalize),
    }
    wrong = {name: reference(other, upstream) for name, other in dropped.items()}
    check = {"A": truth.A_y, "K": truth.K, "acc": oracle.accumulator(dtype)}
    killed = oracle.prove(y.detach(), truth.y, name="y", also={n: t.y for n, t in wrong.items()}, **check)
    inverse = 1 / reference(case.having(normalize=False), upstream).y.norm(dim=1, keepdim=True)
    plain = reference(case.having(normalize=False), upstream.double() * (inverse if normalize else 0.5))
    for name, grad in gradients_of(leaves).items():
        want = truth.grads[name]
        also = {"the term along y dropped": plain.grads[name], "a row dropped": _without_a_row(case, upstream, name)}
        told = grade(backend, case, truth, name)
        killed += oracle.prove(grad, want, name=name, also=also, **told)
    assert killed >= 13 + 4 * 11 + 7


def _without_a_row(case, upstream, name):  # type: ignore[no-untyped-def]
    """The gradient when the backward skips the last row, as one that stops short of a chunk's end."""
    short = upstream.clone()
    short[-1] = 0
    return reference(case, short).grads[name]


@over_kernels
def test_half_operands_bound_is_needed(backend: str) -> None:
    """y rounded to 16 bits shows in the gradient: if it no longer did, the wider bound would have to go."""
    backends.skip_unsupported("projection", backend, torch.bfloat16)
    case = make(64, d_out=16, dtype=torch.bfloat16, parameters=torch.float32)
    truth = reference(case, upstream_of(case))
    y, leaves = call(backend, case)
    y.backward(upstream_of(case).to(y.device))
    grad = leaves["weight"].grad
    assert grad is not None
    with pytest.raises(AssertionError):
        oracle.check(grad, truth.grads["weight"], A=truth.A["weight"], K=truth.K)


def test_cpu_and_eager_are_here() -> None:
    """A generated parametrization that lost a backend would pass silently."""
    assert {"eager", "cpu"} <= set(BACKENDS) and len(HALF) == 2
