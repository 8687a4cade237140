"""Bases of sharded matrices: each is found by one rank, its owner, from the gathered gradient, and broadcast.

Matrices that are due go by cost in rounds of one a rank, so a rank never holds more than one whole gradient, and all
ranks work at once. ``random`` needs no gradient: every rank draws it from the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyelastic.distributed._fira_shards import Shards
from pyelastic.eager import fira as eager
from pyelastic.optim import _refresh, projectors

NOTHING, FOUND, FAILED = 0.0, 1.0, 2.0  # the head of a broadcast


@dataclass
class Matrix:
    """A matrix of the step: this rank's rows of weight and gradient, and its state as local tensors."""

    shards: Shards
    group: dict[str, Any]
    state: dict[str, Any]
    w: Tensor
    g: Tensor
    number: int
    place: float
    renewed: bool = False  # tensors of the state were replaced

    def like(self) -> Tensor:
        """Of the shape, dtype and device of the whole gradient, and of no memory."""
        return self.g.new_zeros(()).expand(self.shards.m, self.shards.n)


@dataclass
class _Job:
    matrix: Matrix
    due: _refresh.Due

    @property
    def old_rank(self) -> int:
        """The columns of the basis before."""
        if not self.due.warm:
            return 0
        p = self.matrix.state["projector"]
        return int(p.shape[1] if self.due.left else p.shape[0])

    def turns(self, optimizer: Any) -> bool:
        group = self.matrix.group
        rotates = group["moment_transfer"] == "rotate" or optimizer._adaptive_gap
        return self.due.warm and (rotates or self.old_rank != self.due.rank)

    def wants_previous(self, optimizer: Any) -> bool:
        projector = self.matrix.group["projector"]
        return self.due.warm and (self.turns(optimizer) or callable(projector) or projector == "subspace")


def refresh(optimizer: Any, matrices: Sequence[Matrix]) -> None:
    """Count the call of each matrix, and refresh the bases that are due. All ranks call it with the same matrices.

    Raises what an owner's projector raises, on the owner, and RuntimeError with its text on the other ranks.
    """
    jobs = []
    for x in matrices:
        due = _refresh.plan(optimizer, x.state, (x.shards.m, x.shards.n), x.group, x.number)
        if due is not None:
            jobs.append(_Job(x, due))
    by_group: dict[Any, list[_Job]] = {}
    for job in jobs:
        if job.matrix.group["projector"] == "random" and not job.turns(optimizer):
            basis = projectors.random(job.matrix.like(), None, job.due.rank, job.due.left, job.due.seed)
            _settle(optimizer, job, _refresh.Found(basis, True, None))
        else:
            by_group.setdefault(job.matrix.shards.group, []).append(job)
    for same in by_group.values():
        same.sort(key=lambda job: -job.matrix.shards.m * job.matrix.shards.n * job.due.rank)  # stable: as on all ranks
        world = same[0].matrix.shards.world
        for first in range(0, len(same), world):
            _round(optimizer, same[first : first + world])


def _round(optimizer: Any, jobs: Sequence[_Job]) -> None:
    """One matrix a rank: gather to the owners, compute, broadcast in the owners' order."""
    mine: list[tuple[_Job, Tensor, Tensor | None]] = []
    for owner, job in enumerate(jobs):
        gathered = _gather(optimizer, job, owner)
        if gathered is not None:
            mine.append((job, *gathered))
    outcome: tuple[Tensor, Exception | None] | None = None
    for job, g, previous in mine:
        outcome = _compute(optimizer, job, g, previous)
    del mine
    for owner, job in enumerate(jobs):
        _receive(optimizer, job, owner, outcome)


