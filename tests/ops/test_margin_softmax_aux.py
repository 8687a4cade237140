"""The auxiliaries, each against its definition on the full float64 probabilities."""

import math
from typing import Any

import backends
import oracle
import pytest
import torch
from margin_softmax_cases import DTYPES, OP, VARIANTS, accuracy, call, loss_dtype, make, over_backends
from margin_softmax_reference import Truth, reference
from torch import Tensor

from pyelastic import margins as M
from pyelastic.ops.margin_softmax import MarginSoftmaxAux

# Margins that bend the target only, and the two that also bend negatives.
CHOSEN = ("NormFace", "CosFace", "ArcFace-none", "Combined", "MagFace", "Curricular")
CHOSEN += ("SVSoftmax-arc", "SVSoftmax-cos")


def definitions(truth: Truth, labels: Tensor, scale: float) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (value, A), from logits and cosines [B, C]; ignored rows hold what is promised."""
    valid = labels >= 0
    y = labels.where(valid, 0)[:, None]
    z, c = truth.logits, truth.cosines
    hot = torch.zeros_like(z, dtype=torch.bool).scatter(1, y, True)
    lse = z.logsumexp(1)
    p = torch.exp(z - lse[:, None])
    p_neg = p.masked_fill(hot, 0.0)
    q = p_neg.sum(1)
    el2n = (q.square() + p_neg.square().sum(1)).sqrt()  # ||p - onehot|| without forming 1 - p_y
    nll = torch.log1p(p_neg.sum(1) / p.gather(1, y)[:, 0])
    log_p = torch.where(hot, -nll[:, None], z - lse[:, None])
    entropy = -(p * log_p).sum(1)
    kappa = 1 + 2 * scale
    c_y = c.gather(1, y)[:, 0]
    negative = c.masked_fill(hot, -math.inf).amax(1)
    one = torch.ones_like(lse)
    A_entropy = kappa * (p * (log_p.abs() + entropy[:, None])).sum(1) + 2 * scale * q + 1e-3 * q
    named = {
        "loss": (truth.rows, truth.A_rows),
        "lse": (lse, kappa * one),
        "cos_target": (c_y, 2 * one),
        "margin": (truth.margins, truth.margins.abs()),
        "max_negative_cos": (negative, one),
        "el2n": (el2n, kappa * el2n),
        "entropy": (entropy, A_entropy),
    }
    return {k: (v.where(valid, 0.0), a.where(valid, 0.0)) for k, (v, a) in named.items()}


def ranks(truth: Truth, labels: Tensor, shift: float = 0.0) -> Tensor:
    """How many other classes have a cosine above the target's plus `shift`; -1 for ignored rows."""
    target = labels.clamp(min=0)[:, None]
    above = truth.cosines > truth.cosines.gather(1, target) + shift
    return torch.where(labels >= 0, above.scatter(1, target, False).sum(1), -1)


