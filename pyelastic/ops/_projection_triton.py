"""projection's Triton kernels (triton_kernels/projection.py) for the shared launcher (_projection.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyelastic.ops._projection import Kernels


class TritonKernels(Kernels):
    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        from pyelastic.triton_kernels import projection

        self.kernels = projection

    def _grid(self, rows: int, dim: int) -> tuple[tuple[int], dict[str, int]]:
        """Programs and tiles: as many rows each as fill a tile."""
        k = self.kernels
        width = min(k.PROJECTION_WIDEST, 1 << (dim - 1).bit_length())
        block = k.PROJECTION_ELEMENTS // width
        return (-(-rows // block),), {"BLOCK": block, "BLOCK_D": width, "num_warps": k.PROJECTION_WARPS}

    def forward(
        self, z: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor, inverse: Tensor | None
    ) -> None:
        grid, tiles = self._grid(*z.shape)
        none: Any = z  # where the kernel looks at nothing
        self.kernels.forward[grid](
            z, none if bias is None else bias, none if residual is None else residual, out,
            none if inverse is None else inverse, *z.shape, 0 if residual is None else residual.stride(0),
            out.stride(0), HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
            NORMALIZE=inverse is not None, **tiles,
        )  # fmt: skip

    def backward(self, grad: Tensor, y: Tensor, inverse: Tensor | None, dz: Tensor) -> None:
        grid, tiles = self._grid(*dz.shape)
        self.kernels.backward[grid](
            grad, y, dz if inverse is None else inverse, dz, *dz.shape, grad.stride(0), y.stride(0),
            NORMALIZE=inverse is not None, **tiles,
        )  # fmt: skip
