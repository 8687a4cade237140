"""Class-sharded margin softmax: each rank holds some classes' rows, and its own part of the batch (Partial FC).

With ``L_r`` the classes of rank r, ``B`` the rows of all ranks::

    lse_r,i = log sum_{j in L_r, j != y_i} exp z_ij          one sweep of pyelastic.margin_softmax's kernels a rank
    theta_i, from the rank that holds y_i;   lse_neg_i = log sum_r exp lse_r,i

and from there on every rank computes the same [B] numbers. A row whose class is elsewhere is swept with a class of the
shard standing in for its own, whose logit is then added again. Communicated a step: embeddings once (all-gather), their
gradient once (reduce-scatter), and a few [B] vectors; nothing of C x D. Sources: An 2022 (Partial FC, arXiv 2203.15565)
for the sharding and the sampling; formulas: pyelastic/ops/margin_softmax.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from pyelastic import _dispatch, _random
from pyelastic.distributed import _collectives as comm
from pyelastic.eager.margin_softmax import MOMENTS, RANK, SUM_COS, Sweep, statistics_dtype, target_angle
from pyelastic.margins import ArcFace, Margin, deal
from pyelastic.ops import _margin_softmax_rows as rows
from pyelastic.ops import margin_softmax as op
from pyelastic.ops._margin_softmax_rows import MarginSoftmaxAux

OP = "class_sharded_margin_softmax"
RANK_CHUNK = 4096  # classes at a time whose cosines the rank of the target looks at


def class_sharded_margin_softmax(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    margin: Margin | None = None,
    scale: float = 64.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    subcenters: int = 1,
    sample_rate: float = 1.0,
    sample_seed: int | Tensor | None = None,
    margins: Tensor | None = None,
    training: bool = True,
    seed: int | Tensor | None = None,
    gather_dtype: torch.dtype | None = None,
    ddp_world_compensation: bool = False,
    return_aux: bool | Sequence[str] = False,
    backend: str = "auto",
) -> Any:
    """``pyelastic.margin_softmax`` over classes that are sharded over the ranks of ``group``, all of which call it.

    Args:
        embeddings: [b, D], this rank's rows of the batch; b may differ between ranks and be 0.
        weight: [n * subcenters, D], this rank's classes, which follow those of the rank before; n may differ and be 0.
            Or a DTensor with ``Shard(0)`` over ``group``.
        labels: [b], of the classes of all ranks, or ``ignore_index``.
        sample_weight, margins: [b], as this rank's rows.
        sample_rate, sample_seed: below 1, this share of each shard's classes, and all labels of the batch, exist for
            this call (``pyelastic.sample_classes`` of the shard).
        seed: of drawn margins, which depend on it and the row in the batch of all ranks alone; None: rank 0 draws one.
        gather_dtype: ``torch.float16`` or ``torch.bfloat16``: embeddings travel as unit rows of this dtype. None: as
            they are.
        ddp_world_compensation: multiply the embeddings' gradient by the number of ranks, which
            ``DistributedDataParallel`` around the backbone divides by.

    Other arguments: see ``pyelastic.margin_softmax``.

    Returns:
        The loss, which is that of the whole batch and the same on every rank (``reduction="none"``: [b], this rank's
        rows), or ``(loss, MarginSoftmaxAux)`` with [b] entries. Gradients are those of that one loss: of the embeddings
        for this rank's rows, of ``weight`` for its shard. Every rank must call backward, with the same gradient of
        ``"mean"`` and ``"sum"``.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what was got.
        BackendError: the backend asked for cannot run the call.
    """
    margin = ArcFace() if margin is None else margin
    weight = _local(weight)
    k = subcenters
    some = weight if weight.shape[0] else weight.new_empty(max(k, 1), *weight.shape[1:])
    wanted = op._check({
        "embeddings": embeddings, "weight": some, "labels": labels, "margin": margin, "scale": scale,
        "reduction": reduction, "sample_weight": sample_weight, "label_smoothing": label_smoothing, "z_loss": z_loss,
        "subcenters": k, "classes": None, "sparse_grad": False, "margins": margins, "return_aux": return_aux,
    })  # fmt: skip
    chosen = _dispatch.resolve(op.OP, op._make_call(embeddings, some, labels, subcenters=k), backend)
    device, dtype = embeddings.device, statistics_dtype(embeddings)
    sizes = comm.sizes_of(embeddings.shape[0], group, device)
    shards = comm.sizes_of(weight.shape[0] // k, group, device)
    first, total = sum(shards[: dist.get_rank(group)]), sum(shards)
    factor = float(len(sizes)) if ddp_world_compensation else 1.0
    if _dispatch.may_read(device):
        op._check_labels(labels, total, ignore_index, None)

    with torch.autocast(device.type, enabled=False):
        norms = None
        if margin.needs_norms:
            embeddings = embeddings.to(dtype)
            used = torch.where((labels != ignore_index)[:, None], embeddings, 0.0)
            own_norms = torch.linalg.vector_norm(used, dim=1)
            norms = comm.gather_for_replicated(own_norms, sizes, group, factor)
        moved = embeddings if gather_dtype is None else normalize(embeddings.to(dtype), dim=1).to(gather_dtype)
        e = comm.gather_for_partial(moved, sizes, group, factor)
        y = comm._gather(labels.to(torch.int64), sizes, group)
        sample_weight, margins = (
            None if t is None else comm.gather_for_replicated(t.to(dtype), sizes, group)
            for t in (sample_weight, margins)
        )
        valid = y != ignore_index
        if margins is None and training and margin.spread:
            seed = _shared_seed(seed, group, device)
        values = torch.where(valid, rows.margins_of(margin, margins, y, dtype, training, seed, 0), 0.0)

        shard = _Shard(e, weight, y - first, valid, k, group, sample_rate, sample_seed)
        threshold = hard_map = None
        if margin.stresses_negatives:
            with torch.no_grad():
                threshold, hard_map = margin.hard_negatives(shard.target_angle(), values)
        stats = (SUM_COS if label_smoothing else 0) | (MOMENTS if {"el2n", "entropy"} & wanted else 0)
        stats |= RANK if "max_negative_cos" in wanted else 0
        swept = shard.sweep(chosen.run, threshold, hard_map, float(scale), stats, "rank" in wanted)
        if margin.order is not None and margins is None and training:
            values = deal(values, torch.cos(swept.theta.detach()), valid, margin.order)
        present = total
        if label_smoothing and sample_rate < 1.0:
            present = sum(comm.sizes_of(shard.count, group, device))
        result, aux = rows.loss_of(
            swept, margin, values, norms, valid, scale=scale, label_smoothing=label_smoothing, z_loss=z_loss,
            sample_weight=sample_weight, reduction=reduction, count=present, wanted=wanted,
        )  # fmt: skip
        if reduction == "none":
            result = comm.take_own(result, sizes, group)
        if not return_aux:
            return result
        made = {name: comm.take_own(t, sizes, group) for name, t in aux._asdict().items() if t is not None}
        return result, MarginSoftmaxAux(**made)


def _local(weight: Any) -> Any:
    """The shard of a DTensor, through which gradients flow; a tensor as it is."""
    if not hasattr(weight, "placements"):
        return weight
    if weight.device_mesh.ndim != 1 or not weight.placements[0].is_shard(0):
        raise ValueError(f"{OP}: weight has placements {weight.placements}; expected Shard(0) over one mesh dimension")
    return weight.to_local()


def _shared_seed(seed: int | Tensor | None, group: comm.Group, device: torch.device) -> Tensor:
    """Rank 0's, if none is given."""
    drawn = (_random.fresh_seed() if seed is None else torch.as_tensor(seed, dtype=torch.int64)).to(device)
    if seed is None:
        dist.broadcast(drawn, group_src=0, group=group)
    return drawn


