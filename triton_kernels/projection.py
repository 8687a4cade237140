"""projection in Triton: what happens to a row before and after the GEMMs. Contract and formulas: csrc/projection.h.

A program owns a block of rows and walks over their columns twice: for the sum, in float64 as the squares of a float32
row of norm 1e19 overflow float32, and for the store, when the row is found in L1 or L2. No atomics, sums in a fixed
order: the same bits every time. Addresses are int64. Bytes: as csrc/cuda/projection.cu.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Elements of a tile, columns of the widest one, warps: 16 elements a thread. An estimate: not yet measured on a GPU.
PROJECTION_ELEMENTS, PROJECTION_WIDEST, PROJECTION_WARPS = 2048, 1024, 4


@triton.jit
def _z(
    p_z, p_bias, p_residual, o_r, o_d, m_d, mask, D, s_residual,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """W x + bias + residual [len(o_r), len(o_d)], 0 outside of the mask."""
    b_z = tl.load(p_z + o_r[:, None] * D + o_d[None, :], mask=mask, other=0.0)
    if HAS_BIAS:
        b_z += tl.load(p_bias + o_d, mask=m_d, other=0.0)[None, :]
    if HAS_RESIDUAL:
        b_z += tl.load(p_residual + o_r[:, None] * s_residual + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    return b_z


@triton.jit
def forward(
    p_z,  # [rows, D] float32, contiguous
    p_bias,  # [D] float32, or anything if not HAS_BIAS
    p_residual,  # [rows, D], row stride s_residual, or anything if not HAS_RESIDUAL
    p_out,  # [rows, D], row stride s_out
    p_inverse,  # [rows] float32: 1 / max(|z|, 1e-12), or anything if not NORMALIZE
    rows, D, s_residual, s_out,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < rows
    b_inverse = tl.full([BLOCK], 1.0, tl.float32)
    if NORMALIZE:
        square = tl.zeros([BLOCK], tl.float64)
        for d in range(0, D, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            m_d = o_d < D
            mask = m_r[:, None] & m_d[None, :]
            b_z = _z(p_z, p_bias, p_residual, o_r, o_d, m_d, mask, D, s_residual, HAS_BIAS, HAS_RESIDUAL)
            b_z = b_z.to(tl.float64)
            square += tl.sum(b_z * b_z, axis=1)
        norm = tl.sqrt(square)
        b_inverse = (1.0 / tl.where(norm < 1e-12, 1e-12, norm)).to(tl.float32)  # NaN stays NaN
        tl.store(p_inverse + o_r, b_inverse, mask=m_r)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        mask = m_r[:, None] & m_d[None, :]
        b_z = _z(p_z, p_bias, p_residual, o_r, o_d, m_d, mask, D, s_residual, HAS_BIAS, HAS_RESIDUAL)
        b_y = b_z * b_inverse[:, None]
        tl.store(p_out + o_r[:, None] * s_out + o_d[None, :], b_y.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def backward(
    p_grad,  # [rows, D], row stride s_grad
    p_y,  # [rows, D], row stride s_y; not read if not NORMALIZE
    p_inverse,  # [rows] float32, or anything if not NORMALIZE
    p_dz,  # [rows, D] float32, contiguous
    rows, D, s_grad, s_y,
    NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < rows
    b_inverse = tl.full([BLOCK], 1.0, tl.float32)
    along = tl.zeros([BLOCK], tl.float32)
    if NORMALIZE:
        b_inverse = tl.load(p_inverse + o_r, mask=m_r, other=0.0)
        dot = tl.zeros([BLOCK], tl.float64)
        for d in range(0, D, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            mask = m_r[:, None] & (o_d < D)[None, :]
            b_g = tl.load(p_grad + o_r[:, None] * s_grad + o_d[None, :], mask=mask, other=0.0)
            b_y = tl.load(p_y + o_r[:, None] * s_y + o_d[None, :], mask=mask, other=0.0)
            dot += tl.sum(b_g.to(tl.float64) * b_y.to(tl.float64), axis=1)
        # 0.999: the largest inverse, rounded to float32; there the norm is constant.
        along = tl.where(b_inverse >= 0.999e12, 0.0, dot.to(tl.float32))
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        mask = m_r[:, None] & (o_d < D)[None, :]
        b_dz = tl.load(p_grad + o_r[:, None] * s_grad + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        if NORMALIZE:
            b_y = tl.load(p_y + o_r[:, None] * s_y + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
            b_dz = (b_dz - along[:, None] * b_y) * b_inverse[:, None]
        tl.store(p_dz + o_r[:, None] * D + o_d[None, :], b_dz, mask=mask)
