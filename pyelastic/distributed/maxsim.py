"""In-batch negatives across ranks for MaxSim: the contrastive loss of every rank's queries over all ranks' documents.

With ``z_ij = score_ij / temperature`` (pyelastic/ops/maxsim.py) of all ranks' documents j and positive y_i::

    loss = mean_i (logsumexp_j z_ij - z_iy)            over all ranks' queries
    dscore_ij = (exp(z_ij - lse_i) - [j = y_i]) / (temperature Nq)

``form="gather"``: one all-gather of the document tokens; a reduce-scatter takes their gradients home. Every rank holds
all tokens. ``form="ring"``: document blocks go round, the next one in flight while one is scored; a rank holds two
blocks and, per query, the running maximum and sum of the softmax. Backward sends the blocks round once more, scores
them again, and each block's gradient follows it home. The order of sums is fixed by the ranks: deterministic. Source:
Khattab 2020 (ColBERT, arXiv 2004.12832) for the scores; Milakov 2018 (arXiv 1805.02867) for the running softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyelastic import _errors
from pyelastic.distributed import _collectives as comm
from pyelastic.ops.maxsim import maxsim
from pyelastic.ops.maxsim_losses import maxsim_info_nce

OP = "in_batch_maxsim_info_nce"
FORMS = ("gather", "ring")
OPTIONS = frozenset(
    {
        "query_mask",
        "mask_mode",
        "reduction",
        "topk",
        "smooth_temperature",
        "normalize",
        "cu_seqlens_q",
        "max_seqlen_q",
        "save",
        "backend",
    }
)


@dataclass(frozen=True)
class _Blocks:
    """Every rank's documents without their tokens: offsets [N_r + 1], mask [T_r] or None, how many tokens."""

    offsets: list[Tensor]
    masks: list[Tensor] | None
    tokens: list[int]

    def options(self, rank: int) -> dict[str, Any]:
        offsets = self.offsets[rank]
        longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
        told: dict[str, Any] = {"cu_seqlens_d": offsets, "max_seqlen_d": longest, "layout": "cross"}
        return told if self.masks is None else told | {"document_mask": self.masks[rank]}