class _Shard:
    """This rank's classes against the rows of all ranks."""

    def __init__(
        self, e: Tensor, weight: Tensor, local: Tensor, valid: Tensor, subcenters: int, group: comm.Group,
        sample_rate: float, sample_seed: int | Tensor | None,
    ) -> None:  # fmt: skip
        self.e, self.weight, self.subcenters, self.group = e, weight, subcenters, group
        held = weight.shape[0] // subcenters
        self.dtype = statistics_dtype(e)
        self.own = valid & (local >= 0) & (local < held)
        classes = None
        if sample_rate < 1.0 and held:
            classes = op.sample_classes(
                torch.where(self.own, local, -1), held, sample_rate, seed=sample_seed, ignore_index=-1
            )
        self.classes, self.count = classes, held if classes is None else classes.shape[0]
        place = torch.arange(len(local), device=local.device)
        # A different one for each row, so that their gradients do not all meet in one row.
        stand_in = place % max(self.count, 1)
        targets = local if classes is None else rows.targets_of(local, self.own, held, classes)
        self.targets = torch.where(valid, torch.where(self.own, targets, stand_in), -1)

    def target_angle(self) -> Tensor:
        """Of all rows, without gradients."""
        if not self.count:
            return comm.sum_of(self.e.new_zeros(len(self.e), dtype=self.dtype), self.group)
        angle = target_angle(self.e, self.weight, self.targets, self.classes, self.subcenters)
        return comm.sum_of(torch.where(self.own, angle, 0.0), self.group)

    def sweep(
        self, run: Any, threshold: Tensor | None, hard_map: Tensor | None, scale: float, stats: int, rank: bool
    ) -> Sweep:
        """The sweep over the classes of all ranks; its fields are replicated."""
        empty = self.e.new_empty(0, dtype=self.dtype)
        zeros = self.e.new_zeros(len(self.e), dtype=self.dtype)
        if self.count:
            own = run(
                self.e, self.weight, self.targets, self.classes, threshold, hard_map, scale, self.subcenters, stats,
                False,
            )  # fmt: skip
            part = self._with_stand_ins(own, threshold, hard_map, scale, stats)
        else:
            # Nothing, whose gradient still reaches the collectives of the backward pass. Squares, as a plain sum's
            # gradient is expanded, with strides of 0: torch 2.11 makes a DTensor's gradient a replicated one of it.
            never = torch.zeros_like(self.targets, dtype=torch.bool)
            nothing = torch.where(never, self.e.sum(1).to(self.dtype), 0.0) + self.weight.square().sum()
            part = Sweep(nothing, nothing - torch.inf, nothing, empty, zeros - torch.inf, zeros, zeros)
        theta = comm.sum_of(part.theta, self.group)
        lse_neg = comm.log_sum_exp(part.lse_neg, self.group)
        sum_cos = comm.sum_of(part.sum_cos, self.group) if stats & SUM_COS else empty
        with torch.no_grad():
            max_cos, sum_sq, mean_logit = part.max_cos, part.sum_sq, part.mean_logit
            if stats & RANK:
                max_cos = part.max_cos.clone()
                dist.all_reduce(max_cos, dist.ReduceOp.MAX, group=self.group)
            if stats & MOMENTS:
                share = comm.share_of(part.lse_neg, lse_neg)
                sum_sq = comm.sum_of(share.square() * sum_sq, self.group)
                # As a distance below lse_neg: what is added is small, where logits are large and nearly equal.
                below = torch.where(share > 0, share * (lse_neg - mean_logit), 0.0)
                mean_logit = lse_neg - comm.sum_of(below, self.group)
            above = self._rank(theta) if rank else self.targets.new_empty(0)
        return Sweep(theta, lse_neg, sum_cos, above, max_cos, sum_sq, mean_logit)

    def _with_stand_ins(
        self, own: Sweep, threshold: Tensor | None, hard_map: Tensor | None, scale: float, stats: int
    ) -> Sweep:
        """This rank's part: the angle where it holds the class, and stand-ins among the negatives where it does not."""
        foreign = ~self.own & (self.targets >= 0)
        cosine = torch.cos(own.theta)
        if threshold is not None and hard_map is not None:
            stressed = hard_map[0] + cosine * (hard_map[1] + cosine * hard_map[2])
            cosine = torch.where(cosine > threshold, stressed, cosine)
        logit = scale * cosine
        both = torch.logaddexp(own.lse_neg, logit)
        theta = torch.where(self.own, own.theta, 0.0)
        lse_neg = torch.where(foreign, both, own.lse_neg)
        sum_cos, max_cos, sum_sq, mean = own.sum_cos, own.max_cos, own.sum_sq, own.mean_logit
        if stats & SUM_COS:
            sum_cos = torch.where(foreign, sum_cos + cosine, sum_cos)
        with torch.no_grad():
            if stats & RANK:
                max_cos = torch.where(foreign, torch.maximum(max_cos, torch.cos(own.theta)), max_cos)
            if stats & MOMENTS:
                rest, here = comm.share_of(own.lse_neg, both), torch.exp(logit - both)
                sum_sq = torch.where(foreign, rest.square() * sum_sq + here.square(), sum_sq)
                below = torch.where(rest > 0, rest * (both - mean), 0.0) + here * (both - logit)
                mean = torch.where(foreign, both - below, mean)
        return Sweep(theta, lse_neg, sum_cos, own.rank, max_cos, sum_sq, mean)

    def _rank(self, theta: Tensor) -> Tensor:
        """How many classes have a larger cosine than the target [B], -1 for ignored rows; by torch, in chunks."""
        unit, cos_target = normalize(self.e.to(self.dtype), dim=1), torch.cos(theta)[:, None]
        above = torch.zeros_like(self.targets)
        for begin in range(0, self.count, RANK_CHUNK):
            here = torch.arange(begin, min(begin + RANK_CHUNK, self.count), device=above.device)
            of = here if self.classes is None else self.classes[here]
            index = (of[:, None] * self.subcenters + torch.arange(self.subcenters, device=above.device)).flatten()
            w = normalize(self.weight[index].to(self.dtype), dim=1)
            cosines = (unit @ w.t()).view(len(unit), len(here), -1).amax(-1)
            other = ~(self.own[:, None] & (self.targets[:, None] == here))
            above += ((cosines > cos_target) & other).sum(1)
        dist.all_reduce(above, group=self.group)
        return torch.where(self.targets < 0, -1, above)
