"""Losses and XTR scores on maxsim, against formulas on the similarity tensor written out here in float64."""

from typing import Any

import backends
import pytest
import torch
from maxsim_cases import Case, make, masks, over_backends, over_kernels
from torch import Tensor
from torch.nn import functional as F

import pyelastic

TEACHER = torch.linspace(-2.0, 2.0, 12, dtype=torch.float64)


def scores_of(q: Tensor, d: Tensor, o: dict[str, Any]) -> Tensor:
    """[Nq, Nd] or [Nq, K] by the whole similarity tensor."""
    if o.get("normalize"):
        q, d = F.normalize(q, dim=-1), F.normalize(d, dim=-1)
    s = torch.einsum("isd,ijtd->ijst", q, d) if d.ndim == 4 else torch.einsum("isd,jtd->ijst", q, d)
    there = torch.ones(s.shape[1:2] + s.shape[3:]) if "document_mask" not in o else o["document_mask"]
    there = there[:, :, None] if there.ndim == 3 else there[None, :, None]
    m = torch.where(there.any(-1), torch.where(there != 0, s, -torch.inf).max(-1).values, 0.0)
    w = o["query_mask"].to(s.dtype) if "query_mask" in o else torch.ones(q.shape[:2], dtype=s.dtype)
    if o.get("reduction") == "mean":
        w = w / w.sum(1, keepdim=True).clamp(min=1)
    return (m * w[:, None]).sum(-1)


