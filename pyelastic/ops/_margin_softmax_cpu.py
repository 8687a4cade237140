"""Launcher of margin_softmax's CPU kernels: allocate, walk over chunks of classes, call.

Two sweeps over the classes (forward, backward), each a loop of: normalise a chunk of class rows, GEMM, one of our
kernels on the [B, chunk] tile of cosines, and in backward two more GEMMs and the projection of the finished dW rows.
The GEMMs are torch's own BLAS or ours (``_gemm``). The tile is the only array that depends on B and the chunk;
B x C never exists.
Contract of the kernels: csrc/margin_softmax.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyelastic import _extension
from pyelastic.eager.margin_softmax import MOMENTS, RANK, SUM_COS, statistics_dtype
from pyelastic.ops import _gemm
from pyelastic.ops._binding import DTYPES, pointer

# Bytes of the tile of cosines and of one chunk of normalised class rows. Small enough to stay in the L2/L3 share of
# a core, large enough for the BLAS: measured flat between 2 and 8 MiB, docs/ops/margin_softmax.md.
TILE_BYTES = 8 << 20
# Longest sum that one GEMM may take into dE. A BLAS splits a long sum over its threads, and the bits would depend
# on their number; MKL was seen to do so from 512 on, at 256 only for B = 1 or D = 1.
GEMM_DEPTH = 256
# exp(z) needs no running maximum while sum exp(z) stays inside float32: scale + log(C) < 88.7, some kept in hand.
CONSTANT_SHIFT_LIMIT = 80.0


def _chunk(batch: int, dim: int, classes: int, subcenters: int, itemsize: int) -> int:
    """Classes per chunk: a multiple of 64, from shapes alone so that results do not depend on the machine."""
    rows = TILE_BYTES // (max(batch, dim, 1) * itemsize * subcenters)
    return min(classes, max(64, rows // 64 * 64))


class _Chunk(NamedTuple):
    """A chunk of classes: first class, their number, their rows (unit rows unless `in_place`) [n K, D], inverse
    norms [n K] and cosines [B, n K]."""

    first: int
    classes: int
    rows: Tensor
    inverse: Tensor
    cosines: Tensor


class _Problem:
    """Pointers, sizes and scratch shared by the two sweeps."""

    def __init__(
        self,
        embeddings: Tensor,
        weight: Tensor,
        labels: Tensor,
        classes: Tensor | None,
        threshold: Tensor | None,
        hard_map: Tensor | None,
        scale: float,
        subcenters: int,
    ) -> None:
        self.dtype = statistics_dtype(embeddings)
        suffix = "_f64" if self.dtype == torch.float64 else "_f32"
        extension = _extension.load()
        self.call = lambda name, *args: getattr(extension, f"margin_softmax_{name}{suffix}")(*args)
        self.threads = torch.get_num_threads()
        self.weight, self.labels = weight.detach(), labels.contiguous()
        self.batch, self.dim = embeddings.shape
        self.subcenters, self.scale = subcenters, scale
        self.rows_of_class = None if classes is None else self._center_rows(classes)
        self.count = weight.shape[0] // subcenters if classes is None else classes.shape[0]
        self.threshold = None if threshold is None else threshold.to(self.dtype).contiguous()
        self.hard_map = None if hard_map is None else hard_map.to(self.dtype).contiguous()
        self._check_labels()
        # Ignored rows become zero rows, so that nothing they hold can reach a gradient.
        rows = torch.arange(self.batch)
        self.e_hat, self.e_inv = self.normalize(
            embeddings, torch.where(self.labels < 0, -1, rows), self.batch
        )
        # Rows that the BLAS can read as they are enter the GEMM raw; the kernels then scale its columns by 1 / |w|.
        self.in_place = classes is None and weight.dtype == self.dtype and weight.stride(1) == 1
        self.chunk = _chunk(self.batch, self.dim, self.count, subcenters, self.dtype.itemsize)

    def _check_labels(self) -> None:
        bad = (self.labels < -1) | (self.labels >= self.count)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"margin_softmax: the label of row {row} is out of range for {self.count} classes"
            )

    def _center_rows(self, classes: Tensor) -> Tensor:
        """Rows of `weight` [len(classes) * K] that hold the sub-centres of `classes`."""
        return (classes[:, None] * self.subcenters + torch.arange(self.subcenters)).flatten()

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)

    def normalize(
        self, matrix: Tensor, index: Tensor | None, rows: int, first: int = 0, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unit rows [rows, D] and inverse norms [rows] of `matrix[index]` or `matrix[first : first + rows]`."""
        out = self.empty(rows, self.dim) if out is None else out[:rows]
        inverse = self.empty(rows)
        self.call(
            "normalize",
            matrix.data_ptr() + (0 if index is not None else first * matrix.stride(0) * matrix.itemsize),
            DTYPES[matrix.dtype], matrix.stride(0), matrix.stride(1), pointer(index), rows, self.dim,
            out.data_ptr(), inverse.data_ptr(), self.threads,
        )  # fmt: skip
        return out, inverse

    def target_rows(self) -> tuple[Tensor, Tensor]:
        """Unit rows [B * K, D] and inverse norms of the sub-centres of each row's class; 0 for ignored rows."""
        labels = self.labels.clamp(min=0)
        if self.rows_of_class is not None:
            labels = self.rows_of_class[labels * self.subcenters] // self.subcenters
        rows = self._center_rows(labels)
        ignored = (self.labels < 0).repeat_interleave(self.subcenters)
        return self.normalize(self.weight, torch.where(ignored, -1, rows), rows.shape[0])

    def tiles(self, tile: Tensor) -> Iterator[_Chunk]:
        """Compute and yield the tile of each chunk of classes in turn; `tile` is room for one."""
        unit = None if self.in_place else self.empty(self.chunk * self.subcenters, self.dim)
        for first in range(0, self.count, self.chunk):
            n = min(self.chunk, self.count - first)
            begin, width = first * self.subcenters, n * self.subcenters
            if unit is None:
                rows, inverse = self.weight[begin : begin + width], self.empty(width)
                self.call("normalize", rows.data_ptr(), DTYPES[rows.dtype], rows.stride(0), 1, 0, width,
                          self.dim, 0, inverse.data_ptr(), self.threads)  # fmt: skip
            else:
                index = None if self.rows_of_class is None else self.rows_of_class[begin : begin + width]
                rows, inverse = self.normalize(self.weight, index, width, begin, unit)
            cosines = tile[: self.batch * width].view(self.batch, width)
            _gemm.multiply(self.e_hat, rows.t(), cosines)
            yield _Chunk(first, n, rows, inverse, cosines)

    def tile(self) -> Tensor:
        return self.empty(self.batch * self.chunk * self.subcenters)

    def tile_arguments(self, chunk: _Chunk) -> tuple[float, ...]:
        """The leading arguments of the kernels that work on a tile."""
        scale = chunk.inverse.data_ptr() if self.in_place else 0
        return (
            chunk.cosines.data_ptr(), scale, chunk.classes * self.subcenters, self.batch, chunk.classes,
            self.subcenters, chunk.first, self.labels.data_ptr(), pointer(self.threshold),
            pointer(self.hard_map), self.scale,
        )  # fmt: skip


