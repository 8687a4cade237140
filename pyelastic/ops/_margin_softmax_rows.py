"""The [B]-sized part of margin_softmax: plain torch, left to autograd, shared with the sharded form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyelastic import _random
from pyelastic.eager.margin_softmax import Sweep
from pyelastic.margins import Margin


class MarginSoftmaxAux(NamedTuple):
    """Per-sample by-products of one call, each ``[B]``; None where not asked for, 0 (rank: -1) for ignored rows.

    ``loss``, ``lse`` (log-sum-exp with the margin) and ``cos_target`` carry gradients. ``margin``: the margin used.
    ``rank``: how many classes have a larger cosine than the target, int64 (0: top-1 is right). ``max_negative_cos``:
    -inf if there is no other class. ``el2n``: ``||p - onehot||_2`` (Paul et al. 2021). ``entropy`` of p, in nats.
    """

    loss: Tensor | None = None
    lse: Tensor | None = None
    cos_target: Tensor | None = None
    margin: Tensor | None = None
    rank: Tensor | None = None
    max_negative_cos: Tensor | None = None
    el2n: Tensor | None = None
    entropy: Tensor | None = None


def targets_of(labels: Tensor, valid: Tensor, count: int, classes: Tensor | None) -> Tensor:
    """Positions of the labels among the classes present [B]: -1 for an ignored row, their number for a wrong label.

    Where labels were not checked (on a GPU, or traced), a wrong one must not pass for an ignored row or for a neighbour
    in ``classes``: beyond the end, the kernels make its loss NaN.
    """
    targets = labels.to(torch.int64)
    if classes is None:
        return torch.where(valid, torch.where(targets < 0, count, targets), -1)
    position = torch.searchsorted(classes, targets)
    found = classes[position.clamp(max=classes.shape[0] - 1)] == targets
    return torch.where(valid, torch.where(found, position, classes.shape[0]), -1)


def margins_of(
    margin: Margin,
    given: Tensor | None,
    labels: Tensor,
    dtype: torch.dtype,
    training: bool,
    seed: int | Tensor | None,
    row_offset: int,
) -> Tensor:
    """The margin of each row [B]: given, drawn from N(mean, spread^2), or the mean."""
    if given is not None:
        return given.to(dtype)
    mean = torch.full(labels.shape, margin.mean, dtype=dtype, device=labels.device)
    if not (training and margin.spread):
        return mean
    seed = _random.fresh_seed() if seed is None else seed
    rows = torch.arange(labels.shape[0], device=labels.device) + row_offset
    return mean + (margin.spread * _random.normal(seed, rows)).to(dtype)


def _aux(
    wanted: frozenset[str], swept: Sweep, loss: Tensor, z: Tensor, lse: Tensor, margins: Tensor, valid: Tensor
) -> MarginSoftmaxAux:
    fields: dict[str, Tensor] = {}
    fields["loss"] = loss
    fields["lse"] = torch.where(valid, lse, 0.0)
    fields["cos_target"] = torch.where(valid, torch.cos(swept.theta), 0.0)
    with torch.no_grad():
        fields["margin"] = torch.where(valid, margins.detach(), 0.0)
        fields["rank"], fields["max_negative_cos"] = swept.rank, swept.max_cos
        if {"el2n", "entropy"} & wanted:
            x = swept.lse_neg - z  # the log-odds of "not the target"
            q, p = torch.sigmoid(x), torch.sigmoid(-x)
            fields["el2n"] = torch.where(valid, q * torch.sqrt(1.0 + swept.sum_sq), 0.0)
            # H(p) = H(target or not) + q H(which negative): no difference of large numbers.
            zero = torch.zeros_like(x)
            split = p * torch.logaddexp(x, zero) + q * torch.logaddexp(-x, zero)
            entropy = split + q * (swept.lse_neg - swept.mean_logit)
            fields["entropy"] = torch.where(valid & ~torch.isneginf(x), entropy, 0.0)
    return MarginSoftmaxAux(**{name: value for name, value in fields.items() if name in wanted})


def loss_of(
    swept: Sweep, margin: Margin, values: Tensor, norms: Tensor | None, valid: Tensor, *, scale: float,
    label_smoothing: float, z_loss: float, sample_weight: Tensor | None, reduction: str, count: int,
    wanted: frozenset[str],
) -> tuple[Tensor, MarginSoftmaxAux]:  # fmt: skip
    """The loss from a sweep over all negatives, and the auxiliaries that are wanted; count: of classes."""
    z = scale * margin.target(swept.theta, values, norms, valid)
    # logaddexp(x, 0) is softplus without F.softplus's linear branch; its gradient is sigmoid(x) exactly.
    nll = torch.logaddexp(swept.lse_neg - z, torch.zeros_like(z))
    lse = torch.logaddexp(swept.lse_neg, z)
    loss = nll
    if label_smoothing:
        mean_logit = (scale * swept.sum_cos + z) / count
        loss = (1.0 - label_smoothing) * nll + label_smoothing * (lse - mean_logit)
    if z_loss:
        loss = loss + z_loss * lse.square()
    if norms is not None:
        penalty = margin.penalty(norms)
        loss = loss if penalty is None else loss + penalty
    per_sample = torch.where(valid, loss, 0.0)
    if sample_weight is not None:
        per_sample = torch.where(valid, per_sample * sample_weight.to(loss.dtype), 0.0)
    result = per_sample
    if reduction != "none":
        result = per_sample.sum()
        if reduction == "mean":
            result = result / valid.sum().clamp(min=1)
    return result, _aux(wanted, swept, per_sample, z, lse, margin.effective(values, norms), valid)
