"""Products with float32 sums on the CPU: torch's BLAS, or our own kernels where they are faster.

With AMX that is for bfloat16 operands, which have to be converted where torch is to give float32, and for all where
torch's BLAS is MKL on a processor of AMD's. There MKL runs at the speed of AVX2 at best: CONTRIBUTING.md, measured
facts. Ours read 16-bit operands as they are.
Contract of the kernels: csrc/gemm.h.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pyelastic import _extension
from pyelastic.ops._binding import DTYPES


@lru_cache(maxsize=1)
def kinds() -> tuple[torch.dtype, ...]:
    """Dtypes of operands whose products are expected to be faster by our own kernels than by torch's."""
    if _extension.why_not() is not None:
        return ()
    extension = _extension.load()
    if extension.isa() == "amx":
        return (torch.bfloat16,)
    if not torch.backends.mkl.is_available() or extension.is_intel() or extension.gemm_room(1, 1) < 0:
        return ()
    return (torch.float32, torch.bfloat16, torch.float16)


def narrow_only() -> bool:
    """Whether bfloat16 is so much faster than float32 that two parts of a float32 operand are worth it."""
    return kinds() == (torch.bfloat16,)


def takes(x: Tensor, beside: torch.dtype) -> bool:
    """Whether our own products read this operand as it is beside one of another dtype; else ``multiply`` converts it at
    each call."""
    return x.dtype in kinds() and beside in kinds() and x.device.type == "cpu" and 1 in x.stride()


def _own(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether ``multiply`` of these takes our own products."""
    return out.dtype == torch.float32 and out.is_contiguous() and takes(a, b.dtype) and takes(b, a.dtype)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False, step: int | None = None) -> None:
    """out [m, n] = a [m, k] b [k, n], or added to it; sums in out's dtype, to which operands are converted.

    step: longest sum of float32 that torch's BLAS may take at once, where bits must not depend on the thread count, and
    half as long in float64, which MKL splits earlier; with our own products they never do.
    """
    depth = a.shape[1]
    if not _own(a, b, out):
        a, b = a.to(out.dtype), b.to(out.dtype)
        step = max(depth, 1) if step is None else step * 4 // out.itemsize
        for first in range(0, max(depth, 1), step):
            part = (a[:, first : first + step], b[first : first + step])
            if add or first > 0:
                torch.addmm(out, *part, out=out)
            else:
                torch.mm(*part, out=out)
        return
    extension, (rows, columns) = _extension.load(), out.shape
    room = torch.empty(extension.gemm_room(rows, columns) + 64, dtype=torch.uint8)
    address = (room.data_ptr() + 63) // 64 * 64
    left, right = ((x.data_ptr(), DTYPES[x.dtype], *x.stride()) for x in (a, b))
    extension.gemm(left, right, out.data_ptr(), rows, columns, depth, add, address, torch.get_num_threads())
