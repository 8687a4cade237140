"""Launcher of margin_softmax's Triton kernels (triton_kernels/margin_softmax.py): [B]-sized preparation and grids.

Operands are float16 or float32 by the rule of the CUDA launcher. Nothing here synchronises.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pyelastic.eager import margin_softmax as eager
from pyelastic.ops._margin_softmax_cpu import finish
from pyelastic.ops._margin_softmax_cuda import GRADIENT_SCALE, OPERAND_SCALE, half_operands

# Bytes of P for one chunk of classes, where the backward needs a GEMM: stays in L2. An estimate.
CHUNK_BYTES = 16 << 20
PROGRAMS = 264  # two for each multiprocessor of an H200: an estimate, not measured
GRID_Y = 65_535  # CUDA's limit of the second and third extent of a grid
FINISH_ELEMENTS = 8192  # of the accumulator of a program of finish_w; a power of 2


def _kernels() -> ModuleType:
    from pyelastic.triton_kernels import margin_softmax

    return margin_softmax


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
    ) -> None:
        import triton
        import triton.language as tl

        self.kernels, self.cdiv = _kernels(), triton.cdiv
        self.device, (self.batch, self.dim) = embeddings.device, embeddings.shape
        self.half = half_operands(embeddings, weight)
        self.operand = torch.float16 if self.half else torch.float32
        self.weight, self.labels, self.scale, self.k = weight.detach(), labels.contiguous(), scale, subcenters
        self.index = torch.empty(0, dtype=torch.int64, device=self.device)
        self.sampled = classes is not None
        if classes is not None:
            within = torch.arange(subcenters, device=self.device)
            self.index = (classes[:, None] * subcenters + within).flatten()
        self.count = weight.shape[0] // subcenters if classes is None else classes.shape[0]
        self.hard = threshold is not None
        none = torch.zeros(1, device=self.device)
        self.threshold = none if threshold is None else threshold.float().contiguous()
        self.hard_map = none if hard_map is None else hard_map.float().contiguous()
        # Ignored rows become zero rows, so that nothing they hold can reach a gradient.
        used = torch.where((self.labels >= 0)[:, None], embeddings.detach(), 0.0)
        self.unit = eager.normalize(used, torch.float32).contiguous()
        norm = torch.linalg.vector_norm(used, dim=1, dtype=torch.float64)
        inverse = 1.0 / norm + (norm - norm)  # NaN for an infinite row, not 0
        self.e_inv = torch.where(norm <= eager.ZERO_NORM, 0.0, inverse).float()
        self.w_inv = torch.empty(self.count * subcenters, device=self.device)
        self.width = max(16, triton.next_power_of_2(self.dim))
        self.operand_type = tl.float16 if self.half else tl.float32
        newest = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (10, 0)
        self.table = self.kernels.MARGIN_SOFTMAX_CONFIGS_SM100 if newest else self.kernels.MARGIN_SOFTMAX_CONFIGS
        # Rows that do not begin at multiples of 16 numbers are read in pieces, for which large blocks lack registers.
        aligned = self.dim % 16 == 0 and weight.stride(0) % 16 == 0 and weight.data_ptr() % 16 == 0
        if subcenters > 1 or self.sampled or weight.stride(1) != 1 or not aligned:
            self.table = self.kernels.MARGIN_SOFTMAX_CONFIGS_SCATTERED
        rows = self.count * subcenters
        self.kernels.inverse_norms[(self.cdiv(rows, 16),)](
            self.weight, self.index, self.w_inv, rows, self.dim, *self.weight.stride(), HAS_INDEX=self.sampled,
            BLOCK=16, BLOCK_D=min(256, self.width), num_warps=4,
        )  # fmt: skip

    def fused_width(self) -> int | None:
        """The accumulator width of the fused backward, None if D is beyond it."""
        bits = 16 if self.half else 32
        fitting = [width for width_bits, width in self.table if width_bits == bits and width >= self.width]
        return min(fitting, default=None)

    def configure(self, width: int) -> tuple[int, int, dict[str, Any]]:
        """BLOCK_B, BLOCK_C and all constexpr arguments, for an accumulator of this width (0: none)."""
        block_b, block_c, block_d, warps, stages = self.table[16 if self.half else 32, width]
        constants = {
            "K": self.k,
            "HAS_INDEX": self.sampled,
            "HARD": self.hard,
            "OPERAND": self.operand_type,
            "BLOCK_B": block_b,
            "BLOCK_C": block_c,
            "BLOCK_D": min(block_d, self.width),
            "num_warps": warps,
            "num_stages": stages,
        }
        scattered = self.table is self.kernels.MARGIN_SOFTMAX_CONFIGS_SCATTERED
        if scattered and width and not self.half and self.device.type == "cuda" and torch.version.hip is None:
            constants["maxnreg"] = self.kernels.SCATTERED_REGISTERS
        return block_b, block_c, constants

    def splits(self, block_b: int, block_c: int) -> int:
        """Programs that share a block of rows: enough to fill a GPU, from shapes alone."""
        tiles, blocks = self.cdiv(self.count, block_c), max(1, self.cdiv(self.batch, block_b))
        return max(1, min(tiles, PROGRAMS // blocks))

    def target(self) -> tuple[Tensor, Tensor, Tensor]:
        """theta, best sub-centre and position of its row among the n K [B]; a label out of range gives NaN."""
        inside = (self.labels >= 0) & (self.labels < self.count)
        position = torch.where(inside, self.labels, 0)[:, None] * self.k + torch.arange(self.k, device=self.device)
        rows = self.index[position] if self.sampled else position
        candidates = eager.normalize(self.weight[rows], torch.float32).double()
        e_hat = self.unit.double()
        best = torch.einsum("bd,bkd->bk", e_hat, candidates).argmax(1)
        chosen = torch.arange(self.batch, device=self.device)
        theta = eager.angle(e_hat, candidates[chosen, best])
        theta = torch.where(self.labels < self.count, theta, torch.nan)
        theta = torch.where(self.labels < 0, torch.pi / 2, theta).float()
        return theta, best, torch.where(inside, position[chosen, best], -1)

    def unit_center(self, position: Tensor) -> Tensor:
        """w^ [B, D] at positions of rows; anything for -1."""
        rows = position.clamp(min=0)
        return eager.normalize(self.weight[self.index[rows] if self.sampled else rows], torch.float32)


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
    """The raw op ``margin_softmax_fwd.triton``; results as ``margin_softmax_fwd.cpu``."""
    with _guard(embeddings.device):
        p = _Problem(embeddings, weight, labels, classes, threshold, hard_map, scale, subcenters)
        theta, best, _ = p.target()
        block_b, block_c, constants = p.configure(0)
        splits = p.splits(block_b, block_c)
        partials = torch.zeros(p.kernels.PARTIALS, splits, p.batch, device=p.device)
        if p.batch:
            p.kernels.forward[(p.cdiv(p.batch, block_b), splits)](
                p.unit.to(p.operand), p.weight, p.w_inv, p.index, p.labels, p.threshold, p.hard_map,
                torch.cos(theta), partials, p.batch, p.count, p.dim, *p.weight.stride(), scale, splits,
                EXTRA=stats != 0, **constants,
            )  # fmt: skip
        most, total, sq, z, cos, rank, top = partials.double().unbind(0)
        maximum = most.amax(0)
        share = torch.exp(most - maximum)
        sums = {"sum": total * share, "sq": sq * share.square(), "z": z * share, "cos": cos}
        sums = {name: value.sum(0) for name, value in sums.items()}
        ranks = rank.sum(0).to(torch.int64)
        return finish(p.labels, p.count, torch.float32, stats, theta, maximum, sums, ranks, top.amax(0), best)


def _half_gemm_gives_float32() -> bool:
    """torch.mm(..., out_dtype=): since torch 2.8."""
    return "dtype" in torch.ops.aten.mm.overloads()


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Product with float32 sums; float16 operands stay such where torch can give a float32 result."""
    if a.is_cuda and a.dtype == torch.float16 and _half_gemm_gives_float32():
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


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
    """The raw op ``margin_softmax_bwd.triton``: dE and dW as ``margin_softmax_bwd.cpu``."""
    with _guard(embeddings.device):
        p = _Problem(embeddings, weight, labels, classes, threshold, hard_map, scale, subcenters)
        d_weight = weight.new_empty(0, p.dim)
        if need_weight:
            compact = classes is not None
            d_weight = weight.new_empty(p.count * subcenters, p.dim) if compact else torch.empty_like(weight)
        if p.batch == 0:
            return torch.empty_like(embeddings)[: embeddings.shape[0] * need_embeddings], d_weight.zero_()
        _, _, position = p.target()
        grad_theta, grad_lse = grad_theta.float(), grad_lse.float()
        added = torch.zeros_like(grad_lse) if grad_sum is None else grad_sum.float()
        row_scale = grad_lse.abs() * scale + added.abs()
        if p.hard:
            row_scale = row_scale * (p.hard_map[1].abs() + 2.0 * p.hard_map[2].abs()).clamp(min=1.0)
        row_scale = row_scale.clamp(min=torch.finfo(torch.float32).tiny)
        # Tangents at e^ and at w^: along the other unit row, and back along the own.
        sine, cosine = torch.sin(theta.double()), torch.cos(theta.double())
        flat = (sine.abs() < 1e-15) | (grad_theta == 0) | (position < 0)
        along = torch.where(flat, 0.0, -grad_theta / torch.where(flat, 1.0, sine))
        back = torch.where(flat, 0.0, -along * cosine).float()
        along = along.float()
        state = (
            p.unit.to(p.operand), p.weight, p.w_inv, p.index, p.labels, lse_neg.contiguous(),
            grad_lse * (scale * GRADIENT_SCALE) / row_scale, added * GRADIENT_SCALE / row_scale,
            p.threshold, p.hard_map,
        )  # fmt: skip
        sums = (_chunked if p.fused_width() is None else _fused)(
            p, state, row_scale, along, back, position, d_weight, need_embeddings, need_weight
        )
        if not need_embeddings:
            return embeddings.new_empty(0, p.dim), d_weight
        d = sums * (row_scale / GRADIENT_SCALE)[:, None]
        d = d - (d * p.unit).sum(1, keepdim=True) * p.unit
        tangent = along[:, None] * p.unit_center(position) + back[:, None] * p.unit
        d = d + torch.where((position >= 0)[:, None], tangent, 0.0)
        d = torch.where((p.e_inv == 0)[:, None], 0.0, d * p.e_inv[:, None])
        return torch.empty_like(embeddings).copy_(d), d_weight


