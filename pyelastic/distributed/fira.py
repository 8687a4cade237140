"""Fira's step of matrices that ``fully_shard`` cut by rows (DTensor, Shard(0)); pyelastic.optim.Fira calls it.

Formulas and names: pyelastic/eager/fira.py. With the projector on the right the vectors are rows, which a rank has
whole: only |S|^2, a sum over all of them, is communicated. On the left the vectors are columns, of which each rank has
a part of every one: ``R = G^T P`` and ``|x_j|^2`` are sums over ranks, reduced to the rank that has column j's moments,
and ``C_j, f_j`` gathered from there. A step, for all matrices together::

    1  R^T and |x|^2 of the left ones [r + 1, n]      reduce-scatter over columns
    2  moments, N, phi; each rank's share of |S|^2    one all-reduce of a number a matrix (three with PER_MATRIX)
    3  C^T and f of the left ones [r + 1, n]          all-gather
    4  W <- k W - k step (C P^T + f X)                on each rank's rows

with |S|^2 from |x|^2 - 2 a_r |R|^2 + a_r^2 R^T P^T P R, as in the kernels, but for rows and a_r near 1, where that
cancels and the residual is formed. Refreshes: pyelastic/distributed/_fira_refresh.py. Bytes, limits:
docs/distributed_fira.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from pyelastic.distributed import _collectives as comm
from pyelastic.distributed._fira_refresh import Matrix, refresh
from pyelastic.distributed._fira_shards import global_state, gradient_of, local, local_state, matrix, shards_of
from pyelastic.eager import fira as eager
from pyelastic.eager.fira import NORM_EPS, Flags, Stored
from pyelastic.ops.fira import MODES

BUCKET = 1 << 25  # elements of the left matrices' R that travel, and are whole on a rank, at a time


def norm(grads: Sequence[Tensor]) -> Tensor:
    """The norm over all ranks of all gradients, DTensors of any sharding; float64. One all-reduce a sharded mesh."""
    sums: dict[tuple[Any, ...], Tensor] = {}
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for g in grads:
        assert isinstance(g, DTensor)
        dims = tuple(i for i, placement in enumerate(g.placements) if not placement.is_replicate())
        if any(g.placements[i].is_partial() for i in dims):
            raise ValueError(f"fira: a gradient has placements {g.placements}; expected none that is partial")
        key = (g.device_mesh, dims)
        x = g.to_local()
        square = torch.linalg.vector_norm(x, dtype=eager.compute_dtype(x)).double().square()
        sums[key] = sums[key] + square if key in sums else square
        groups[key] = [g.device_mesh.get_group(i) for i in dims]
    for key, total in sums.items():
        for group in groups[key]:
            dist.all_reduce(total, group=group)
    return torch.stack(list(sums.values())).sum().sqrt()


def agree(found_inf: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The largest over all ranks that share a parameter: else one would skip a step that others take."""
    if isinstance(found_inf, DTensor):
        found_inf = found_inf.full_tensor()
    out = found_inf.clone().view(())
    for mesh in {p.device_mesh: None for p in params if isinstance(p, DTensor)}:
        out = out.to(mesh.device_type)
        for dim in range(mesh.ndim):
            dist.all_reduce(out, dist.ReduceOp.MAX, group=mesh.get_group(dim))
    return out


def local_parts(
    params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[dict[str, Any]]
) -> tuple[list[Tensor], list[Tensor], list[dict[str, Any]]]:
    """What a rank has of dense parameters, sharing memory: for an elementwise step in place."""
    own = [gradient_of(p) if isinstance(p, DTensor) else g for p, g in zip(params, grads, strict=True)]
    return [local(p) for p in params], own, [local_state(s) for s in states]


# --- the step -----------------------------------------------------------------------------------------------------


