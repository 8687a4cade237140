"""Products with float32 sums on the CPU: torch's BLAS, or our own kernels where that is MKL on a processor of AMD's.

There MKL runs at the speed of AVX2 at best: CONTRIBUTING.md, measured facts. Ours read 16-bit operands as they are.
Contract of the kernels: csrc/gemm.h.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pyelastic import _extension
from pyelastic.ops._binding import DTYPES

KINDS = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache(maxsize=1)
def preferred() -> bool:
    """Whether our own products are expected to be faster than torch's."""
    if _extension.why_not() is not None or not torch.backends.mkl.is_available():
        return False
    extension = _extension.load()
    return not extension.is_intel() and extension.gemm_room(1, 1) >= 0


def takes(x: Tensor) -> bool:
    """Whether our own products read this operand as it is; others ``multiply`` converts at each call."""
    return x.dtype in KINDS and x.device.type == "cpu" and 1 in x.stride() and preferred()


def _own(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether ``multiply`` of these takes our own products."""
    return out.dtype == torch.float32 and out.is_contiguous() and takes(a) and takes(b)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False, step: int | None = None) -> None:
    """out [m, n] = a [m, k] b [k, n], or added to it; sums in out's dtype, to which operands are converted.

    step: longest sum that torch's BLAS may take at once, where bits must not depend on the thread count; with our own
    products they never do.
    """
    depth = a.shape[1]
    if not _own(a, b, out):
        a, b = a.to(out.dtype), b.to(out.dtype)
        step = step or max(depth, 1)
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