def _finish_arguments(
    p: _Problem, row_scale: Tensor, along: Tensor, back: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]:
    """e^ scaled for dW, its factor, what the tangents need, and the sorted positions."""
    most, operand_scale = row_scale.max(), OPERAND_SCALE if p.half else 1.0
    scaled = (p.unit * (row_scale / most * operand_scale)[:, None]).to(p.operand)
    ordered, order = torch.sort(position, stable=True)
    return scaled, (most / (GRADIENT_SCALE * operand_scale)).view(1), (p.unit, along, back, ordered, order), ordered


def _fused(
    p: _Problem, state: tuple[Any, ...], row_scale: Tensor, along: Tensor, back: Tensor, position: Tensor,
    d_weight: Tensor, need_embeddings: bool, need_weight: bool,
) -> Tensor:  # fmt: skip
    """dW into ``d_weight``; returns sum_j P_ij w^_j [B, D]."""
    width = p.fused_width()
    assert width is not None  # else _chunked is called
    block_b, block_c, constants = p.configure(width)
    d_e = torch.empty(p.splits(block_b, block_c) if need_embeddings else 0, p.batch, p.dim, device=p.device)
    if need_embeddings:
        p.kernels.grad_e[(p.cdiv(p.batch, block_b), d_e.shape[0])](
            *state, d_e, p.batch, p.count, p.dim, *p.weight.stride(), p.scale, d_e.shape[0],
            WIDTH=width, **constants,
        )  # fmt: skip
    if need_weight:
        scaled, factor, tangents, ordered = _finish_arguments(p, row_scale, along, back, position)
        tiles = p.cdiv(p.count, block_c)
        starts = torch.arange(tiles + 1, device=p.device) * (block_c * p.k)
        p.kernels.grad_w[(tiles, p.k)](
            *state, scaled, *tangents, torch.searchsorted(ordered, starts), factor, d_weight, p.batch, p.count, p.dim,
            *p.weight.stride(), *d_weight.stride(), p.scale, WIDTH=width, **constants,
        )  # fmt: skip
    return d_e.sum(0)