@dataclass
class _Work:
    """A matrix on its way through a step, in vector view [L, d]; L, d this rank's."""

    matrix: Matrix
    left: bool
    a_r: float
    a_n: float
    a_s: float
    flags: int
    lr: Tensor
    seed: int  # of stochastic rounding
    scale: Tensor | None  # of the gradient: clipping, unscaling, maximize
    found_inf: Tensor | None
    alone: bool = field(init=False)  # C is not needed: the update is f X
    r: Tensor = field(init=False)
    n: Tensor = field(init=False)
    phi: Tensor = field(init=False)
    squares: Tensor = field(init=False)  # |x_j|^2, then |q_j|^2; float64
    taken: Tensor = field(init=False)
    stored: Stored = field(init=False)

    def __post_init__(self) -> None:
        self.alone = self.a_n == 0 and self.a_r * self.a_s == 0

    @property
    def dtype(self) -> torch.dtype:
        return eager.compute_dtype(self.matrix.w)

    @property
    def rank(self) -> int:
        p = self.matrix.state["projector"]
        return int(p.shape[1] if self.left else p.shape[0])

    @property
    def basis(self) -> Tensor:
        """[d, r], on the left this rank's rows of it."""
        p: Tensor = self.matrix.state["projector"]
        return (p if self.left else p.mT).to(self.dtype)

    @property
    def x(self) -> Tensor:
        """[m_local, n], not scaled."""
        return self.matrix.g.to(self.dtype)

    def scaled(self, x: Tensor, power: int = 1) -> Tensor:
        return x if self.scale is None else x * self.scale.to(x.dtype) ** power

    # What a left matrix sends and receives: rows over all n columns.

    def sent_rows(self) -> int:
        return self.rank + (self.a_s != 0)

    def gathered_rows(self) -> int:
        per_vector = self.a_s != 0 and not self.flags & Flags.PER_MATRIX
        return (0 if self.alone else self.rank) + per_vector * (1 if self.travels == self.dtype else 2)

    @property
    def travels(self) -> torch.dtype:
        """What C is gathered in: bfloat16 for such weights, where f goes as two of them."""
        return torch.bfloat16 if self.matrix.w.dtype == torch.bfloat16 else self.dtype


def step(
    optimizer: Any, items: Sequence[tuple[Tensor, dict[str, Any]]], places: dict[Tensor, tuple[int, float]],
    factors: dict[torch.device, Tensor | None], found_infs: dict[torch.device, Tensor | None],
) -> None:  # fmt: skip
    """One step of the projected DTensors ``items``, in place; every rank calls it with the same ones, in one order.

    Raises ValueError for placements that are not those of ``fully_shard``.
    """
    matrices = []
    for p, group in items:
        shards = shards_of(p)
        w, g = matrix(local(p)), matrix(gradient_of(p).to(p.dtype))
        number, place = places[p]
        matrices.append(Matrix(shards, group, local_state(optimizer.state[p]), w, g, number, place))
    refresh(optimizer, matrices)
    work = []
    for (p, _), made in zip(items, matrices, strict=True):
        state = optimizer.state[p]
        if made.renewed:
            state.clear()
            state.update(global_state(made.shards, made.state))
            made.state = local_state(state)
        state["schedule"] = made.state["schedule"]
        work.append(_work(optimizer, made, factors[p.device], found_infs[p.device]))

    rights, lefts = [x for x in work if not x.left], _buckets([x for x in work if x.left])
    for x in rights:
        x.r = x.scaled(x.x @ x.basis)
        x.squares = _rows_squares(x)
        _moments(x)
    for bucket in lefts:
        _reduce(bucket)
        for x in bucket:
            _moments(x)
    _limit([x for x in work if x.a_s != 0])
    for x in rights:
        f = x.phi if x.a_s != 0 else None
        update = torch.zeros_like(x.x) if x.alone else _coefficients(x) @ x.basis.mT
        _apply(x, update if f is None else update.addcmul_(x.scaled(f), x.x))
    for bucket in lefts:
        for x, (coefficients, f) in zip(bucket, _gather(bucket), strict=True):
            update = torch.zeros_like(x.x) if coefficients is None else x.basis @ coefficients
            _apply(x, update if f is None else update.addcmul_(x.scaled(f), x.x))
    for (p, _), made in zip(items, matrices, strict=True):
        if made.w.data_ptr() != local(p).data_ptr():  # a layout without a matrix view: the step ran on a copy
            local(p).copy_(made.w.view(local(p).shape))


def _work(optimizer: Any, x: Matrix, factor: Tensor | None, found_inf: Tensor | None) -> _Work:
    group = x.group
    flags = Flags.PAPER * (group["mode"] == "paper") | Flags.CORRECT_BIAS * group["correct_bias"]
    flags |= Flags.PER_MATRIX * group["per_matrix"] | Flags.COLLAPSE * group["collapse"]
    flags |= Flags.STOCHASTIC * (group["weight_rounding"] == "stochastic" and x.w.dtype == torch.bfloat16)
    lr = torch.as_tensor(group["lr"], dtype=torch.float64, device=x.w.device).view(())
    scale = factor
    if group["maximize"]:
        scale = torch.full((), -1.0, dtype=torch.float64, device=x.w.device) if factor is None else -factor
    coefficients = MODES[group["mode"]](optimizer._alpha(group))
    seed = optimizer._seed_of(x.number, 0)
    return _Work(x, bool(x.state["left"]), *coefficients, int(flags), lr, seed, scale, found_inf)


