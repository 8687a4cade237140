"""Where the textbook formulas lose their digits: poles, angles beyond pi, zero and sure rows."""

import math

import oracle
import pytest
import torch
from margin_softmax_cases import (
    BACKENDS,
    VARIANTS,
    Case,
    call,
    compare,
    make,
    over_backends,
    over_variants,
)
from margin_softmax_reference import reference
from torch.autograd import gradcheck, gradgradcheck

import pyelastic
from pyelastic import margins as M

FLOATS = pytest.mark.parametrize("dtype", (torch.float32, torch.float64))


def axis_case(sign: float, dtype: torch.dtype) -> Case:
    """Row 0 exactly along (sign) its own class axis, row 1 exactly along another class."""
    weight = torch.tensor([[2.0, 0, 0], [0, 3.0, 0], [0, 0.6, 0.8], [1, 1, 1]], dtype=dtype)
    e = torch.tensor([[5.0 * sign, 0, 0], [0, 6.0 * sign, 0]], dtype=dtype)
    return Case(e, weight, torch.tensor([0, 2]))


@over_backends
@over_variants
@pytest.mark.parametrize("sign", (1.0, -1.0))
@FLOATS
def test_finite_where_a_cosine_is_one(backend: str, variant: str, sign: float, dtype: torch.dtype) -> None:
    (loss, aux), e, w = call(backend, axis_case(sign, dtype), VARIANTS[variant], return_aux=True)
    (loss + aux.cos_target.sum() + aux.lse.sum()).backward()
    for x in (loss, e.grad, w.grad, *aux):
        assert bool(x.isfinite().all())


@over_backends
@pytest.mark.parametrize("sign", (1.0, -1.0))
@FLOATS
def test_value_and_gradient_at_a_pole(backend: str, sign: float, dtype: torch.dtype) -> None:
    """At theta = 0 or pi the tangent has no direction: the target adds nothing to the gradient."""
    case, m, s = axis_case(sign, dtype), 0.5, 8.0
    loss, e, w = call(backend, case, M.ArcFace(m=m), scale=s, reduction="none")
    loss[0].backward()
    w_hat = torch.nn.functional.normalize(case.weight.double())
    e_hat = torch.tensor([sign, 0.0, 0.0], dtype=torch.float64)
    c = w_hat @ e_hat
    theta = 0.0 if sign > 0 else math.pi
    z = s * c
    z[0] = s * math.cos(theta + m)
    p = z.softmax(0)
    want = -p[0].log()
    d_hat = s * (p[1:, None] * w_hat[1:]).sum(0)
    d_e = (d_hat - (d_hat @ e_hat) * e_hat) / 5.0
    one = torch.ones_like(d_e)
    oracle.check(loss[0], want, A=10 * s * one[0], K=3, name="loss")
    oracle.check(e.grad[0], d_e, A=10 * s * one, K=3, name="dE")
    d_w = s * p[1:, None] * (e_hat - c[1:, None] * w_hat[1:]) / case.weight[1:].double().norm(dim=1, keepdim=True)
    oracle.check(w.grad[1:], d_w, A=10 * s * torch.ones_like(d_w), K=3, name="dW")


@over_backends
@pytest.mark.parametrize("theta", (1e-4, 1e-3, 1e-2, math.pi - 1e-3))
def test_small_angles(backend: str, theta: float) -> None:
    """float32 acos is 4 % off at 1e-3; the bound here allows one rounding of the unit vectors.

    (Of float32 only: the reference's own acos is no truth for float64.)
    """
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(9, 6, generator=random, dtype=torch.float64)
    labels = torch.arange(9)
    w_hat = torch.nn.functional.normalize(weight)
    side = torch.randn(9, 6, generator=random, dtype=torch.float64)
    side = torch.nn.functional.normalize(side - (side * w_hat).sum(1, keepdim=True) * w_hat)
    e = 3 * (math.cos(theta) * w_hat + math.sin(theta) * side)
    case = Case(e.float(), weight.float(), labels)
    compare(backend, case, M.ArcFace(m=0.9), scale=4.0)
    (_, aux), *_ = call(backend, case, M.ArcFace(), return_aux=True)
    want = reference(case.embeddings, case.weight, labels, M.ArcFace()).cosines.diagonal()
    oracle.check(aux.cos_target, want, A=torch.ones(9, dtype=torch.float64), K=6)


def test_the_generic_case_goes_beyond_pi() -> None:
    """Otherwise the guards would be told apart by no test."""
    case = make()
    losses = {
        guard: reference(case.embeddings, case.weight, case.labels, M.ArcFace(guard=guard)).loss for guard in M.GUARDS
    }
    assert len({round(float(v), 6) for v in losses.values()}) == len(M.GUARDS)