def _gather(optimizer: Any, job: _Job, owner: int) -> tuple[Tensor, Tensor | None] | None:
    """The whole gradient and, where the projector or the moments ask for it, the basis before; None elsewhere."""
    x, shards = job.matrix, job.matrix.shards
    previous = None
    if job.wants_previous(optimizer):
        previous = x.state["projector"] if job.due.left else x.state["projector"].mT
    if shards.world == 1:
        return x.g, previous
    rows = x.g if previous is None or not job.due.left else torch.cat((x.g, previous), 1)
    each = shards.each(shards.m)
    padded = rows.new_zeros(each, rows.shape[1])
    padded[: len(rows)] = rows
    own = shards.rank == owner
    whole = rows.new_empty(shards.world, each, rows.shape[1]) if own else None
    assert shards.group is not None
    dist.gather(
        padded, None if whole is None else list(whole), dst=dist.get_global_rank(shards.group, owner),
        group=shards.group,
    )  # fmt: skip
    if whole is None:
        return None
    g = whole.flatten(0, 1)[: shards.m]
    if previous is not None and job.due.left:
        g, previous = g[:, : shards.n], g[:, shards.n :].contiguous()
    return g.contiguous(), previous


def _sizes(optimizer: Any, job: _Job) -> tuple[int, int]:
    """Numbers of the basis and of the turn in a broadcast, after its head."""
    d = job.matrix.shards.m if job.due.left else job.matrix.shards.n
    return d * job.due.rank, job.due.rank * job.old_rank if job.turns(optimizer) else 0


def _compute(optimizer: Any, job: _Job, g: Tensor, previous: Tensor | None) -> tuple[Tensor, Exception | None]:
    """What to broadcast, and what went wrong: raised after the broadcast, for which the other ranks wait."""
    x, due = job.matrix, job.due
    size, turn_size = _sizes(optimizer, job)
    out = torch.zeros(1 + size + turn_size, dtype=eager.compute_dtype(x.w), device=x.w.device)
    try:
        basis = projectors.refresh(x.group["projector"], g, previous, due.rank, due.left, due.seed)
        if basis is None:
            return out, None
        if basis.numel() != size or basis.shape[-1] != due.rank:
            d = size // due.rank
            raise ValueError(f"fira: the projector gave {list(basis.shape)}; expected [{d}, {due.rank}]")
        basis = basis.to(out.dtype)
        out[1 : 1 + size] = basis.flatten()
        if turn_size and previous is not None:
            turn = _refresh.turn(optimizer, x.group, basis, previous, x.w.dtype)
            assert turn is not None
            out[1 + size :] = turn.flatten()
        out[0] = FOUND
    except Exception as error:
        out[0] = FAILED
        return out, error
    return out, None


def _receive(optimizer: Any, job: _Job, owner: int, outcome: tuple[Tensor, Exception | None] | None) -> None:
    x, due, shards = job.matrix, job.due, job.matrix.shards
    size, turn_size = _sizes(optimizer, job)
    own = shards.rank == owner
    if own and outcome is not None:
        data, error = outcome
    else:
        data, error = torch.empty(1 + size + turn_size, dtype=eager.compute_dtype(x.w), device=x.w.device), None
    if shards.group is not None and shards.world > 1:
        dist.broadcast(data, dist.get_global_rank(shards.group, owner), group=shards.group)
    if error is not None:
        raise error
    head = float(data[0])
    if head == FAILED:
        raise RuntimeError(f"fira: the projector of a matrix [{shards.m}, {shards.n}] failed on rank {owner}")
    basis = None
    if head == FOUND:
        basis = data[1 : 1 + size].view(-1, due.rank)
    elif not due.warm:
        basis = projectors.random(x.like(), None, due.rank, due.left, due.seed)  # until there is a gradient
    turn = data[1 + size :].view(due.rank, -1) if turn_size and head == FOUND else None
    _settle(optimizer, job, _refresh.Found(basis, head == FOUND, turn))


def _settle(optimizer: Any, job: _Job, found: _refresh.Found) -> None:
    x, shards = job.matrix, job.matrix.shards
    x.renewed = x.renewed or found.basis is not None
    if job.due.left:
        vectors, rows = shards.count(shards.n), shards.part(shards.m)
    else:
        vectors, rows = shards.count(shards.m), None
    _refresh.settle(optimizer, x.w, x.state, x.group, job.due, found, x.place, vectors, rows)