def forward(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    classes: Tensor | None,
    threshold: Tensor | None,
    hard_map: Tensor | None,
    scale: float,
    subcenters: int,
    stats: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The raw op ``margin_softmax_fwd.cpu``: the fields of ``eager.Sweep``, then ``best`` [B] int64, the sub-centre."""
    p = _Problem(embeddings, weight, labels, classes, threshold, hard_map, scale, subcenters)
    theta, best = p.empty(p.batch), torch.empty(p.batch, dtype=torch.int64)
    w_hat_y, _ = p.target_rows()
    p.call("target_angle", p.e_hat.data_ptr(), w_hat_y.data_ptr(), p.batch, subcenters, p.dim,
           theta.data_ptr(), best.data_ptr(), p.threads)  # fmt: skip

    # A running maximum where exp(scale) could leave float32, and for moments, whose squares would.
    online = bool(
        stats & MOMENTS or threshold is not None or scale + math.log(p.count) > CONSTANT_SHIFT_LIMIT
    )
    zeros = {name: torch.zeros(p.batch, dtype=torch.float64) for name in ("sum", "sq", "z", "cos")}
    maximum = torch.full((p.batch,), -math.inf if online else 0.0, dtype=torch.float64)
    rank = torch.zeros(p.batch, dtype=torch.int64)
    max_cos = torch.full((p.batch,), -math.inf, dtype=p.dtype)
    cos_target = torch.cos(theta)
    for chunk in p.tiles(p.tile()):
        p.call(
            "accumulate", *p.tile_arguments(chunk), maximum.data_ptr(),
            zeros["sum"].data_ptr(),
            zeros["sq"].data_ptr() if stats & MOMENTS else 0,
            zeros["z"].data_ptr() if stats & MOMENTS else 0,
            zeros["cos"].data_ptr() if stats & SUM_COS else 0,
            rank.data_ptr() if stats & RANK else 0,
            max_cos.data_ptr(), cos_target.data_ptr(), online, p.threads,
        )  # fmt: skip

    return finish(p.labels, p.count, p.dtype, stats, theta, maximum, zeros, rank, max_cos, best)


def finish(
    labels: Tensor,
    count: int,
    dtype: torch.dtype,
    stats: int,
    theta: Tensor,
    maximum: Tensor,
    sums: dict[str, Tensor],
    rank: Tensor,
    max_cos: Tensor,
    best: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The raw op's results from the running statistics of the kernels (`sums` in float64)."""
    used, none = labels >= 0, theta.new_empty(0)
    if count == 1:  # the only class is the target: what the kernel summed is its mask
        for statistic in sums.values():
            statistic.zero_()
    total = sums["sum"]
    lse_neg = torch.where(used, maximum + torch.log(total), 0.0).to(dtype)
    safe = torch.where(total == 0, 1.0, total)
    return (
        theta,
        lse_neg,
        sums["cos"].to(dtype) if stats & SUM_COS else none,
        torch.where(used, rank, -1) if stats & RANK else rank.new_empty(0),
        torch.where(used, _no_negative(max_cos), 0.0).to(dtype) if stats & RANK else none.clone(),
        (sums["sq"] / safe.square()).to(dtype) if stats & MOMENTS else none.clone(),
        (sums["z"] / safe).to(dtype) if stats & MOMENTS else none.clone(),
        best,
    )


def _no_negative(max_cos: Tensor) -> Tensor:
    """The kernel's mask (-1e30) means that no negative was seen."""
    return torch.where(max_cos < -1e29, -math.inf, max_cos)


def backward(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    classes: Tensor | None,
    threshold: Tensor | None,
    hard_map: Tensor | None,
    scale: float,
    subcenters: int,
    theta: Tensor,
    lse_neg: Tensor,
    best: Tensor,
    grad_theta: Tensor,
    grad_lse: Tensor,
    grad_sum: Tensor | None,
    need_embeddings: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The raw op ``margin_softmax_bwd.cpu``: dE like ``embeddings`` and dW [n * K, D] (compact with ``classes``)."""
    p = _Problem(embeddings, weight, labels, classes, threshold, hard_map, scale, subcenters)
    if classes is not None:
        grad_weight = weight.new_empty(p.count * subcenters if need_weight else 0, p.dim)
    else:
        grad_weight = torch.empty_like(weight) if need_weight else weight.new_empty(0, p.dim)
    grad_embeddings = torch.empty_like(embeddings) if need_embeddings else embeddings.new_empty(0, p.dim)
    grad_theta, grad_lse = grad_theta.to(p.dtype).contiguous(), grad_lse.to(p.dtype).contiguous()
    grad_sum = None if grad_sum is None else grad_sum.to(p.dtype).contiguous()
    nearest = torch.arange(p.batch) * subcenters + best
    w_hat_y, w_inv_y = (candidates[nearest] for candidates in p.target_rows())
    # What joins dW in its chunk carries the same factor as the tile there.
    grad_theta_w = grad_theta * w_inv_y if p.in_place else grad_theta
    center = torch.where(p.labels < 0, -1, p.labels * subcenters + best)

    d_e = torch.zeros(p.batch, p.dim, dtype=p.dtype)
    direct = need_weight and grad_weight.dtype == p.dtype and grad_weight.is_contiguous()
    room = p.empty(0 if direct or not need_weight else p.chunk * subcenters, p.dim)
    for chunk in p.tiles(p.tile()):
        p.call("gradient", *p.tile_arguments(chunk), lse_neg.data_ptr(), grad_lse.data_ptr(),
               pointer(grad_sum), p.threads)  # fmt: skip
        if need_embeddings:
            _gemm.multiply(chunk.cosines, chunk.rows, d_e, add=True, step=GEMM_DEPTH)
        if not need_weight:
            continue
        begin, width = chunk.first * subcenters, chunk.classes * subcenters
        out = grad_weight[begin : begin + width]
        d_w = out if direct else room[:width]
        _gemm.multiply(chunk.cosines.t(), p.e_hat, d_w)
        p.call("add_target", w_hat_y.data_ptr(), p.e_hat.data_ptr(), theta.data_ptr(),
               grad_theta_w.data_ptr(), center.data_ptr(), p.batch, p.dim, begin, width, d_w.data_ptr(),
               p.threads)  # fmt: skip
        _project(p, d_w, chunk.rows, p.in_place, chunk.inverse, out)
    if need_embeddings:
        rows_index = torch.arange(p.batch)
        p.call("add_target", p.e_hat.data_ptr(), w_hat_y.data_ptr(), theta.data_ptr(),
               grad_theta.data_ptr(), rows_index.data_ptr(), p.batch, p.dim, 0, p.batch,
               d_e.data_ptr(), p.threads)  # fmt: skip
        _project(p, d_e, p.e_hat, False, p.e_inv, grad_embeddings)
    return grad_embeddings, grad_weight


def _project(p: _Problem, d: Tensor, rows: Tensor, raw: bool, inverse: Tensor, out: Tensor) -> None:
    p.call("project", d.data_ptr(), rows.data_ptr(), rows.stride(0), not raw, inverse.data_ptr(), d.shape[0],
           p.dim, out.data_ptr(), DTYPES[out.dtype], out.stride(0), out.stride(1), p.threads)  # fmt: skip
