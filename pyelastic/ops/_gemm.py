"""Products in float32 on the CPU: torch's BLAS, or our own kernels where that is MKL on a processor of AMD's.

There MKL runs at the speed of AVX2 at best: CONTRIBUTING.md, measured facts. Contract of the kernels: csrc/gemm.h.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pyelastic import _extension


@lru_cache(maxsize=1)
def preferred() -> bool:
    """Whether our own products are expected to be faster than torch's."""
    if _extension.why_not() is not None or not torch.backends.mkl.is_available():
        return False
    extension = _extension.load()
    return not extension.is_intel() and extension.gemm_room(1, 1) >= 0


def _readable(x: Tensor) -> bool:
    return 1 in x.stride()


def own(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether ``multiply`` of these takes our own products."""
    return out.dtype == torch.float32 and preferred() and out.is_contiguous() and _readable(a) and _readable(b)


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out [m, n] = a [m, k] b [k, n], or added to it. With our own products bits do not depend on the thread count."""
    if not own(a, b, out):
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
        return
    extension, (rows, columns) = _extension.load(), out.shape
    room = torch.empty(extension.gemm_room(rows, columns) + 64, dtype=torch.uint8)
    address = (room.data_ptr() + 63) // 64 * 64
    extension.gemm(a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), out.data_ptr(), rows, columns, a.shape[1], add,
                   address, torch.get_num_threads())  # fmt: skip
