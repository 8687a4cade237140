"""projection's CUDA kernels for the shared launcher (_projection.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from pyelastic import _extension
from pyelastic.ops._binding import pointer
from pyelastic.ops._projection import Kernels
from pyelastic.ops._projection_cpu import _matrix


class CudaKernels(Kernels):
    """Launches on the current stream. A pair of dtypes that the kernels lack goes through float32, which is exact."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        module, emulated = _extension.load_cuda()
        self._forward, self._backward = module.cuda_projection_forward, module.cuda_projection_backward
        self.stream = 0 if emulated else torch.cuda.current_stream(x.device).cuda_stream

    def forward(
        self, z: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor, inverse: Tensor | None
    ) -> None:
        if residual is not None and residual.dtype != out.dtype:
            residual = residual.float()
        self._forward(
            z.data_ptr(), pointer(bias), _matrix(residual), *z.shape, _matrix(out), pointer(inverse), self.stream
        )

    def backward(self, grad: Tensor, y: Tensor, inverse: Tensor | None, dz: Tensor) -> None:
        if grad.dtype != y.dtype:
            grad, y = grad.float(), y.float()
        self._backward(_matrix(grad), _matrix(y), pointer(inverse), *dz.shape, dz.data_ptr(), self.stream)
