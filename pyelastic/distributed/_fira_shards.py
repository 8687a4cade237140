"""Where the parts of a sharded matrix and of its state lie: DTensors as ``fully_shard`` makes them, cut by rows.

==================== ================ ====================== ======================
of a matrix [m, n]   shape            projector on the right projector on the left
==================== ================ ====================== ======================
exp_avg, exp_avg_sq  as in one process Shard(0): [m, r]      Shard(1): [r, n]
their scales         [L, blocks]       Shard(0)              Shard(0)
projector            as in one process on every rank: [r, n] Shard(0): [m, r]
remainder            [m, n]            Shard(0)              Shard(0)
the rest             0-d, [r, r]       on every rank         on every rank
==================== ================ ====================== ======================

All shapes are global, so a checkpoint fits any number of ranks, and the state of a whole parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

EXPECTED = "expected Shard(0) on one dimension of the mesh and Replicate() on others, as fully_shard makes it"


@dataclass(frozen=True)
class Shards:
    """A matrix [m, n] over ``world`` ranks, of which this is ``rank``; or whole on each (``group`` None, world 1)."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    dim: int | None  # of the mesh, along which it is sharded
    group: dist.ProcessGroup | None
    world: int
    rank: int
    m: int
    n: int

    def each(self, size: int) -> int:
        """How DTensor cuts ``size``: so many to a rank, fewer or none to the last ones."""
        return -(-size // self.world)

    def part(self, size: int) -> slice:
        """This rank's of ``size``."""
        each = self.each(size)
        return slice(min(self.rank * each, size), min((self.rank + 1) * each, size))

    def count(self, size: int) -> int:
        part = self.part(size)
        return int(part.stop - part.start)

    def wrap(self, local: Tensor, size: int, dim: int) -> Tensor:
        """A DTensor whose dimension ``dim`` has ``size`` entries over all ranks."""
        placements = [Shard(dim) if i == self.dim else Replicate() for i in range(self.mesh.ndim)]
        shape = torch.Size(size if i == dim else n for i, n in enumerate(local.shape))
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return DTensor.from_local(
            local.contiguous(), self.mesh, placements, run_check=False, shape=shape, stride=stride
        )


def shards_of(p: Tensor) -> Shards:
    """Of a matrix, or of a parameter [m, ...] taken as one. ValueError: it lies otherwise than we handle."""
    p = cast(DTensor, p)
    if p.to_local().device.type != p.device_mesh.device_type:
        raise ValueError(
            f"fira: a projected parameter lies on {p.to_local().device}, its mesh on {p.device_mesh.device_type}; "
            "expected one device. Not written: fully_shard's CPU offload"
        )
    dims = [i for i, placement in enumerate(p.placements) if type(placement) is Shard and placement.dim == 0]
    if len(dims) > 1 or any(not placement.is_replicate() for i, placement in enumerate(p.placements) if i not in dims):
        raise ValueError(
            f"fira: a projected parameter {list(p.shape)} has placements {p.placements}; {EXPECTED}. Not written: "
            "Shard(1), tensor parallelism and other cuts of a matrix in two directions; put it into a group without "
            "`rank`, which is Adam, whose shards may be any"
        )
    m, n = p.shape[0], math.prod(p.shape[1:])
    if not dims:
        return Shards(p.device_mesh, tuple(p.placements), None, None, 1, 0, m, n)
    dim = dims[0]
    group, world = p.device_mesh.get_group(dim), p.device_mesh.size(dim)
    return Shards(p.device_mesh, tuple(p.placements), dim, group, world, p.device_mesh.get_local_rank(dim), m, n)


def local(x: Tensor) -> Tensor:
    """A DTensor's part on this rank, which shares its memory; another tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def gradient_of(p: Tensor) -> Tensor:
    """This rank's part of the gradient. ValueError: it is cut otherwise than its parameter, or a partial sum."""
    p, grad = cast(DTensor, p), cast(DTensor, p.grad)
    if not isinstance(grad, DTensor) or tuple(grad.placements) != tuple(p.placements):
        got = getattr(grad, "placements", "no DTensor")
        raise ValueError(f"fira: the gradient of a parameter with placements {p.placements} has {got}; expected them")
    return grad.to_local()


def matrix(x: Tensor) -> Tensor:
    """Rows [k, ...] as [k, rest]; k may be 0, of which reshape could not tell the rest."""
    return x if x.ndim == 2 else x.reshape(x.shape[0], math.prod(x.shape[1:]))


def cut_of(key: str, left: bool) -> int | None:
    """The dimension along which a state tensor is cut; None: every rank has all of it."""
    if key in ("exp_avg", "exp_avg_sq"):
        return 1 if left else 0
    if key in ("exp_avg_scale", "exp_avg_sq_scale", "remainder"):
        return 0
    return 0 if key == "projector" and left else None


def local_state(state: dict[str, Any]) -> dict[str, Any]:
    return {key: local(value) if isinstance(value, Tensor) else value for key, value in state.items()}


def global_state(shards: Shards, state: dict[str, Any]) -> dict[str, Any]:
    """What ``local_state`` gave, or a later form of it, as DTensors."""
    left = bool(state["left"])
    out = dict(state)
    for key, value in state.items():
        dim = cut_of(key, left)
        if dim is None:
            continue
        size = shards.n if left and key not in ("projector", "remainder") else shards.m
        out[key] = shards.wrap(value, size, dim)
    return out


def restored(p: Tensor, key: str, value: Tensor, left: bool | None) -> Tensor:
    """A loaded state tensor in the form that ``p`` wants: whole or cut. ``left``: of a projected matrix; None: dense.

    A DTensor for a plain parameter is gathered, in which all its ranks must take part. ValueError: on another mesh.
    """
    if not isinstance(p, DTensor):
        return value.full_tensor() if isinstance(value, DTensor) else value
    dense = left is None and key in ("exp_avg", "exp_avg_sq")
    dim = None if left is None else cut_of(key, left)
    if isinstance(value, DTensor):
        if value.device_mesh != p.device_mesh:
            raise ValueError(
                f"fira: loaded {key} lies on {value.device_mesh}, its parameter on {p.device_mesh}; load through "
                "torch.distributed.checkpoint, which cuts it anew"
            )
        return value
    if dense:
        return _cut(p, value)
    if dim is None:
        return value
    shards = shards_of(p)
    part = shards.part(value.shape[dim])
    return shards.wrap(value.narrow(dim, part.start, part.stop - part.start).clone(), value.shape[dim], dim)


def _cut(p: DTensor, value: Tensor) -> Tensor:
    """Cut as ``p``, from a whole that every rank has."""
    whole = DTensor.from_local(value, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
    return whole.redistribute(p.device_mesh, p.placements)
