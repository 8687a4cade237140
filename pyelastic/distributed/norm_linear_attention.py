"""Sequence-parallel norm-aware linear attention: each rank holds consecutive tokens, and a state is all that travels.

With ``S_r, z_r`` the state that rank r's own tokens make (pyelastic/ops/norm_linear_attention.py)::

    bidirectional: every rank reads sum_r S_r, sum_r z_r                          one all-reduce, and one backward
    causal:        rank r starts from sum_{j < r} S_j, sum_{j < r} z_j            one all-gather, and one backward

Backward mirrors it: the gradient of a rank's state is the sum of what all ranks, or the later ones, have of the states
they read. A state has B Hk 2 d (dv + 1) numbers of 4 bytes (float64: 8), whatever the number of tokens. Cost beside one
device's: in the causal form the keys' part of the work is done twice, for the state and for the outputs. Source: Sun et
al., Linear Attention Sequence Parallelism (arXiv 2404.02882), for a state that travels in place of keys.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyelastic.distributed import _collectives as comm
from pyelastic.eager.norm_linear_attention import statistics_dtype
from pyelastic.ops.norm_linear_attention import LinearAttentionState, norm_linear_attention
from pyelastic.rope import rope_tables as make_tables

OP = "sequence_parallel_norm_linear_attention"
REFUSED = ("cu_seqlens", "initial_state", "output_final_state", "position", "layout")


class _ReadByAll(torch.autograd.Function):
    """Sum of all ranks' states, which each of them reads for its own outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: comm.Group) -> Tensor:
        ctx.group = group
        out = x.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def _everyone(x: Tensor, group: comm.Group) -> Tensor:
    """[ranks, ...]."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather_into_tensor(out, x.contiguous()[None], group=group)
    return out


class _ReadByLater(torch.autograd.Function):
    """Sum of the states of the ranks before this one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: comm.Group) -> Tensor:
        ctx.group = group
        return _everyone(x, group)[: dist.get_rank(group)].sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _everyone(grad, ctx.group)[dist.get_rank(ctx.group) + 1 :].sum(0), None


def sequence_parallel_norm_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    causal: bool = False,
    rope: str | None = None,
    rope_tables: tuple[Tensor, Tensor] | None = None,
    rope_grid: tuple[int, int] | None = None,
    gate: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """``pyelastic.norm_linear_attention`` of tokens that are split over the ranks of ``group`` in their order.

    Args:
        q: [B, N, Hq, d], k: [B, N, Hk, d], v: [B, N, Hk, dv], gate: [B, N, Hq, dv]: this rank's tokens, which follow
            those of the rank before. N may differ between ranks and be 0; all else is alike.
        rope_tables: sin, cos for the positions of all ranks; by default those of ``pyelastic.rope_tables`` for all
            tokens, or of ``rope_grid``, the (height, width) of the whole.
        options: see ``pyelastic.norm_linear_attention``. Not among them: cu_seqlens, initial_state,
            output_final_state, position, layout.

    Returns:
        o [B, N, Hq, dv] of this rank's tokens. Gradients of q, k, v and gate are complete when every rank has called
        backward. ``lam``, ``tau`` and ``norm_scale`` get this rank's part of theirs, as data-parallel parameters do:
        the sum over ranks is the whole.

    Raises:
        ValueError: an option is given that does not go with it. Else as ``pyelastic.norm_linear_attention``.
    """
    for name in REFUSED:
        if name in options:
            raise ValueError(f"{OP}: {name} is given; expected none of {', '.join(REFUSED)}")
    tokens = comm.sizes_of(q.shape[1], group, q.device)
    first = sum(tokens[: dist.get_rank(group)])
    if rope is not None and rope_tables is None:
        rope_tables = make_tables(
            sum(tokens) if rope_grid is None else rope_grid, q.shape[-1], device=q.device, dtype=statistics_dtype(q)
        )
    options |= {"rope": rope, "rope_tables": rope_tables if rope is not None else None, "position": first}
    _, own = norm_linear_attention(q[:, :0], k, v, output_final_state=True, **options)
    read = _ReadByLater if causal else _ReadByAll
    s, z = (read.apply(comm.attach(x, k, v), group) for x in (own.s, own.z))
    count = torch.full_like(own.tokens, first if causal else sum(tokens))
    state = LinearAttentionState(s, z, count)
    if not causal:
        k, v = k[:, :0], v[:, :0]
    out = norm_linear_attention(q, k, v, causal=causal, initial_state=state, gate=gate, **options)
    assert isinstance(out, Tensor)  # no state was asked for
    return comm.attach(out, s, z)