@over_backends
def test_the_sign_flip_beyond_pi_is_the_formulas(backend: str) -> None:
    """guard="none" pushes a sample beyond pi - m away from its centre, "clip" not at all."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    theta = 3.0
    e = torch.tensor([[math.cos(theta), -math.sin(theta)]])
    case = Case(e, weight, torch.tensor([0]))
    slopes = {}
    for guard in ("none", "clip", "hard"):
        loss, leaf, _ = call(backend, case, M.ArcFace(guard=guard), scale=1.0)
        full = torch.autograd.grad(loss, leaf)[0]
        slopes[guard] = float(full @ torch.tensor([math.sin(theta), math.cos(theta)]))
        compare(backend, case, M.ArcFace(guard=guard), scale=1.0)
    assert len({round(v, 4) for v in slopes.values()}) == 3


@over_backends
@over_variants
@FLOATS
@pytest.mark.parametrize("size", (0.0, 1e-13))
def test_zero_rows(backend: str, variant: str, dtype: torch.dtype, size: float) -> None:
    """A row without direction has cosine 0 with everything and receives no gradient."""
    case = make(dtype=dtype)
    case.embeddings[2] *= size / case.embeddings[2].norm()
    case.weight[int(case.labels[4])] *= size / case.weight[int(case.labels[4])].norm()
    unused = next(j for j in range(37) if j not in case.labels.tolist())
    case.weight[unused] = 0
    options = {}
    if variant.startswith("Elastic"):
        options["margins"] = torch.linspace(0.1, 0.9, 13, dtype=torch.float64).to(dtype)
    compare(backend, case, VARIANTS[variant], **options)
    loss, e, w = call(backend, case, VARIANTS[variant], **options)
    loss.backward()
    assert bool((e.grad[2] == 0).all()) and bool((w.grad[unused] == 0).all())
    assert bool((w.grad[case.labels[4]] == 0).all())


@over_backends
@pytest.mark.parametrize("power", (-9, 18, 25))
def test_extreme_lengths(backend: str, power: int) -> None:
    """float32 rows whose squares leave the range of float32 still have a direction."""
    case = make()
    case.embeddings *= 10.0**power
    compare(backend, case, M.ArcFace())


@over_backends
def test_confident_rows_keep_their_loss(backend: str) -> None:
    """float32 lse - z_y is 0 below 6e-8; the softplus form keeps the digits."""
    weight = torch.eye(8)
    case = Case(torch.eye(8) * 3 + 0.01, weight, torch.arange(8))
    truth = compare(backend, case, M.CosFace(m=0.5), reduction="none")
    assert bool((truth.loss < 1e-12).all())
    loss, *_ = call(backend, case, M.CosFace(m=0.5), reduction="none")
    assert bool((loss > 0).all())


@over_backends
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("scale", (40.0, 42.0, 50.0, 64.0))
def test_a_sure_row_does_not_spoil_the_others(backend: str, dtype: torch.dtype, scale: float) -> None:
    """Its gradient is 1e-33 down to 0: on the way to a scaled half precision nothing may overflow."""
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.01]], dtype=dtype)
    e = torch.tensor([[2.0, 0.0], [0.5, 1.0]], dtype=dtype)
    case = Case(e, weight, torch.tensor([0, 0]))
    for alone in (False, True):
        case = Case(e[:1], weight, torch.tensor([0])) if alone else case
        loss, x, w = call(backend, case, M.NormFace(), scale=scale, label_smoothing=0.0)
        loss.backward()
        assert bool(x.grad.isfinite().all()) and bool(w.grad.isfinite().all())
        if not alone and dtype == torch.float32:
            compare(backend, case, M.NormFace(), scale=scale)


@over_backends
@pytest.mark.parametrize("poison", (math.nan, math.inf, -math.inf))
def test_nonfinite_rows_stay_in_their_row(backend: str, poison: float) -> None:
    case = make()
    case.embeddings[3, 7] = poison
    (loss, aux), e, _ = call(backend, case, M.ArcFace(), reduction="none", return_aux=True)
    bad = torch.arange(13) == 3
    assert torch.equal(loss.isnan().cpu(), bad)
    assert torch.equal(aux.cos_target.isnan().cpu(), bad)
    torch.autograd.backward(loss, torch.ones_like(loss))
    assert torch.equal(e.grad.isnan().any(1).cpu(), bad)


@over_backends
@pytest.mark.parametrize("poison", (math.nan, math.inf))
def test_nonfinite_class_reaches_every_loss(backend: str, poison: float) -> None:
    """A broken class row is in every denominator; no maximum may drop it."""
    for scale in (64.0, 128.0):
        case = make()
        case.weight[20, 3] = poison
        (loss, aux), *_ = call(backend, case, M.ArcFace(), reduction="none", scale=scale, return_aux=True)
        assert bool(loss.isnan().all())
        not_target = (case.labels != 20).to(loss.device)
        assert bool(aux.max_negative_cos[not_target].isnan().all())


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])
@pytest.mark.parametrize("sampled", (False, True))
def test_double_backward_is_refused(backend: str, sampled: bool) -> None:
    """once_differentiable stays silent for a gradient penalty; a penalty of 0 gradient is a bug."""
    classes = torch.arange(37) if sampled else None
    loss, e, w = call(backend, make(), M.ArcFace(), classes=classes)
    for leaf in (e, w):
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward needs backend='eager'"):
            grad.square().sum().backward()
    loss, e, _ = call(backend, make(), M.ArcFace(), grad=(True, False))
    (grad,) = torch.autograd.grad(loss, e, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        (loss + grad.square().sum()).backward()


def small() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    case = make(4, 5, 3, dtype=torch.float64, seed=6)
    return case.embeddings.requires_grad_(), case.weight.requires_grad_(), case.labels


@pytest.mark.parametrize("margin", (M.ArcFace(), M.MagFace(l_a=4, u_a=9, guard="none")))
def test_eager_differentiates_twice(margin: M.Margin) -> None:
    e, w, y = small()

    def loss(e: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return pyelastic.margin_softmax(e, w, y, margin=margin, scale=3.0, backend="eager")

    assert gradcheck(loss, (e, w))
    assert gradgradcheck(loss, (e, w))
