"""Margin softmax from the papers' formulas, in float64, over the full B x C matrix.

Written against the formulas only (acos, cos, log-sum-exp, autograd), never by calling pyelastic: a
margin object is read as data, its methods are not used. It also returns the sums of absolute
products A that the oracle's bound needs.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
ZERO_NORM = 1e-12
# A probability below the smallest normal float32 may become 0; in units of float32's roundoff.
FLUSHED = 2.0**-126 / 2.0**-24
# In float16 it is stored times 2^14, and below 2^-14 with steps of 2^-24; in units of float16's roundoff.
HALF_FLUSHED = 2.0**-25 * 2.0**-14 / 2.0**-11


@dataclass
class Truth:
    """float64 on the CPU. The A_* belong to the oracle's bound; rows are the unreduced losses."""

    loss: Tensor
    rows: Tensor
    grad_e: Tensor
    grad_w: Tensor
    A_loss: Tensor
    A_rows: Tensor
    A_e: Tensor
    A_w: Tensor
    K: int
    cosines: Tensor  # [B, C] before the margin
    logits: Tensor  # [B, C] after margin and scale
    margins: Tensor  # [B] as used
    no_softmax_e: Tensor  # gradients with the negatives' term dropped, for the tolerance proof
    no_target_e: Tensor  # ... and with the target's


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x / |x|, |x|); a row without direction becomes zero and gets no gradient."""
    norm = x.square().sum(-1).clamp(min=1e-300).sqrt()
    short = norm <= ZERO_NORM
    return torch.where(short[..., None], 0.0, x / norm.where(~short, 1.0)[..., None]), norm


def _angular(c: Tensor, hot: Tensor, m1: float, m: Tensor, guard: str) -> Tensor:
    """cos(m1 theta + m) in the target column, c elsewhere."""
    inner = torch.where(hot, c, 0.0).clamp(-1, 1)  # acos has no gradient at 1: keep the others out
    angle = m1 * torch.acos(inner) + m[:, None]
    phi = torch.cos(angle)
    if guard == "hard":
        phi = torch.where(angle > math.pi, c - (m * m.sin())[:, None], phi)
    elif guard == "easy":
        phi = torch.where(c > 0, phi, c)
    elif guard == "clip":
        phi = torch.cos(angle.clamp(0, math.pi))
    return torch.where(hot, phi, c)


def with_margin(
    margin: Any, c: Tensor, hot: Tensor, m: Tensor, norms: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(cosines after the margin [B, C], margins as used [B], penalty [B])."""
    kind = type(margin).__name__
    none = torch.zeros_like(m)
    theta_y = torch.acos(torch.where(hot, c, 0.0).sum(1).clamp(-1, 1))[:, None]
    if kind == "NormFace":
        return c, none, none
    if kind in ("CosFace", "ElasticCosFace"):
        return c - m[:, None] * hot, m, none
    if kind in ("ArcFace", "ElasticArcFace", "Combined"):
        m1, m3 = getattr(margin, "m1", 1.0), getattr(margin, "m3", 0.0)
        phi = _angular(c, hot, m1, m, margin.guard) - m3 * hot.double()
        return (phi if margin.grad == "exact" else c + (phi - c).detach()), m, none
    if kind == "AdaFace":
        n = norms.detach().clamp(1e-3, 100)
        used = n[valid]
        mu, sd = used.mean(), used.std() if len(used) > 1 else torch.tensor(0.0)
        mu = mu if margin.norm_mean is None else margin.norm_mean
        sd = sd if margin.norm_std is None else margin.norm_std
        r = (margin.h * (n - mu) / (sd + margin.eps)).clamp(-1, 1)
        inner = c.clamp(-1 + margin.eps, 1 - margin.eps)
        angle = (torch.acos(inner) - (m * r)[:, None]).clamp(margin.eps, math.pi - margin.eps)
        return torch.where(hot, angle.cos() - (m + m * r)[:, None], c), m, none
    if kind == "MagFace":
        a = norms.clamp(margin.l_a, margin.u_a)
        slope = (margin.u_m - margin.l_m) / (margin.u_a - margin.l_a)
        drawn = margin.l_m + slope * (a - margin.l_a)
        penalty = margin.lambda_g * (a / margin.u_a**2 + 1 / a)
        return _angular(c, hot, 1.0, drawn, margin.guard), drawn.detach(), penalty
    if kind == "CurricularFace":
        target = _angular(c, hot, 1.0, m, "hard")
        hard = (c > torch.cos(theta_y + m[:, None])) & ~hot
        return torch.where(hard, c * (margin.t + c), target), m, none
    if kind == "SVSoftmax":
        target = c - m[:, None] * hot if margin.base == "cos" else _angular(c, hot, 1, m, "none")
        phi = torch.where(hot, target, 0.0).sum(1, keepdim=True)
        hard = (c > phi) & ~hot
        return torch.where(hard, (margin.t + 1) * c + margin.t, target), m, none
    raise NotImplementedError(f"no reference for {kind}")


