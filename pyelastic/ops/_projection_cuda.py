"""projection's CUDA kernels for the shared launcher (_projection.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from pyelastic import _extension
from pyelastic.ops._binding import pointer, rows_of
from pyelastic.ops._projection import Kernels
from pyelastic.ops._projection_cpu import _matrix


def _rows_aligned(x: Tensor) -> bool:
    """Whether cp.async can copy the rows: 16 bytes at multiples of 16."""
    stride = x.stride(0) if x.shape[0] > 1 else 0
    return x.data_ptr() % 16 == 0 and stride % 8 == 0 and x.shape[1] % 8 == 0


class CudaKernels(Kernels):
    """Launches on the current stream. A pair of dtypes that the kernels lack goes through float32, which is exact."""

    splits = True

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        module, emulated = _extension.load_cuda()
        self._forward, self._backward = module.cuda_projection_forward, module.cuda_projection_backward
        self._linear, self._fits = module.cuda_projection_linear, module.cuda_projection_fits
        self.stream = 0 if emulated else torch.cuda.current_stream(x.device).cuda_stream

    def fuses(self, x: Tensor, weight: Tensor, residual: Tensor | None, residual_weight: Tensor | None) -> bool:
        """On tensor cores: 16 bits, a row of z in a warp's registers, and rows that cp.async can copy."""
        given = [t for t in (x, weight, residual, residual_weight) if t is not None]
        same = {t.dtype for t in given} in ({torch.float16}, {torch.bfloat16})
        multiplied = given if residual_weight is not None else given[:2]
        return same and self._fits(weight.shape[0]) and all(_rows_aligned(rows_of(t)) for t in multiplied)

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, residual_weight: Tensor | None,
        out: Tensor, inverse: Tensor | None,
    ) -> None:  # fmt: skip
        depth = residual.shape[1] if residual is not None and residual_weight is not None else 0
        sizes = (*out.shape, x.shape[1], depth)
        self._linear(
            _matrix(x), _matrix(weight), _matrix(residual), _matrix(residual_weight), pointer(bias), sizes,
            out.data_ptr(), out.stride(0), pointer(inverse), self.stream,
        )  # fmt: skip

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
        self._backward(
            _matrix(grad), _matrix(y), pointer(inverse), *dz.shape[1:], dz.shape[0] == 2, dz.data_ptr(), dz.stride(0),
            self.stream,
        )  # fmt: skip