def _rows_squares(x: _Work) -> Tensor:
    """|x_j|^2 of rows, or |q_j|^2 where it cannot be had from that without loss."""
    if x.a_s == 0:
        return x.r.new_zeros(x.r.shape[0], dtype=torch.float64)
    if "gram" in x.matrix.state and x.a_r != 0:
        q = torch.addmm(x.scaled(x.x), x.r, x.basis.mT, alpha=-x.a_r)
        return _square_norms(q, 1)
    return x.scaled(_square_norms(x.x, 1), 2)


def _square_norms(x: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64).square()


def _moments(x: _Work) -> None:
    """From R and |x_j|^2 to moments, N, phi and |q_j|^2."""
    group, state = x.matrix.group, x.matrix.state
    scales = [state["exp_avg_scale"], state["exp_avg_sq_scale"]] if "exp_avg_scale" in state else []
    beta1, beta2 = group["betas"]
    x.taken = state["step"] + 1
    x.n, x.stored = eager.advance(
        x.r, state["exp_avg"], state["exp_avg_sq"], scales, x.left, beta1, beta2, group["eps"]
    )
    eager.store(x.stored, x.found_inf)
    x.stored = []  # not kept until the end: copies of the moments of all matrices at once
    if x.flags & Flags.PAPER:
        x.n = x.n * eager.bias_correction(x.taken, beta1, beta2, x.flags).to(x.dtype)
    if x.a_s == 0:
        return
    if x.a_r != 0 and (x.left or "gram" not in state):
        lengths = _square_norms(x.r, 1)
        inside = (x.r @ state["gram"] * x.r).double().sum(1) if "gram" in state else lengths
        x.squares = torch.clamp(x.squares - 2 * x.a_r * lengths + x.a_r**2 * inside, min=0)
    if not x.flags & Flags.PER_MATRIX:
        length = torch.linalg.vector_norm
        x.phi = length(x.n, dim=1, keepdim=True) / (length(x.r, dim=1, keepdim=True) + NORM_EPS)


def _limit(work: Sequence[_Work]) -> None:
    """phi -> f = a_s phi / lim, and the norm to keep. One all-reduce for all matrices that share their ranks."""
    by_group: dict[Any, list[_Work]] = {}
    for x in work:
        by_group.setdefault((x.matrix.shards.group, x.matrix.w.device), []).append(x)
    for (group, _), same in by_group.items():
        parts: list[Tensor] = []
        for x in same:
            if x.flags & Flags.PER_MATRIX:
                parts += [x.squares.sum(), _square_norms(x.n.flatten(), 0), _square_norms(x.r.flatten(), 0)]
            else:
                parts.append((x.phi[:, 0].double().square() * x.squares).sum())
        sums = torch.stack(parts)
        if same[0].matrix.shards.world > 1:
            dist.all_reduce(sums, group=group)
        numbers = iter(sums.unbind())
        for x in same:
            square = next(numbers)
            if x.flags & Flags.PER_MATRIX:
                phi = next(numbers).sqrt() / (next(numbers).sqrt() + NORM_EPS)
                square = square * phi.square()
                x.phi = phi.to(x.dtype).view(1, 1)
            before = x.matrix.state["scaling_grad"]
            lim, kept = eager.limit(square.sqrt(), before.double(), x.matrix.group["gamma"] or 0.0, x.flags)
            x.stored.append((before, kept))
            x.phi = x.a_s * x.phi / lim.to(x.dtype)


# --- left: what moves ---------------------------------------------------------------------------------------------


def _buckets(work: Sequence[_Work]) -> list[list[_Work]]:
    """Matrices whose parts travel together: of the same ranks and dtypes, up to BUCKET elements of [r + 1, n]."""
    buckets: list[list[_Work]] = []
    open_ones: dict[Any, tuple[list[_Work], int]] = {}
    for x in work:
        key = (x.matrix.shards.group, x.matrix.w.device, x.dtype, x.travels)
        bucket, size = open_ones.get(key, ([], 0))
        more = x.sent_rows() * x.matrix.shards.n
        if not bucket or size + more > BUCKET:
            bucket, size = [], 0
            buckets.append(bucket)
        bucket.append(x)
        open_ones[key] = (bucket, size + more)
    return buckets


def _views(flat: Tensor, bucket: Sequence[_Work], rows: Callable[[_Work], int]) -> list[Tensor]:
    """[..., all elements] as one [..., rows, columns of a rank] for each matrix."""
    sizes = [(rows(x), x.matrix.shards.each(x.matrix.shards.n)) for x in bucket]
    parts = flat.split([a * b for a, b in sizes], dim=-1)
    return [part.view(*flat.shape[:-1], *size) for part, size in zip(parts, sizes, strict=True)]


