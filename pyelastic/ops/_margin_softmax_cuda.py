"""Launcher of margin_softmax's CUDA kernels: allocate on the current stream, walk over chunks of classes, call.

As the CPU's (same two sweeps), with operands of the GEMMs in float32 or float16. float16 operands, whose products
are summed in float32, are used where an input is 16-bit, or where ``torch.set_float32_matmul_precision`` (or
``torch.backends.cuda.matmul.fp32_precision``) allows less than the highest: they have the mantissa of TF32. They go
through our tensor-core kernels, which keep the cosines in registers; float32 operands through torch's GEMM. Nothing
here synchronises, so a step can be captured in a CUDA graph. Contract of the kernels: csrc/margin_softmax.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyelastic import _extension
from pyelastic.eager.margin_softmax import MOMENTS, SUM_COS
from pyelastic.ops._binding import DTYPES, pointer
from pyelastic.ops._margin_softmax_cpu import finish

# Bytes of a tile of cosines (or of P) and of a chunk of unit rows: 40 % of an H200's L2, half of an A100's.
# An estimate: not yet measured on a GPU.
TILE_BYTES = 20 << 20
TILE = 128  # classes, of the tensor-core kernels
# Parts of the sum over classes in dE, each with an accumulator of its own: B x D alone has too few tiles for a GPU.
SPLITS = 4
GRADIENT_SCALE = 2.0**14  # kGradientScale of the contract
OPERAND_SCALE = 2.0**10  # unit rows times at most 1, in float16: away from its subnormals
NONE = -1e30  # kNone: the maximum of no negative
SUMS = {"sum": 0, "sq": MOMENTS, "z": MOMENTS, "cos": SUM_COS}  # statistic -> bit that asks for it


def half_operands(embeddings: Tensor, weight: Tensor) -> bool:
    """Whether the GEMMs take float16 operands."""
    if torch.float32 not in (embeddings.dtype, weight.dtype) or embeddings.dtype != weight.dtype:
        return True
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 the older question is an error once the newer setting has been used.
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision not in ("ieee", "none")
    return torch.get_float32_matmul_precision() != "highest"


def _matrix(x: Tensor, index: Tensor | None = None, rows: int | None = None) -> tuple[int, ...]:
    """The binding's view of a matrix, or of its rows ``index``."""
    count = x.shape[0] if rows is None else rows
    return (x.data_ptr(), DTYPES[x.dtype], x.stride(0), x.stride(1), pointer(index), count, x.shape[1])


class _Chunk(NamedTuple):
    """Classes first .. first + classes - 1: unit rows [n K, ld] and inverse norms [n K]."""

    first: int
    classes: int
    rows: Tensor
    inverse: Tensor


