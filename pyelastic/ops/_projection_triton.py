"""projection's Triton kernels (triton_kernels/projection.py) for the shared launcher (_projection.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyelastic.ops._projection import Kernels


def _operand_bits(*operands: Tensor | None) -> int:
    """16 where all that is multiplied has one 16-bit dtype; a residual that is only added does not matter."""
    x, weight, residual, residual_weight = operands
    multiplied = [x, weight, *((residual, residual_weight) if residual_weight is not None else ())]
    dtypes = {t.dtype for t in multiplied if t is not None}
    return 16 if len(dtypes) == 1 and dtypes.pop() in (torch.float16, torch.bfloat16) else 32


class TritonKernels(Kernels):
    splits = True

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

    def _config(self, d_out: int, bits: int) -> tuple[int, ...] | None:
        table = self.kernels.PROJECTION_LINEAR_CONFIGS
        held = [width for b, width in table if b == bits and width >= d_out]
        return table[bits, min(held)] if held else None

    def fuses(self, x: Tensor, weight: Tensor, residual: Tensor | None, residual_weight: Tensor | None) -> bool:
        return self._config(weight.shape[0], _operand_bits(x, weight, residual, residual_weight)) is not None

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, residual_weight: Tensor | None,
        out: Tensor, inverse: Tensor | None,
    ) -> None:  # fmt: skip
        import triton
        import triton.language as tl

        bits = _operand_bits(x, weight, residual, residual_weight)
        config = self._config(weight.shape[0], bits)
        assert config is not None
        block, block_k, warps, stages = config
        operand = tl.float32
        if bits == 16:
            operand = tl.float16 if x.dtype == torch.float16 else tl.bfloat16
        block = min(block, max(16, triton.next_power_of_2(x.shape[0])))
        none: Any = out  # where the kernel looks at nothing
        r, r_w = none if residual is None else residual, none if residual_weight is None else residual_weight
        self.kernels.linear[(triton.cdiv(x.shape[0], block),)](
            x, weight, none if bias is None else bias, r, r_w, out, none if inverse is None else inverse, *out.shape,
            x.shape[1], r.shape[1], x.stride(0), weight.stride(0), r.stride(0), r_w.stride(0), out.stride(0),
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None and residual_weight is None,
            PROJECTED=residual_weight is not None, NORMALIZE=inverse is not None, OPERAND=operand, BLOCK=block,
            WIDTH=max(16, triton.next_power_of_2(out.shape[1])), BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip

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
        grid, tiles = self._grid(*dz.shape[1:])
        self.kernels.backward[grid](
            grad, y, dz if inverse is None else inverse, dz, *dz.shape[1:], grad.stride(0), y.stride(0), dz.stride(0),
            NORMALIZE=inverse is not None, PARTS=dz.shape[0] == 2, **tiles,
        )  # fmt: skip
