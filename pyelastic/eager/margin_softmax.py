"""margin_softmax in plain torch: the specification of the sweep over the negatives.

It forms the whole B x C matrix of cosines, so its memory grows with the number of classes: that is the cost the
kernels remove. Its gradients come from autograd, an independent check of the hand-written backwards.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ZERO_NORM = 1e-12  # F.normalize's eps; a shorter row has no direction


class Sweep(NamedTuple):
    """What a sweep over the classes returns, all ``[B]`` (an empty tensor where not asked for).

    ``theta``: angle to the (closest sub-centre of the) target class. ``lse_neg``: log-sum-exp of the logits of
    the other classes. ``sum_cos``: sum of their (stressed) cosines. ``rank``: how many have a larger cosine than
    the target, int64. ``max_cos``: the largest of their cosines. ``sum_sq``: sum of squares, and ``mean_logit``: mean
    logit, under the softmax over the negatives alone.
    """

    theta: Tensor
    lse_neg: Tensor
    sum_cos: Tensor
    rank: Tensor
    max_cos: Tensor
    sum_sq: Tensor
    mean_logit: Tensor


# Bits of `stats`: which of the optional statistics a sweep computes.
SUM_COS, RANK, MOMENTS = 1, 2, 4


def statistics_dtype(embeddings: Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32: statistics are never kept in 16 bits."""
    return torch.float64 if embeddings.dtype == torch.float64 else torch.float32


def normalize(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows over their Euclidean norm; a row without direction becomes zero, with a zero gradient."""
    rows = rows.to(dtype)
    # Summed in double: the squares of a float32 row of norm 1e19 overflow.
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64).to(dtype)
    short = norm <= ZERO_NORM
    return torch.where(short, 0.0, rows / torch.where(short, 1.0, norm))


def angle(e_hat: Tensor, w_hat: Tensor) -> Tensor:
    """Angle [B] between unit rows, by atan2: acos has no digits, and no gradient, near 0 and pi."""
    cosine = (e_hat * w_hat).sum(-1)
    sine = torch.linalg.vector_norm(w_hat - cosine[:, None] * e_hat, dim=-1)
    nowhere = (cosine == 0) & (sine == 0)  # a zero class row: atan2(0, 0) has no gradient
    return torch.where(
        nowhere, math.pi / 2, torch.atan2(torch.where(nowhere, 1.0, sine), cosine)
    )


def target_angle(
    embeddings: Tensor, weight: Tensor, labels: Tensor, classes: Tensor | None, subcenters: int
) -> Tensor:
    """``theta`` [B] alone, by gathering the target rows: O(B D), for margins that need it beforehand."""
    dtype = statistics_dtype(embeddings)
    present = weight.shape[0] // subcenters if classes is None else classes.shape[0]
    rows = labels.clamp(0, present - 1)  # a label out of range reads nothing foreign; the sweep makes its loss NaN
    rows = rows if classes is None else classes[rows]
    rows = rows[:, None] * subcenters + torch.arange(subcenters, device=rows.device)
    candidates = normalize(weight[rows], dtype)
    e_hat = normalize(embeddings, dtype)
    best = torch.einsum("bd,bkd->bk", e_hat, candidates).argmax(1)
    return angle(e_hat, candidates[torch.arange(len(best), device=best.device), best])


def sweep(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    classes: Tensor | None,
    threshold: Tensor | None,
    hard_map: Tensor | None,
    scale: float,
    subcenters: int,
    stats: int,
) -> Sweep:
    """Statistics of the negatives of each row; differentiable in ``theta``, ``lse_neg`` and ``sum_cos``.

    Args: ``embeddings`` [B, D]; ``weight`` [C * K, D], class-major sub-centres; ``labels`` [B] int64, -1 for an ignored
    row, positions in ``classes`` [n] where that is given, too large for NaN; ``threshold`` [B] and ``hard_map`` [3]:
    negatives with ``c > threshold`` become ``a0 + a1 c + a2 c^2``; ``stats``: the optional statistics wanted.
    """
    dtype = statistics_dtype(embeddings)
    used = labels >= 0
    # An ignored row must not reach any gradient, whatever it holds.
    e_hat = normalize(torch.where(used[:, None], embeddings, 0.0), dtype)
    centres = weight.unflatten(0, (-1, subcenters))
    w_hat = normalize(centres if classes is None else centres[classes], dtype)
    target = labels.clamp(0, w_hat.shape[0] - 1)
    rows = torch.arange(len(labels), device=labels.device)
    if subcenters == 1:
        cosines = e_hat @ w_hat[:, 0].t()
        nearest = torch.zeros_like(target)
    else:
        cosines, closest = torch.einsum("bd,ckd->bck", e_hat, w_hat).max(-1)
        nearest = closest[rows, target]
    theta = torch.where(used, angle(e_hat, w_hat[target, nearest]), math.pi / 2)
    theta = torch.where(labels < w_hat.shape[0], theta, math.nan)
    is_target = torch.zeros_like(cosines, dtype=torch.bool)
    is_target[rows, target] = True

    stressed = cosines
    if threshold is not None and hard_map is not None:
        mapped = hard_map[0] + cosines * (hard_map[1] + cosines * hard_map[2])
        stressed = torch.where(cosines > threshold[:, None], mapped, cosines)
    logits = (scale * stressed).masked_fill(is_target, -math.inf)
    lse_neg = torch.where(used, torch.logsumexp(logits, 1), 0.0)

    none = cosines.new_empty(0)
    sum_cos = max_cos = sum_sq = mean_logit = none
    rank = labels.new_empty(0)
    if stats & SUM_COS:
        sum_cos = torch.where(used, stressed.masked_fill(is_target, 0.0).sum(1), 0.0)
    with torch.no_grad():
        if stats & RANK:
            above = (cosines > torch.cos(theta)[:, None]) & ~is_target
            rank = torch.where(used, above.sum(1), -1)
            most = cosines.masked_fill(is_target, -math.inf).amax(1)
            max_cos = torch.where(used, most, 0.0)
        if stats & MOMENTS:
            share = torch.softmax(logits, 1).masked_fill(is_target, 0.0)
            sum_sq = torch.where(used, share.square().sum(1), 0.0)
            mean = (share * logits.masked_fill(is_target, 0.0)).sum(1)
            mean_logit = torch.where(used, mean, 0.0)
    return Sweep(theta, lse_neg, sum_cos, rank, max_cos, sum_sq, mean_logit)