def _chunk_classes(class_bytes: int, block_c: int) -> int:
    """Classes in a chunk whose P takes ``class_bytes`` a class; their blocks are the second extent of a grid."""
    return block_c * max(1, min(CHUNK_BYTES // class_bytes // block_c, GRID_Y))


def _chunked(
    p: _Problem, state: tuple[Any, ...], row_scale: Tensor, along: Tensor, back: Tensor, position: Tensor,
    d_weight: Tensor, need_embeddings: bool, need_weight: bool,
) -> Tensor:  # fmt: skip
    """As ``_fused``, for a D whose accumulators do not fit the registers: P of one chunk of classes at a time."""
    scaled, factor, tangents, ordered = _finish_arguments(p, row_scale, along, back, position)
    block_b, block_c, constants = p.configure(0)
    chunk = _chunk_classes(p.batch * p.k * p.operand.itemsize, block_c)
    block = max(1, FINISH_ELEMENTS // p.width)
    sums = torch.zeros(p.batch, p.dim, device=p.device)
    for first in range(0, p.count, chunk):
        n = min(chunk, p.count - first)
        begin, width = first * p.k, n * p.k
        tile = torch.empty(p.batch, width, dtype=p.operand, device=p.device)
        p.kernels.gradient_tile[(p.cdiv(p.batch, block_b), p.cdiv(n, block_c))](
            *state, tile, p.batch, p.count, p.dim, first, n, *p.weight.stride(), p.scale, **constants
        )
        if need_embeddings:
            rows = p.weight[p.index[begin : begin + width] if p.sampled else slice(begin, begin + width)]
            sums += _matmul(tile, eager.normalize(rows, torch.float32).to(p.operand))
        if need_weight:
            d_w = _matmul(tile.t(), scaled)
            starts = (begin + torch.arange(p.cdiv(width, block) + 1, device=p.device) * block).clamp(max=begin + width)
            p.kernels.finish_w[(p.cdiv(width, block),)](
                d_w, p.weight, p.w_inv, p.index, *tangents, torch.searchsorted(ordered, starts), factor, d_weight,
                begin, width, p.dim, *p.weight.stride(), *d_weight.stride(), HAS_INDEX=p.sampled, BLOCK=block,
                WIDTH=p.width, num_warps=4,
            )  # fmt: skip
    return sums