def in_batch_maxsim_info_nce(
    queries: Tensor,
    documents: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    form: str = "gather",
    labels: Tensor | None = None,
    temperature: float = 1.0,
    document_mask: Tensor | None = None,
    cu_seqlens_d: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """``pyelastic.maxsim_info_nce`` of the concatenated batch of all ranks, from each rank's part of it.

    Args:
        queries: this rank's, [Nq, Lq, d], or packed with ``cu_seqlens_q``. Nq may differ between ranks and be 0.
        documents: this rank's, [Nd, Ld, d], or packed [tokens, d] with ``cu_seqlens_d`` [Nd + 1]. Nd and Ld may differ
            between ranks and be 0; dtype and d may not.
        form: ``"gather"`` or ``"ring"``; see the module.
        labels: [Nq] int64, the positive's index among this rank's documents; by default ``i * (Nd // Nq)``.
        temperature: divides the scores; > 0. document_mask: bool [Nd, Ld] or [tokens], on all ranks or on none.
        options: of ``pyelastic.maxsim``: query_mask, mask_mode, reduction, topk, smooth_temperature (its
            ``temperature``), normalize, cu_seqlens_q, max_seqlen_q, save, backend; but for masks alike on all ranks.

    Returns:
        The mean over all ranks' queries, one number on every rank, float32 (of float64 inputs float64). Every rank
        calls backward, with the same upstream gradient: queries and documents get their gradients of this one loss.

    Raises:
        ValueError, TypeError, BackendError: as ``pyelastic.maxsim_info_nce``, on the rank with the wrong argument; the
        others then wait for the process group's timeout.
        RuntimeError: double backward.
    """
    _errors.check_choice(OP, "form", form, FORMS)
    unknown = set(options) - OPTIONS
    if unknown:
        raise TypeError(f"{OP}: it does not take {', '.join(sorted(unknown))}")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"{OP}: temperature is {temperature}; expected a positive number")
    if cu_seqlens_d is None:
        _errors.check_rank(OP, "documents", documents, 3, "[Nd, Ld, d]")
        offsets = torch.arange(len(documents) + 1, device=documents.device) * documents.shape[1]
    else:
        _errors.check_rank(OP, "documents", documents, 2, "[tokens, d] with cu_seqlens_d")
        offsets = cu_seqlens_d.long()
    packed = documents.flatten(0, 1) if documents.ndim == 3 else documents
    cu_q = options.get("cu_seqlens_q")
    rows, columns = len(queries) if cu_q is None else len(cu_q) - 1, len(offsets) - 1
    if labels is None:
        labels = torch.arange(rows, device=queries.device) * (columns // max(rows, 1))
    if labels.dtype != torch.int64 or labels.shape != (rows,):
        raise ValueError(f"{OP}: labels is {labels.dtype} {list(labels.shape)}; expected int64 [{rows}]")
    if queries.device.type == "cpu" and bool(((labels < 0) | (labels >= columns)).any()):
        raise ValueError(f"{OP}: labels reach beyond this rank's {columns} documents")
    mask = None if document_mask is None else document_mask.flatten() != 0
    blocks = _blocks(offsets, mask, len(packed), group)
    form_of = _gathered if form == "gather" else _in_ring
    losses = form_of(queries, packed, labels, blocks, group, temperature, options)
    total = sum(comm.sizes_of(rows, group, queries.device))
    return comm.sum_of(losses.sum(), group) / max(total, 1)


def _blocks(offsets: Tensor, mask: Tensor | None, tokens: int, group: comm.Group) -> _Blocks:
    counts = comm.sizes_of(len(offsets), group, offsets.device)
    sizes = comm.sizes_of(tokens, group, offsets.device)
    all_offsets = list(comm.gather_for_replicated(offsets, counts, group).split(counts))
    if mask is None:
        return _Blocks(all_offsets, None, sizes)
    masks = comm.gather_for_replicated(mask.to(torch.uint8), sizes, group).split(sizes)
    return _Blocks(all_offsets, [m != 0 for m in masks], sizes)


def _gathered(
    queries: Tensor,
    packed: Tensor,
    labels: Tensor,
    blocks: _Blocks,
    group: comm.Group,
    temperature: float,
    options: dict[str, Any],
) -> Tensor:
    """Losses [Nq] of this rank's queries against the documents of all."""
    everyone = comm.gather_for_partial(packed, blocks.tokens, group)
    starts = [sum(blocks.tokens[:rank]) for rank in range(len(blocks.tokens))]
    ends = [offsets[1:] + start for offsets, start in zip(blocks.offsets, starts, strict=True)]
    whole = _Blocks(
        [torch.cat((labels.new_zeros(1), *ends))],
        None if blocks.masks is None else [torch.cat(blocks.masks)],
        [len(everyone)],
    )
    first = sum(len(o) - 1 for o in blocks.offsets[: dist.get_rank(group)])
    return maxsim_info_nce(
        queries,
        everyone,
        labels=labels + first,
        temperature=temperature,
        loss_reduction="none",
        **whole.options(0),
        **options,
    )


def _in_ring(
    queries: Tensor,
    packed: Tensor,
    labels: Tensor,
    blocks: _Blocks,
    group: comm.Group,
    temperature: float,
    options: dict[str, Any],
) -> Tensor:
    told = dict(options)
    if "smooth_temperature" in told:
        told["temperature"] = told.pop("smooth_temperature")
    _errors.check_choice(OP, "reduction", told.get("reduction", "sum"), ("sum", "mean"))

    def logits(q: Tensor, d: Tensor, owner: int) -> Tensor:
        return maxsim(q, d, **blocks.options(owner), **told) / temperature

    out: Tensor = _Ring.apply(queries, packed, labels, blocks.tokens, group, logits)
    return out


class _Send:
    """Tensors to the next rank and from the one before, in flight until ``wait``; both ends know the sizes."""

    def __init__(self, out: Tensor, arriving: int, group: comm.Group) -> None:
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        at = [(rank + step) % world for step in (1, -1)]
        after, before = at if group is None else [dist.get_global_rank(group, r) for r in at]
        self.sent, self.got = out.contiguous(), out.new_empty(arriving, *out.shape[1:])
        operations = [dist.P2POp(dist.isend, self.sent, after, group)] if self.sent.numel() else []
        operations += [dist.P2POp(dist.irecv, self.got, before, group)] if self.got.numel() else []
        self.works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.got


class _RingBackward(torch.autograd.Function):
    """A node of its own, so that differentiating it fails loudly."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        queries: Tensor,
        packed: Tensor,
        labels: Tensor,
        lse: Tensor,
        tokens: list[int],
        group: comm.Group,
        logits: Callable[[Tensor, Tensor, int], Tensor],
    ) -> tuple[Tensor, Tensor]:
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        block = packed
        d_q = queries.new_zeros(queries.shape, dtype=lse.dtype)
        home = packed.new_zeros(packed.shape, dtype=lse.dtype)
        for step in range(world):
            owner = (rank - step) % world
            arriving = tokens[(owner - 1) % world]
            flight = _Send(block, arriving, group) if step + 1 < world else None
            with torch.enable_grad():
                q, d = queries.detach().requires_grad_(), block.detach().requires_grad_()
                z = logits(q, d, owner)
            g = torch.exp(z.detach() - lse[:, None])
            if step == 0 and len(labels):
                g[torch.arange(len(g), device=g.device), labels] -= 1.0
            if z.requires_grad and z.numel():
                made = torch.autograd.grad(z, (q, d), g * grad[:, None])
                d_q += made[0]
                home += made[1]
            if world > 1:
                home = _Send(home, arriving, group).wait()
            block = block if flight is None else flight.wait()
        return d_q.to(queries.dtype), home.to(packed.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{OP}: double backward is not supported")


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        packed: Tensor,
        labels: Tensor,
        tokens: list[int],
        group: comm.Group,
        logits: Callable[[Tensor, Tensor, int], Tensor],
    ) -> Tensor:
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        block, most, total, positive = packed, None, None, None
        for step in range(world):
            owner = (rank - step) % world
            flight = _Send(block, tokens[(owner - 1) % world], group) if step + 1 < world else None
            z = logits(queries, block, owner)
            if most is None or total is None:
                positive = z.gather(1, labels[:, None])[:, 0] if len(z) else z.sum(1)
                most, total = torch.full_like(positive, -torch.inf), torch.zeros_like(positive)
            if z.shape[1]:
                top = torch.maximum(most, z.amax(1))
                total = total * torch.exp(most - top) + torch.exp(z - top[:, None]).sum(1)
                most = top
            block = block if flight is None else flight.wait()
        assert most is not None and total is not None and positive is not None  # there is one rank at least
        lse = most + torch.log(total)
        ctx.tokens, ctx.group, ctx.logits = tokens, group, logits
        ctx.save_for_backward(queries, packed, labels, lse)
        return lse - positive

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        d_q, d_d = _RingBackward.apply(grad, *ctx.saved_tensors, ctx.tokens, ctx.group, ctx.logits)
        return d_q, d_d, None, None, None, None