def info_nce(scores: Tensor) -> Tensor:
    return F.cross_entropy(scores / 2.0, torch.tensor([0, 1, 2]) * (scores.shape[1] // 3), reduction="none")


def kl(scores: Tensor) -> Tensor:
    teacher = F.log_softmax(TEACHER[: scores.numel()].view_as(scores) / 0.5, 1)
    return F.kl_div(F.log_softmax(scores / 2.0, 1), teacher, log_target=True, reduction="none").sum(1)


def margin_mse(scores: Tensor) -> Tensor:
    teacher = TEACHER[: scores.numel()].view_as(scores)
    want = teacher[:, :1] - teacher[:, 1:]
    return F.mse_loss(scores[:, :1] - scores[:, 1:], want, reduction="none").mean(1)


def ours(name: str, q: Tensor, d: Tensor, columns: int, **o: Any) -> Tensor:
    teacher = TEACHER[: 3 * columns].view(3, columns).to(q.device)
    if name == "info_nce":
        labels = None if columns % 3 == 0 or d.ndim == 4 else torch.tensor([0, 1, 2], device=q.device)
        loss: Tensor = pyelastic.maxsim_info_nce(q, d, temperature=2.0, labels=labels, **o)
    elif name == "kl":
        loss = pyelastic.maxsim_kl_distill(q, d, teacher, temperature=2.0, teacher_temperature=0.5, **o)
    else:
        loss = pyelastic.maxsim_margin_mse(q, d, teacher, **o)
    return loss


FORMULAS = {"info_nce": info_nce, "kl": kl, "margin_mse": margin_mse}


def wanted(name: str, case: Case, weigh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, d = (x.detach().double().requires_grad_() for x in (case.queries, case.documents))
    scores = scores_of(q, d, case.options)
    if d.ndim == 4 and name == "info_nce":
        rows = F.cross_entropy(scores / 2.0, torch.zeros(3).long(), reduction="none")
    else:
        rows = FORMULAS[name](scores)
    (rows * weigh).sum().backward()
    return rows.detach(), q.grad, d.grad


@over_backends
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("layout", ("cross", "grouped"))
@pytest.mark.parametrize("options", ({}, {"normalize": True, "reduction": "mean"}), ids=("plain", "mean"))
def test_loss(backend: str, name: str, layout: str, options: dict[str, Any]) -> None:
    """Rows and gradients, with an upstream gradient per row; float64 where the backend has it."""
    double = "float64" in pyelastic._dispatch.registry()["maxsim"][backend].dtypes
    case = masks(make(layout, nd=4, dtype=torch.float64 if double else torch.float32)).having(**options)
    weigh = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    rows, grad_q, grad_d = wanted(name, case, weigh)
    device = backends.device_of(backend)
    q, d = (x.detach().to(device).requires_grad_() for x in (case.queries, case.documents))
    told = backends.to_device(backend, case.options)
    columns = d.shape[1] if d.ndim == 4 else d.shape[0]
    loss = ours(name, q, d, columns, loss_reduction="none", backend=backend, **told)
    loss.backward(weigh.to(loss))
    near = {"rtol": 1e-9, "atol": 1e-11} if double else {"rtol": 2e-4, "atol": 2e-4}
    for got, want in ((loss, rows), (q.grad, grad_q), (d.grad, grad_d)):
        torch.testing.assert_close(got.detach().cpu().double(), want, **near)
    for how, reduce in (("mean", torch.mean), ("sum", torch.sum)):
        got = ours(name, q, d, columns, loss_reduction=how, backend=backend, **told)
        torch.testing.assert_close(got.detach().cpu().double(), reduce(rows), **near)


@over_backends
def test_prefixes_are_averaged(backend: str) -> None:
    """Matryoshka: the mean over prefixes of each one's loss."""
    case = make(nd=3)
    device = backends.device_of(backend)
    q, d = (x.to(device) for x in (case.queries, case.documents))
    each = [pyelastic.maxsim_info_nce(q[..., :n], d[..., :n], normalize=True, backend=backend) for n in (5, 20)]
    both = pyelastic.maxsim_info_nce(q, d, normalize=True, dims=(5, 20), backend=backend)
    torch.testing.assert_close(both, torch.stack(each).mean(), rtol=1e-5, atol=1e-5)


@over_kernels
@pytest.mark.parametrize("name", FORMULAS)
def test_filter(backend: str, name: str) -> None:
    """Exactly the entries below the threshold are dropped: the gradient is that of the rest."""
    case = make(nd=4)
    q, d = (x.to(backends.device_of(backend)).requires_grad_() for x in (case.queries, case.documents))
    scores = pyelastic.maxsim(q, d, backend="eager" if backend == "cpu" else backend)
    kept = scores.detach().cpu().double().requires_grad_()
    FORMULAS[name](kept).mean().backward()
    g = kept.grad.float()
    g[g.abs() < 0.3 * g.abs().amax(1, keepdim=True)] = 0.0
    assert 0 < int((g == 0).sum()) < g.numel()
    want = torch.autograd.grad(scores, (q, d), g.to(scores.device))
    got = torch.autograd.grad(ours(name, q, d, 4, filter_eps=0.3, backend=backend), (q, d))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@over_backends
def test_learned_weights_get_gradients(backend: str) -> None:
    case = make(nd=3)
    q, d = (x.to(backends.device_of(backend)) for x in (case.queries, case.documents))
    w = torch.full((3, 7), 0.7, device=q.device, requires_grad=True)
    pyelastic.maxsim_info_nce(q, d, token_weights=w, temperature=5.0, backend=backend).backward()
    by_hand = torch.full((3, 7), 0.7, dtype=torch.float64, requires_grad=True)
    m = torch.einsum("isd,jtd->ijst", case.queries.double(), case.documents.double()).max(-1).values
    F.cross_entropy((m * by_hand[:, None]).sum(-1) / 5.0, torch.arange(3)).backward()
    torch.testing.assert_close(w.grad.cpu().double(), by_hand.grad, rtol=1e-4, atol=1e-5)


def xtr(q: Tensor, d: Tensor, k: int) -> Tensor:
    """PyLate's XTRScores as described, on the whole tensor; negative maxima count as 0 (see maxsim_xtr)."""
    s = torch.einsum("isd,jtd->isjt", q, d)
    flat = s.flatten(2)
    best = flat.topk(min(k, flat.shape[2]), -1)
    only = torch.zeros_like(flat).scatter(2, best.indices, best.values).view_as(s)
    m = only.max(-1).values.clamp(min=0)  # [Nq, Lq, Nd]
    z = (m > 0).sum(1).to(s.dtype).clamp(min=1e-3)
    return m.sum(1) / z


@over_backends
@pytest.mark.parametrize("k", (1, 5, 20, 1000))
def test_xtr(backend: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the formula on the whole tensor, with the thresholds found in several chunks."""
    from pyelastic.ops import maxsim_losses

    monkeypatch.setattr(maxsim_losses, "XTR_BYTES", 1)  # chunks of k tokens
    case = make(nd=4)
    case.queries, case.documents = F.normalize(case.queries, dim=-1), F.normalize(case.documents, dim=-1)
    device = backends.device_of(backend)
    q2, d2 = (x.double().requires_grad_() for x in (case.queries, case.documents))
    q, d = (x.to(device).requires_grad_() for x in (case.queries, case.documents))
    want = xtr(q2, d2, k)
    got = pyelastic.maxsim_xtr(q, d, k=k, backend=backend)
    (got * torch.arange(12.0, device=device).view(3, 4)).sum().backward()
    (want * torch.arange(12.0).view(3, 4)).sum().backward()
    for a, b in ((got, want), (q.grad, q2.grad), (d.grad, d2.grad)):
        torch.testing.assert_close(a.detach().cpu().double(), b.detach(), rtol=1e-4, atol=1e-5)
    assert k > 1 or (want == 0).any()


@over_backends
def test_xtr_of_masked_documents(backend: str) -> None:
    """Masked tokens take no place among the k best."""
    case = make(nd=4)
    mask = torch.ones(4, 19, dtype=torch.bool)
    mask[:, 10:] = False
    device = backends.device_of(backend)
    q, d = case.queries.to(device), case.documents.to(device)
    got = pyelastic.maxsim_xtr(q, d, k=6, document_mask=mask.to(device), backend=backend)
    want = pyelastic.maxsim_xtr(q, d[:, :10].contiguous(), k=6, backend=backend)
    torch.testing.assert_close(got, want)