class _Problem:
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
        stats: int,
    ) -> None:
        module, emulated = _extension.load_cuda()
        self.device = embeddings.device
        self.stream = 0 if emulated else torch.cuda.current_stream(self.device).cuda_stream
        self.module = module
        self.half = half_operands(embeddings, weight)
        self.operand = torch.float16 if self.half else torch.float32
        self.embeddings, self.weight, self.labels = embeddings.detach(), weight.detach(), labels.contiguous()
        self.batch, self.dim = embeddings.shape
        self.ld = (self.dim + 7) // 8 * 8  # rows of 16 bytes for the tensor cores
        self.subcenters, self.scale, self.stats = subcenters, scale, stats
        self.index = None
        if classes is not None:
            within = torch.arange(subcenters, device=self.device)
            self.index = (classes[:, None] * subcenters + within).flatten()
        self.count = weight.shape[0] // subcenters if classes is None else classes.shape[0]
        self.threshold = None if threshold is None else threshold.float().contiguous()
        self.hard_map = None if hard_map is None else hard_map.float().contiguous()
        tile_bytes = self.batch * (2 if self.in_registers else 4)  # of a class: its P, or its cosines
        rows = TILE_BYTES // (max(tile_bytes, self.ld * self.operand.itemsize) * subcenters)
        self.chunk = min(self.count, max(TILE, rows // TILE * TILE))

    def call(self, name: str, *arguments: Any) -> None:
        getattr(self.module, f"cuda_{name}")(*arguments, self.stream)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def unit_embeddings(self, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Unit rows times ``factor`` [B, ld] and inverse norms; zeros for ignored rows, whatever they hold."""
        rows = torch.arange(self.batch, device=self.device)
        index = torch.where(self.labels < 0, -1, rows)
        out, inverse = self.empty(self.batch, self.ld, dtype=self.operand), self.empty(self.batch)
        self.call("margin_softmax_normalize", _matrix(self.embeddings, index), pointer(factor),
                  DTYPES[self.operand], out.data_ptr(), self.ld, inverse.data_ptr())  # fmt: skip
        return out, inverse

    def target(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """theta, best sub-centre, its row of ``weight`` (-1 if ignored) and inverse norm, each [B]."""
        theta, w_inv = self.empty(self.batch), self.empty(self.batch)
        best, center = (self.empty(self.batch, dtype=torch.int64) for _ in range(2))
        w = _matrix(self.weight, self.index, self.count * self.subcenters)
        self.call("margin_softmax_target", _matrix(self.embeddings), w, self.labels.data_ptr(), self.subcenters,
                  theta.data_ptr(), best.data_ptr(), center.data_ptr(), w_inv.data_ptr())  # fmt: skip
        return theta, best, center, w_inv

    def rows_of(self, first: int, width: int) -> tuple[int, ...]:
        """The binding's view of class rows first .. first + width - 1."""
        if self.index is None:
            return _matrix(self.weight[first : first + width])
        return _matrix(self.weight, self.index[first : first + width], width)

    def chunks(self) -> Iterator[_Chunk]:
        room = self.empty(self.chunk * self.subcenters, self.ld, dtype=self.operand)
        inverse = self.empty(self.chunk * self.subcenters)
        for first in range(0, self.count, self.chunk):
            classes = min(self.chunk, self.count - first)
            width = classes * self.subcenters
            self.call("margin_softmax_normalize", self.rows_of(first * self.subcenters, width), 0,
                      DTYPES[self.operand], room.data_ptr(), self.ld, inverse.data_ptr())  # fmt: skip
            yield _Chunk(first, classes, room[:width], inverse[:width])

    def negatives(self, chunk: _Chunk) -> tuple[Any, ...]:
        return (self.batch, chunk.classes, self.subcenters, chunk.first, self.labels.data_ptr(),
                pointer(self.threshold), pointer(self.hard_map), self.scale, self.stats)  # fmt: skip

    def gemm(
        self, a: Tensor, a_k_major: bool, b: Tensor, b_k_major: bool, m: int, n: int, k: int, out: Tensor, add: bool
    ) -> None:
        """float16 operands; out [splits, m, n] or [m, n], float32."""
        splits = out.shape[0] if out.ndim == 3 else 1
        self.call("mma_gemm", a.data_ptr(), a.stride(0), a_k_major, b.data_ptr(), b.stride(0), b_k_major, m, n, k,
                  out.data_ptr(), out.stride(-2), splits, add)  # fmt: skip

    def cosines(self, e_hat: Tensor, chunk: _Chunk, room: Tensor) -> Tensor:
        """[B, n K] float32 in memory, for float32 operands and for sub-centres."""
        width = chunk.rows.shape[0]
        tile = room[: self.batch * width].view(self.batch, width)
        if self.half:
            self.gemm(e_hat, True, chunk.rows, True, self.batch, width, self.ld, tile, False)
        else:
            torch.mm(e_hat, chunk.rows.t(), out=tile)
        return tile

    @property
    def in_registers(self) -> bool:
        """Whether the cosines stay in the tensor-core kernels."""
        return self.half and self.subcenters == 1

    def tile_room(self) -> Tensor:
        return self.empty(0 if self.in_registers else self.batch * self.chunk * self.subcenters)


def _guard(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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
    """The raw op ``margin_softmax_fwd.cuda``; results as ``margin_softmax_fwd.cpu``."""
    with _guard(embeddings.device):
        p = _Problem(embeddings, weight, labels, classes, threshold, hard_map, scale, subcenters, stats)
        e_hat, _ = p.unit_embeddings(None)
        theta, best, _, _ = p.target()
        sums = {name: torch.zeros(p.batch, dtype=torch.float64, device=p.device) for name in SUMS}
        maximum, max_cos = (torch.full((p.batch,), NONE, device=p.device) for _ in range(2))
        rank = torch.zeros(p.batch, dtype=torch.int64, device=p.device)
        cos_target = torch.cos(theta)
        running = tuple(map(pointer, (maximum, *sums.values(), rank, max_cos, cos_target)))
        room = p.tile_room()
        partials = p.empty(7 * ((p.chunk + TILE - 1) // TILE) * p.batch if p.in_registers else 0)
        for chunk in p.chunks():
            if p.in_registers:
                p.call("margin_softmax_accumulate_mma", p.negatives(chunk), e_hat.data_ptr(), chunk.rows.data_ptr(),
                       p.ld, partials.data_ptr(), running)  # fmt: skip
                continue
            tile = p.cosines(e_hat, chunk, room)
            p.call("margin_softmax_accumulate", p.negatives(chunk), tile.data_ptr(), tile.stride(0), running)
        return finish(p.labels, p.count, torch.float32, stats, theta, maximum, sums, rank, max_cos, best)


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
    """The raw op ``margin_softmax_bwd.cuda``: dE like ``embeddings`` and dW [n * K, D] (compact with ``classes``)."""
    with _guard(embeddings.device):
        p = _Problem(embeddings, weight, labels, classes, threshold, hard_map, scale, subcenters, 0)
        d_embeddings = torch.empty_like(embeddings) if need_embeddings else embeddings.new_empty(0, p.dim)
        d_weight = weight.new_empty(0, p.dim)
        if need_weight:
            compact = classes is not None
            d_weight = weight.new_empty(p.count * subcenters, p.dim) if compact else torch.empty_like(weight)
        if p.batch == 0:
            return d_embeddings, d_weight.zero_()
        grad_theta, grad_lse = grad_theta.float().contiguous(), grad_lse.float().contiguous()
        grad_sum = None if grad_sum is None else grad_sum.float().contiguous()

        # Bounds |G_ij| of a row: what P is divided by (the contract says why).
        row_scale = grad_lse.abs() * scale + (0.0 if grad_sum is None else grad_sum.abs())
        if p.hard_map is not None:
            row_scale = row_scale * (p.hard_map[1].abs() + 2.0 * p.hard_map[2].abs()).clamp(min=1.0)
        row_scale = row_scale.clamp(min=torch.finfo(torch.float32).tiny)
        most, operand_scale = row_scale.max(), OPERAND_SCALE if p.half else 1.0
        e_hat, e_inv = p.unit_embeddings(None)
        e_scaled, _ = p.unit_embeddings(row_scale / most * operand_scale)
        factor_w = most / (GRADIENT_SCALE * operand_scale)
        _, _, center, w_inv_y = p.target()
        ordered, order = torch.sort(center, stable=True)
        shared = (theta.data_ptr(), grad_theta.data_ptr(), center.data_ptr())

        ldp = (p.chunk * subcenters + 7) // 8 * 8
        scaled = p.empty(p.batch, ldp, dtype=p.operand)  # P of the contract
        room = p.tile_room()
        d_e = torch.zeros(SPLITS if p.half else 1, p.batch, p.dim, device=p.device)
        d_w = p.empty(p.chunk * subcenters if need_weight else 0, p.dim)
        upstream = tuple(map(pointer, (lse_neg, grad_lse, grad_sum, row_scale)))
        for chunk in p.chunks():
            width = chunk.rows.shape[0]
            if p.in_registers:
                p.call("margin_softmax_gradient_mma", p.negatives(chunk), e_hat.data_ptr(), chunk.rows.data_ptr(),
                       p.ld, *upstream, scaled.data_ptr(), ldp)  # fmt: skip
            else:
                tile = p.cosines(e_hat, chunk, room)
                p.call("margin_softmax_gradient", p.negatives(chunk), tile.data_ptr(), tile.stride(0), *upstream,
                       DTYPES[p.operand], scaled.data_ptr(), ldp)  # fmt: skip
            if need_embeddings and p.half:
                p.gemm(scaled, True, chunk.rows, False, p.batch, p.dim, width, d_e, True)
            elif need_embeddings:
                torch.addmm(d_e[0], scaled[:, :width], chunk.rows[:, : p.dim], out=d_e[0])
            if not need_weight:
                continue
            if p.half:
                p.gemm(scaled, False, e_scaled, False, width, p.dim, p.batch, d_w, False)
            else:
                torch.mm(scaled[:, :width].t(), e_scaled[:, : p.dim], out=d_w[:width])
            first = chunk.first * subcenters
            out = d_weight[first : first + width]
            p.call("margin_softmax_project_w", d_w.data_ptr(), d_w.stride(0), factor_w.data_ptr(),
                   p.rows_of(first, width), chunk.inverse.data_ptr(), first,
                   _matrix(p.embeddings), e_inv.data_ptr(), (*shared, order.data_ptr(), ordered.data_ptr()),
                   p.batch, out.data_ptr(), out.stride(0), out.stride(1))  # fmt: skip
        if need_embeddings:
            d_e, factor_e = d_e.sum(0), row_scale / GRADIENT_SCALE
            p.call("margin_softmax_project_e", d_e.data_ptr(), d_e.stride(0), factor_e.data_ptr(),
                   _matrix(p.embeddings), e_inv.data_ptr(), _matrix(p.weight), w_inv_y.data_ptr(), (*shared, 0, 0),
                   d_embeddings.data_ptr(), d_embeddings.stride(0), d_embeddings.stride(1))  # fmt: skip
        return d_embeddings, d_weight