def mean_margin(margin: Any) -> float:
    return float(getattr(margin, "m2", getattr(margin, "m", 0.0)))


def cross_entropy(z: Tensor, hot: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """(loss, log-sum-exp) per row without the cancellation of lse - z_y.

    F.cross_entropy is off by 1e-14 on a confident row, all of whose loss may be smaller; a test
    shows that both agree to 1e-13.
    """
    z_y = torch.where(hot, z, 0.0).sum(1)
    lse_neg = z.masked_fill(hot, -math.inf).logsumexp(1)
    gap = lse_neg - z_y
    loss = gap.clamp(min=0) + torch.log1p(torch.exp(-gap.abs()))
    lse = z_y + loss
    # (1 - eps) (lse - z_y) + eps (lse - mean z) with the common lse - z_y taken out
    return loss + smoothing * (z_y - z.mean(1)), lse


def reference(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Any,
    *,
    scale: float = 64.0,
    margins: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = IGNORED,
    sample_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    subcenters: int = 1,
    classes: Tensor | None = None,
    half: bool = False,
    upstream: Tensor | None = None,
) -> Truth:
    """The truth for one call. `labels` are class ids; only `classes` take part where given.

    half: the A_* are for a kernel that keeps probabilities in float16.
    """
    e = embeddings.detach().to("cpu", torch.float64).requires_grad_()
    full = weight.detach().to("cpu", torch.float64).requires_grad_()
    y = labels.cpu().long()
    w = full.unflatten(0, (-1, subcenters))
    if classes is not None:
        ids = classes.cpu().tolist()
        y = torch.tensor([ids.index(v) if v in ids else v for v in y.tolist()], dtype=torch.long)
        y = torch.where(labels.cpu() == ignore_index, ignore_index, y)
        w = w[classes.cpu()]
    valid = y != ignore_index
    n = int(valid.sum())
    e_hat, norms = unit_rows(torch.where(valid[:, None], e, 0.0))
    norms = torch.where(valid, norms, 1.0)
    w_hat, w_norm = unit_rows(w)
    every = torch.einsum("bd,ckd->bck", e_hat, w_hat)  # [B, C, K]
    c = every.max(-1).values
    hot = F.one_hot(y.where(valid, 0), c.shape[1]).bool() & valid[:, None]
    m = torch.full((len(y),), mean_margin(margin), dtype=torch.float64)
    m = m if margins is None else margins.detach().to("cpu", torch.float64)
    bent, used, penalty = with_margin(margin, c, hot, m, norms, valid)
    z = scale * bent
    loss, lse = cross_entropy(z, hot, label_smoothing)
    rows = loss + z_loss * lse.square() + penalty
    rows = torch.where(valid, rows, 0.0)
    if sample_weight is not None:
        rows = rows * sample_weight.detach().to("cpu", torch.float64)
    reduced = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / max(n, 1)}[reduction]
    g = torch.ones_like(reduced) if upstream is None else upstream.to("cpu", torch.float64)

    def grad(of: Tensor, to: Any, by: Tensor | None = None) -> Any:
        out = torch.autograd.grad(of, to, by, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(t) if o is None else o for o, t in zip(out, to, strict=True)]

    grad_e, grad_w, G, radial = grad(reduced, [e, full, every, norms], g)
    (slope,) = grad(bent.sum(), [c])
    per_row = grad(rows.sum(), [z, c])
    # Sensitivities to one rounding of the unit vectors: of a cosine for the negatives, but of the
    # angle for the target, where dphi/dc grows like 1 / sin(theta) and must not loosen the bound.
    sine = (1 - c.square()).clamp(min=0).sqrt()
    # (In float64 acos itself, in this reference, has that error.)
    turn = torch.where(hot & (embeddings.dtype != torch.float64), sine, 1.0)
    # Relative error of exp(z), as a multiple of that rounding.
    slope = slope * turn
    # Half operands: both factors in dE and dW are rounded. (Measured: cases above a bound that counts one of them
    # were, to the bit, what float64 makes of operands rounded to float16.) In a cosine, over D terms, they average out.
    kappa = (2 if half else 1) + scale * slope.abs().amax(1).clamp(min=1)
    absolute = torch.einsum("bd,ckd->bck", e_hat.abs(), w_hat.abs())
    products = absolute.amax(-1)
    # What the projection subtracts is a sum over D, whose operands half rounds before they cancel to a cosine.
    radius = absolute if half else every.abs()
    A_rows = (per_row[0] * z).abs().sum(1) + rows.abs()
    A_rows = A_rows + (per_row[1].abs() * turn * products).sum(1)
    uniform = scale * label_smoothing / max(c.shape[1], 1)
    share = max(n, 1) if reduction == "mean" else 1
    extra = (uniform + scale * (HALF_FLUSHED if half else FLUSHED)) * g.abs().reshape(-1, 1, 1) / share
    size = (kappa * valid)[:, None, None] * (G.abs() + extra)
    length = torch.where(norms <= ZERO_NORM, 1.0, norms)[:, None]
    spent = torch.einsum("bck,bck->b", size, radius)[:, None]
    A_e = torch.einsum("bck,ckd->bd", size, w_hat.abs()) + e_hat.abs() * spent
    A_e = A_e / length + e_hat.abs() * (kappa * radial.abs())[:, None]
    # The tangents at the target divide by sin(theta), which one rounding of theta moves by 1 / sin.
    hot_g = torch.where(hot[..., None], G, 0.0)
    ids = y.where(valid, 0)
    per = (hot_g.sum(1) * (kappa / sine.gather(1, ids[:, None])[:, 0].clamp(min=1e-6))[:, None]).abs()
    cos_y, w_y = every[torch.arange(len(y)), ids][..., None], w_hat[ids]  # [B, K, 1], [B, K, D]
    A_e = A_e + torch.einsum("bk,bkd->bd", per, (w_y - cos_y * e_hat[:, None]).abs()) / length
    size = torch.where(every == every.amax(-1, keepdim=True), size, 0.0)
    A_w = torch.einsum("bck,bd->ckd", size, e_hat.abs())
    A_w = A_w + w_hat.abs() * torch.einsum("bck,bck->ck", size, radius)[..., None]
    A_w = A_w.index_add(0, ids, per[..., None] * (e_hat[:, None] - cos_y * w_y).abs())
    A_w = A_w / w_norm.where(w_norm > ZERO_NORM, 1.0)[..., None]
    A_full = torch.zeros_like(full).unflatten(0, (-1, subcenters))
    A_full[slice(None) if classes is None else classes.cpu()] = A_w.detach()

    def project(part: Tensor) -> Tensor:
        d = torch.einsum("bck,ckd->bd", part, w_hat)
        return ((d - (d * e_hat).sum(1, keepdim=True) * e_hat) / length).detach()

    return Truth(
        loss=reduced.detach(),
        rows=rows.detach(),
        grad_e=grad_e,
        grad_w=grad_w,
        A_loss=(A_rows if reduction == "none" else A_rows.sum() / share).detach(),
        A_rows=A_rows.detach(),
        A_e=A_e.detach(),
        A_w=A_full.flatten(0, 1),
        K=max(e.shape[1], c.shape[1], len(y), 1),
        cosines=c.detach(),
        logits=z.detach(),
        margins=used.detach(),
        no_softmax_e=project(hot_g),
        no_target_e=project(G - hot_g),
    )
