"""Collectives with the gradients that sharded losses need.

Two kinds of values occur. *Replicated* ones, as the loss, are computed alike on every rank, and so are their
gradients. *Partial* ones belong to a rank, and what is replicated is their sum. Each function says which it takes and
gives; torch's own differentiable collectives sum every gradient, which counts a replicated one once for each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def sizes_of(size: int, group: Group, device: torch.device) -> list[int]:
    """Every rank's ``size``. Reads them back: on a GPU this synchronises."""
    sizes = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([size], device=device), group=group)
    return [int(n) for n in sizes.tolist()]


def _gather(x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """Rows of all ranks [sum(sizes), ...], one after the other."""
    most = max(sizes)
    mine = x.contiguous()
    if len(x) < most:
        mine = torch.cat((mine, x.new_zeros(most - len(x), *x.shape[1:])))
    out = x.new_empty(len(sizes) * most, *x.shape[1:])
    dist.all_gather_into_tensor(out, mine, group=group)
    if min(sizes) == most:
        return out
    return torch.cat([out[rank * most : rank * most + n] for rank, n in enumerate(sizes)])


def _reduce_scatter(out: Tensor, x: Tensor, group: Group) -> None:
    """By its name since torch 2.13, or the one before."""
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    getattr(dist, name)(out, x, group=group)


def _own(x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """This rank's rows of what `_gather` gives."""
    rank = dist.get_rank(group)
    begin = sum(sizes[:rank])
    return x[begin : begin + sizes[rank]]


class _GatherForPartial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sequence[int], group: Group, factor: float) -> Tensor:
        ctx.sizes, ctx.group, ctx.factor = sizes, group, factor
        return _gather(x, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        sizes, most = ctx.sizes, max(ctx.sizes)
        if min(sizes) < most:
            padded = grad.new_zeros(len(sizes) * most, *grad.shape[1:])
            for rank, part in enumerate(grad.split(sizes)):
                padded[rank * most : rank * most + len(part)] = part
            grad = padded
        out = grad.new_empty(most, *grad.shape[1:])
        _reduce_scatter(out, grad.contiguous(), group=ctx.group)
        return out[: sizes[dist.get_rank(ctx.group)]] * ctx.factor, None, None, None


class _GatherForReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sequence[int], group: Group, factor: float) -> Tensor:
        ctx.sizes, ctx.group, ctx.factor = sizes, group, factor
        return _gather(x, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _own(grad, ctx.sizes, ctx.group) * ctx.factor, None, None, None


class _TakeOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _own(x, sizes, group).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _gather(grad, ctx.sizes, ctx.group), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        out = x.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.count = len(others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, *(None for _ in range(ctx.count))


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        most = x.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        base = torch.where(most.isfinite(), most, 0.0)
        total = torch.exp(x - base)
        dist.all_reduce(total, group=group)
        out = base + torch.log(total)
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, out = ctx.saved_tensors
        return grad * share_of(x, out), None


def share_of(x: Tensor, total: Tensor) -> Tensor:
    """exp(x - total): a part's weight in a log-sum-exp, 0 of nothing."""
    return torch.where(torch.isneginf(x), 0.0, torch.exp(x - total))


def gather_for_partial(x: Tensor, sizes: Sequence[int], group: Group, factor: float = 1.0) -> Tensor:
    """Own rows -> rows of all ranks, whose gradients are partial: a reduce-scatter returns their sum, times factor."""
    out: Tensor = _GatherForPartial.apply(x, sizes, group, factor)
    return out


def gather_for_replicated(x: Tensor, sizes: Sequence[int], group: Group, factor: float = 1.0) -> Tensor:
    """Own rows -> rows of all ranks, whose gradients are replicated: own rows are taken of them, times factor."""
    out: Tensor = _GatherForReplicated.apply(x, sizes, group, factor)
    return out


def take_own(x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """Replicated rows -> own rows, whose gradients are gathered again."""
    out: Tensor = _TakeOwn.apply(x, sizes, group)
    return out


def sum_of(x: Tensor, group: Group) -> Tensor:
    """Partial -> their sum, replicated."""
    out: Tensor = _Sum.apply(x, group)
    return out


def log_sum_exp(x: Tensor, group: Group) -> Tensor:
    """Partial -> log of the sum of their exponentials, replicated; -inf is nothing."""
    out: Tensor = _LogSumExp.apply(x, group)
    return out


def attach(x: Tensor, *others: Tensor) -> Tensor:
    """x, whose backward reaches ``others`` too, with nothing for them.

    A rank with no rows of its own still has to answer the collectives of backward: what it does not read must be in
    its graph.
    """
    out: Tensor = _Attach.apply(x, *others)
    return out
