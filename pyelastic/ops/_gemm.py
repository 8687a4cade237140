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


def _own(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether ``multiply`` of these takes our own products."""
    if out.dtype != torch.float32 or out.device.type != "cpu" or not preferred():
        return False
    return out.is_contiguous() and _readable(a) and _readable(b)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False, step: int | None = None) -> None:
    """out [m, n] = a [m, k] b [k, n], or added to it.

    step: longest sum that torch's BLAS may take at once, where bits must not depend on the thread count; with our own
    products they never do.
    """
    depth = a.shape[1]
    if not _own(a, b, out):
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
    extension.gemm(a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), out.data_ptr(), rows, columns, depth, add,
                   address, torch.get_num_threads())  # fmt: skip
