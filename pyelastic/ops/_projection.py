"""The launcher that projection's backends share: chunks of rows, products by torch's BLAS, the kernels between them.

A backend is a subclass of ``Kernels`` with its two kernels. Contract: csrc/projection.h. On a GPU nothing here
synchronises, so a step can be captured in a CUDA graph; products of two 16-bit operands take them as they are there and
give float32, all others are float32 products, in TF32 only where torch's settings allow it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pyelastic.eager.projection import statistics_dtype
from pyelastic.ops import _gemm
from pyelastic.ops._binding import rows_of

# Longest sum of one product: a BLAS splits a longer one over its threads, and the bits would depend on their number
# (MKL from 512 on; see _margin_softmax_cpu.GEMM_DEPTH).
CPU_DEPTH = 256
# Rows of a chunk: z of one stays in a core's cache, or fills a GPU.
CPU_ROWS, GPU_ROWS = 1024, 1 << 16
# Share of rows with a gradient below which the CPU gathers those rows first. In the k-negatives layout of maxsim 6 to
# 16 % of the document rows have one.
COMPACT_BELOW = 0.5


def _keeps_16_bits(a: Tensor, b: Tensor) -> bool:
    """Whether torch multiplies these operands as they are into float32: torch.mm(out_dtype=), CUDA, since 2.8."""
    same = a.dtype == b.dtype and a.dtype in (torch.float16, torch.bfloat16)
    return same and a.is_cuda and torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()


@contextmanager
def environment(device: torch.device) -> Iterator[None]:
    """The tensors' device is the current one, and autocast, which would round float32 operands, is off."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            yield