def _length(bucket: Sequence[_Work], rows: Callable[[_Work], int]) -> int:
    return sum(rows(x) * x.matrix.shards.each(x.matrix.shards.n) for x in bucket)


def _reduce(bucket: Sequence[_Work]) -> None:
    """R and |x_j|^2 of this rank's columns j, from all ranks' rows."""
    first, shards = bucket[0], bucket[0].matrix.shards
    buffer = first.matrix.w.new_zeros(shards.world, _length(bucket, _Work.sent_rows), dtype=first.dtype)
    for x, view in zip(bucket, _views(buffer, bucket, _Work.sent_rows), strict=True):
        parts = x.scaled(x.basis.mT @ x.x)
        if x.a_s != 0:
            squares = x.scaled(_square_norms(x.x, 0), 2)
            parts = torch.cat((parts, squares.to(x.dtype)[None]))
        columns = shards.world * view.shape[2]
        parts = pad(parts, (0, columns - parts.shape[1]))
        view.copy_(parts.view(len(parts), shards.world, -1).transpose(0, 1))
    own = buffer[0]
    if shards.world > 1:
        own = torch.empty_like(own)
        comm._reduce_scatter(own, buffer.flatten(), shards.group)
    for x, view in zip(bucket, _views(own, bucket, _Work.sent_rows), strict=True):
        mine = view[:, : x.matrix.shards.count(x.matrix.shards.n)]
        x.r = mine[: x.rank].mT
        x.squares = mine[-1].double()


def _gather(bucket: Sequence[_Work]) -> list[tuple[Tensor | None, Tensor | None]]:
    """Of every matrix C^T [r, n] and f [1, n] (or [1, 1]), of all columns; None where the step needs none."""
    first, shards = bucket[0], bucket[0].matrix.shards
    own = first.matrix.w.new_zeros(_length(bucket, _Work.gathered_rows), dtype=first.travels)
    for x, view in zip(bucket, _views(own, bucket, _Work.gathered_rows), strict=True):
        mine = view[:, : x.matrix.shards.count(x.matrix.shards.n)]
        if not x.alone:
            mine[: x.rank] = _coefficients(x).mT
        rest = mine[0 if x.alone else x.rank :]
        if len(rest):
            mine_f = x.phi[:, 0]
            rest[0] = mine_f
            if len(rest) > 1:
                rest[1] = mine_f - rest[0].to(x.dtype)  # what bfloat16 cut off
    everything = own[None]
    if shards.world > 1 and own.numel():
        everything = own.new_empty(shards.world, len(own))
        dist.all_gather_into_tensor(everything.view(-1), own, group=shards.group)
    out: list[tuple[Tensor | None, Tensor | None]] = []
    for x, view in zip(bucket, _views(everything, bucket, _Work.gathered_rows), strict=True):
        whole = view.transpose(0, 1).flatten(1)[:, : x.matrix.shards.n].to(x.dtype)
        rank = 0 if x.alone else x.rank
        f: Tensor | None = x.phi if x.a_s != 0 else None
        if len(whole) > rank:
            f = whole[rank:].sum(0, keepdim=True)
        out.append((None if x.alone else whole[:rank], f))
    return out


# --- the update -----------------------------------------------------------------------------------------------------


def _coefficients(x: _Work) -> Tensor:
    """C [L, r]."""
    c = x.a_n * x.n
    return c if x.a_s * x.a_r == 0 else c - x.a_r * x.phi * x.r


def _apply(x: _Work, update: Tensor) -> None:
    """The weight, the step count and the limiter's norm."""
    group, state, w = x.matrix.group, x.matrix.state, x.matrix.w
    size = x.lr
    if not x.flags & Flags.PAPER:
        size = size * eager.bias_correction(x.taken, group["betas"][0], group["betas"][1], x.flags)
    keep = 1.0 - x.lr.to(x.dtype) * group["weight_decay"]
    remainder = state.get("remainder")
    base = w.to(x.dtype) if remainder is None else w.to(x.dtype) + remainder.to(x.dtype)
    new = keep * (base - size.to(x.dtype) * update)
    first = x.matrix.shards.part(x.matrix.shards.m).start * x.matrix.shards.n
    x.stored += eager.rounded(new, w, remainder, x.flags, x.seed, x.taken, first)
    x.stored.append((state["step"], x.taken))
    eager.store(x.stored, x.found_inf)