@over_backends
@pytest.mark.parametrize("variant", CHOSEN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_auxiliary(backend: str, variant: str, dtype: torch.dtype) -> None:
    case = make(dtype=dtype)
    case.labels[[5, 11]] = -100
    margin = VARIANTS[variant]
    truth = reference(case.embeddings, case.weight, case.labels, margin, reduction="none")
    (_, aux), *_ = call(backend, case, margin, return_aux=True)
    assert isinstance(aux, MarginSoftmaxAux)
    for name, (want, A) in definitions(truth, case.labels, 64.0).items():
        got = getattr(aux, name)
        grade = {"K": truth.K} if name in ("cos_target", "margin") else accuracy(backend, case, truth)
        oracle.check(got, want, A=A, dtype=loss_dtype(dtype), name=name, **grade)
    assert aux.rank.dtype == torch.int64
    # float16 operands move a cosine by at most 2^-10: a rank may count or miss the negatives that close.
    blur = 2.0**-10 if "tolerance" in accuracy(backend, case, truth) else 0.0
    low, high = (ranks(truth, case.labels, sign * blur) for sign in (1, -1))
    assert bool(((low <= aux.rank.cpu()) & (aux.rank.cpu() <= high)).all())


@over_backends
@pytest.mark.parametrize("scale", (8.0, 100.0))
def test_auxiliaries_with_subcenters_and_sampling(backend: str, scale: float) -> None:
    case, margin = make(subcenters=3), M.ArcFace()
    classes = torch.cat((case.labels, torch.arange(1, 37, 4))).unique()
    options: dict[str, Any] = {"subcenters": 3, "classes": classes, "scale": scale}
    truth = reference(case.embeddings, case.weight, case.labels, margin, reduction="none", **options)
    (_, aux), *_ = call(backend, case, margin, return_aux=True, **options)
    position = torch.searchsorted(classes, case.labels)
    for name, (want, A) in definitions(truth, position, scale).items():
        oracle.check(getattr(aux, name), want, A=A, K=truth.K, name=name)
    assert aux.rank.tolist() == ranks(truth, position).tolist()


@over_backends
def test_aux_loss_is_the_unreduced_loss(backend: str) -> None:
    """With every term of the loss switched on."""
    case = make()
    options = {
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "sample_weight": torch.linspace(0.5, 2, 13),
    }
    (total, aux), *_ = call(backend, case, M.MagFace(), return_aux=True, reduction="sum", **options)
    rows, *_ = call(backend, case, M.MagFace(), reduction="none", **options)
    torch.testing.assert_close(aux.loss, rows)  # entropy's pass may sum with a running maximum
    torch.testing.assert_close(total, rows.sum())


@over_backends
@pytest.mark.parametrize("name", ("loss", "lse", "cos_target"))
def test_differentiable_auxiliaries(backend: str, name: str) -> None:
    """Their gradients against autograd through the definition."""
    dtype = backends.widest(OP, backend)
    case = make(dtype=dtype)
    g = torch.linspace(-1, 2, 13, dtype=torch.float64)
    (_, aux), e, w = call(backend, case, M.CosFace(), return_aux=True)
    (getattr(aux, name) * g.to(e)).sum().backward()
    e2 = case.embeddings.double().requires_grad_()
    w2 = case.weight.double().requires_grad_()
    c = torch.nn.functional.normalize(e2) @ torch.nn.functional.normalize(w2).T
    hot = torch.nn.functional.one_hot(case.labels, 37).double()
    z = 64.0 * (c - 0.35 * hot)
    lse = z.logsumexp(1)
    by_name = {"loss": lse - (z * hot).sum(1), "lse": lse, "cos_target": (c * hot).sum(1)}
    (by_name[name] * g).sum().backward()
    for got, want in ((e.grad, e2.grad), (w.grad, w2.grad)):
        limit = 1e-10 if dtype == torch.float64 else 2e-5  # of the largest element
        assert float((got.cpu() - want).abs().max()) <= limit * float(want.abs().max())


@over_backends
def test_statistics_carry_no_gradient(backend: str) -> None:
    (_, aux), *_ = call(backend, make(), M.ElasticArcFace(), return_aux=True)
    for name in ("margin", "rank", "max_negative_cos", "el2n", "entropy"):
        assert not getattr(aux, name).requires_grad, name


@over_backends
def test_auxiliaries_do_not_change_the_loss(backend: str) -> None:
    """Asking for them must not move a bit of the loss or its gradients."""
    case = make()
    plain = call(backend, case, M.ArcFace())
    (loss, _), e, w = call(backend, case, M.ArcFace(), return_aux=("loss", "rank", "lse"))
    plain[0].backward()
    loss.backward()
    assert torch.equal(loss, plain[0])
    assert torch.equal(e.grad, plain[1].grad) and torch.equal(w.grad, plain[2].grad)


@over_backends
def test_one_class_has_no_negatives(backend: str) -> None:
    """p = 1: no loss, no EL2N, no entropy, and no negative cosine to report."""
    (loss, aux), e, w = call(backend, make(3, 1, 4), M.ArcFace(), return_aux=True)
    loss.backward()
    assert loss.item() == 0
    assert bool((e.grad == 0).all()) and bool((w.grad == 0).all())
    assert aux.rank.tolist() == [0, 0, 0]
    assert aux.max_negative_cos.tolist() == [-math.inf] * 3
    assert aux.el2n.tolist() == [0, 0, 0] and aux.entropy.tolist() == [0, 0, 0]


@over_backends
def test_top_k_from_the_rank(backend: str) -> None:
    """rank < k is top-k accuracy on the cosines before the margin."""
    case = make(200, 50, 8, seed=4)
    (_, aux), *_ = call(backend, case, M.ArcFace(), return_aux=("rank",))
    truth = reference(case.embeddings, case.weight, case.labels, M.ArcFace())
    for k in (1, 5):
        top = (truth.cosines.topk(k).indices == case.labels[:, None]).any(1)
        assert torch.equal(aux.rank.cpu() < k, top)
        assert 0 < int(top.sum()) < 200
