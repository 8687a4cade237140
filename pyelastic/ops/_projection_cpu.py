"""projection's CPU kernels for the shared launcher (_projection.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from pyelastic import _extension
from pyelastic.ops import _gemm
from pyelastic.ops._binding import DTYPES, pointer
from pyelastic.ops._projection import Kernels


def _matrix(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.data_ptr(), DTYPES[x.dtype], x.stride(0))


class CpuKernels(Kernels):
    compacts = True

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        suffix = "_f64" if self.dtype == torch.float64 else "_f32"
        extension = _extension.load()
        self._forward = getattr(extension, f"projection_forward{suffix}")
        self._backward = getattr(extension, f"projection_backward{suffix}")
        self.threads = torch.get_num_threads()
        self.splits = self.joins = self.dtype == torch.float32 and _gemm.narrow_only()

    def forward(
        self, z: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor, inverse: Tensor | None
    ) -> None:
        self._forward(
            z.data_ptr(), pointer(bias), _matrix(residual), *z.shape, _matrix(out), pointer(inverse), self.threads
        )

    def backward(self, grad: Tensor, y: Tensor, inverse: Tensor | None, dz: Tensor) -> None:
        parts = dz.dtype != self.dtype
        self._backward(
            _matrix(grad), _matrix(y), pointer(inverse), *grad.shape, parts, dz.data_ptr(), self.threads
        )