class Kernels:
    """What a backend provides, and how its products are made."""

    # Whether rows without a gradient are left out of the backward. That reads a number back, so on a GPU it would
    # synchronise.
    compacts = False
    # Whether dz can be two bfloat16 parts, hi + lo, with 16 bits of mantissa: then the backward's products take 16-bit
    # operands. Not for float16, whose range a gradient leaves.
    splits = False
    # Whether the two parts of a row lie beside each other: one product of twice the depth or rows for both.
    joins = False

    def __init__(self, x: Tensor) -> None:
        self.dtype = statistics_dtype(x)
        self.on_cpu = x.device.type == "cpu"
        self.rows = CPU_ROWS if self.on_cpu else GPU_ROWS
        self.most = self.rows + self.rows // 32  # with a short last chunk

    def forward(
        self, z: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor, inverse: Tensor | None
    ) -> None:
        """z [n, d] of the compute type -> out [n, d], inverse [n] or None."""
        raise NotImplementedError

    def fuses(self, x: Tensor, weight: Tensor, residual: Tensor | None, residual_weight: Tensor | None) -> bool:
        """Whether ``linear`` takes these: then z is never written."""
        return False

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, residual_weight: Tensor | None,
        out: Tensor, inverse: Tensor | None,
    ) -> None:  # fmt: skip
        """The whole layer of all rows in one kernel. Rows have contiguous columns, bias the compute type."""
        raise NotImplementedError

    def backward(self, grad: Tensor, y: Tensor, inverse: Tensor | None, dz: Tensor) -> None:
        """grad, y [n, d] -> dz [1, n, d], or its two parts [2, n, d], joined [1, n, 2 d]."""
        raise NotImplementedError

    def operand(self, weight: Tensor, other: Tensor) -> Tensor:
        """A weight as ``add_product`` takes it beside ``other``, converted once for all chunks."""
        return weight if _keeps_16_bits(weight, other) else self.converted(weight, other.dtype)

    def converted(self, weight: Tensor, beside: torch.dtype) -> Tensor:
        """The same for ``_gemm.multiply``, beside an operand of dtype ``beside``."""
        return weight if self.dtype == torch.float32 and _gemm.takes(weight, beside) else weight.to(self.dtype)

    def add_product(self, out: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
        """out (+)= a @ b in the compute type; ``fresh``: out holds nothing yet."""
        if _keeps_16_bits(a, b):
            product = torch.mm(a, b, out_dtype=self.dtype)
            out.copy_(product) if fresh else out.add_(product)
            return
        _gemm.multiply(a, b, out, add=not fresh, step=CPU_DEPTH if self.on_cpu else None)


def chunks(rows: int, size: int) -> Iterator[slice]:
    """``size`` rows each. A last one shorter than a 32nd joins the one before it: it would fill nothing, and below 16
    rows the bits of MKL's products depend on the number of threads."""
    first = 0
    while first < rows:
        last = rows if rows - first - size < size // 32 else first + size
        yield slice(first, last)
        first = last


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


def forward(
    k: Kernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """y [N, d_out] and 1 / |z| [N] ([0] without normalisation)."""
    rows, d_out = x.shape[0], weight.shape[0]
    out = torch.empty(rows, d_out, dtype=x.dtype, device=x.device)
    inverse = torch.empty(rows if normalize else 0, dtype=k.dtype, device=x.device)
    if rows and k.fuses(x, weight, residual, residual_weight):
        r, r_w = (None if t is None else rows_of(t) for t in (residual, residual_weight))
        k.linear(rows_of(x), rows_of(weight), _cast(bias, k.dtype), r, r_w, out, inverse if normalize else None)
        return out, inverse
    w, b, r_w = k.operand(weight, x), _cast(bias, k.dtype), None
    if residual is not None and residual_weight is not None:
        r_w = k.operand(residual_weight, residual)
    added = None if residual is None or r_w is not None else rows_of(residual)
    z = torch.empty(min(rows, k.most), d_out, dtype=k.dtype, device=x.device)
    for part in chunks(rows, k.rows):
        zc = z[: part.stop - part.start]
        k.add_product(zc, x[part], w.t(), fresh=True)
        if r_w is not None and residual is not None:
            k.add_product(zc, residual[part], r_w.t(), fresh=False)
        k.forward(zc, b, None if added is None else added[part], out[part], inverse[part] if normalize else None)
    return out, inverse


def backward(
    k: Kernels,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    y: Tensor,
    inverse: Tensor,
    normalize: bool,
    needs: tuple[bool, bool, bool, bool, bool],
    gradient_rows: int = -1,
) -> list[Tensor]:
    """Gradients of x, weight, bias, residual and residual_weight; [0] where not needed."""
    need_x, need_w, need_b, need_r, need_rw = needs
    kept, total = _compact(k, grad, gradient_rows), grad.shape[0]
    if kept is not None:
        grad, x, y = grad[kept], x[kept], y[kept]
        inverse = inverse[kept] if normalize else inverse
        residual = None if residual is None else residual[kept]
    grad, y = rows_of(grad), rows_of(y)
    rows, d_out = grad.shape

    def empty(needed: bool, *shape: int, dtype: torch.dtype = k.dtype) -> Tensor:
        return torch.empty(shape if needed else (0,), dtype=dtype, device=x.device)

    multiplied = [x, weight] if residual_weight is None else [x, weight, residual, residual_weight]
    split = k.splits and all(t is not None and t.dtype == torch.bfloat16 for t in multiplied)
    joined = 2 if split and k.joins else 1

    def unjoined(t: Tensor, dim: int = 0) -> Tensor:
        """The sum of both parts, of what is twice as wide as d_out for them."""
        return t.unflatten(dim, (joined, d_out)).sum(dim, dtype=k.dtype) if joined == 2 else t

    d_x = empty(need_x, *x.shape, dtype=x.dtype)
    d_w, d_b = empty(need_w, joined * d_out, x.shape[1]).zero_(), empty(need_b, d_out).zero_()
    d_r = empty(need_r) if residual is None else empty(need_r, *residual.shape, dtype=residual.dtype)
    d_rw = empty(need_rw)
    if need_rw and residual_weight is not None:
        d_rw = empty(True, joined * d_out, residual_weight.shape[1]).zero_()
    w, r_w = weight, residual_weight
    if not split:
        w = k.converted(weight, k.dtype)
        r_w = None if residual_weight is None else k.converted(residual_weight, k.dtype)
    if joined == 2:
        w, r_w = torch.cat((w, w)), None if r_w is None else torch.cat((r_w, r_w))
    parts_dtype = torch.bfloat16 if split else k.dtype
    parts = (1 + split) // joined
    dz = torch.empty(parts, min(rows, k.most), joined * d_out, dtype=parts_dtype, device=x.device)
    rounded = [g.shape[1] for g in (d_x, d_r) if g.ndim == 2 and g.dtype != k.dtype]
    room = torch.empty(dz.shape[1] * max(rounded, default=0), dtype=k.dtype, device=x.device)
    for part in chunks(rows, k.rows):
        d = dz[:, : part.stop - part.start]
        k.backward(grad[part], y[part], inverse[part] if normalize else None, d)
        if need_x:
            _store_product(k, d_x[part], d, w, room)
        if need_w:
            _add_products(k, d_w, d, x[part])
        if need_b:
            d_b += unjoined(d.sum((0, 1), dtype=k.dtype)) if split else d[0].sum(0)
        if residual is not None and need_r:
            if r_w is not None:
                _store_product(k, d_r[part], d, r_w, room)
            else:  # the first part is what rounding leaves
                whole = joined == 1 and (d_r.dtype == d.dtype or not split)
                d_r[part] = d[0] if whole else unjoined(d.sum(0, dtype=k.dtype), 1)
        if residual is not None and need_rw:
            _add_products(k, d_rw, d, residual[part])
    if kept is not None:
        d_x, d_r = (g.new_zeros(total, g.shape[1]).index_copy_(0, kept, g) if g.ndim == 2 else g for g in (d_x, d_r))
    return [d_x, unjoined(d_w) if need_w else d_w, d_b, d_r, unjoined(d_rw) if need_rw else d_rw]


def _add_products(k: Kernels, out: Tensor, dz: Tensor, x: Tensor) -> None:
    """out += dz^T x."""
    for d in dz:
        k.add_product(out, d.t(), x, fresh=False)


def _store_product(k: Kernels, out: Tensor, dz: Tensor, w: Tensor, room: Tensor) -> None:
    """out = dz w, through ``room`` where out is not of the compute type."""
    product = out if out.dtype == k.dtype else room[: out.numel()].view(out.shape)
    for n, d in enumerate(dz):
        k.add_product(product, d, w, fresh=n == 0)
    if product is not out:
        out.copy_(product)


def _compact(k: Kernels, grad: Tensor, bound: int) -> Tensor | None:
    """Rows with a gradient, if they are few; where counting them would synchronise, ``bound`` rows with all of them."""
    if not k.compacts:
        if not 0 <= bound < COMPACT_BELOW * grad.shape[0]:
            return None
        return torch.argsort((grad != 0).any(1), descending=True, stable=True)[:bound]
    if grad.shape[1] == 0:
        return None
    some = (grad.amax(1) != 0).logical_or_(grad.amin(1) != 0)  # half the time of any(), and no temporary of grad's size
    return some.nonzero()[:, 0] if int(some.sum()) < COMPACT_BELOW * len(some) else None
