"""projection in Triton: the layer in one kernel, and what happens to a row around a GEMM. Contract: csrc/projection.h.

``linear`` makes the product, adds bias and residual, and normalises rows that one tile holds whole: z is never written.
Products are those of _common.py. Wider layers take a GEMM of torch's and ``forward``.

In ``forward`` and ``backward`` a program owns a block of rows and walks over their columns twice: for the sum, in
float64 as the squares of a float32 row of norm 1e19 overflow float32, and for the store, when the row is found in L1 or
L2. No atomics, sums in a fixed order: the same bits every time. Addresses are int64. Bytes: as csrc/cuda/projection.cu.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import multiply

# (operand bits, d_out up to) -> (rows of a tile, columns of the inputs at a time, num_warps, num_stages). Chosen by
# compiling: nothing spills; not measured on a GPU.
PROJECTION_LINEAR_CONFIGS = {
    (16, 128): (128, 64, 8, 3),
    (16, 256): (64, 64, 8, 3),
    (16, 512): (32, 64, 8, 2),
    (32, 128): (64, 16, 8, 2),
    (32, 256): (32, 16, 8, 2),
}
# Elements of a tile, columns of the widest one, warps: 16 elements a thread. An estimate: not yet measured on a GPU.
PROJECTION_ELEMENTS, PROJECTION_WIDEST, PROJECTION_WARPS = 2048, 1024, 4


@triton.jit
def _add_product(
    acc, p_x, p_w, o_r, m_r, o_n, m_n, K, s_x, s_w, OPERAND: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """acc + x W^T for rows o_r of x [rows, K] and o_n of W [D, K]."""
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = (o_k < K)[None, :]
        b_x = tl.load(p_x + o_r[:, None] * s_x + o_k[None, :], mask=m_r[:, None] & m_k, other=0.0)
        b_w = tl.load(p_w + o_n[:, None] * s_w + o_k[None, :], mask=m_n[:, None] & m_k, other=0.0)
        acc = multiply(b_x.to(OPERAND), tl.trans(b_w.to(OPERAND)), acc)
    return acc


@triton.jit
def linear(
    p_x, p_w,  # [rows, K] and [D, K], row strides s_x and s_w
    p_bias,  # [D] float32, or anything if not HAS_BIAS
    p_residual, p_residual_w,  # [rows, KR] and [D, KR], if PROJECTED; a residual that is not is [rows, D]
    p_out,  # [rows, D], row stride s_out
    p_inverse,  # [rows] float32: 1 / max(|z|, 1e-12), or anything if not NORMALIZE
    rows, D, K, KR, s_x, s_w, s_residual, s_residual_w, s_out,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PROJECTED: tl.constexpr, NORMALIZE: tl.constexpr,
    OPERAND: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """WIDTH: a power of two from D up."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < rows
    o_n = tl.arange(0, WIDTH)
    m_n = o_n < D
    o_w = o_n.to(tl.int64)
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    acc = _add_product(acc, p_x, p_w, o_r, m_r, o_w, m_n, K, s_x, s_w, OPERAND, BLOCK_K)
    if PROJECTED:
        acc = _add_product(
            acc, p_residual, p_residual_w, o_r, m_r, o_w, m_n, KR, s_residual, s_residual_w, OPERAND, BLOCK_K
        )
    mask = m_r[:, None] & m_n[None, :]
    if HAS_BIAS:
        acc += tl.load(p_bias + o_n, mask=m_n, other=0.0)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(p_residual + o_r[:, None] * s_residual + o_n[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORMALIZE:
        wide = acc.to(tl.float64)  # columns beyond D are zeros
        norm = tl.sqrt(tl.sum(wide * wide, axis=1))
        b_inverse = (1.0 / tl.where(norm < 1e-12, 1e-12, norm)).to(tl.float32)  # NaN stays NaN
        tl.store(p_inverse + o_r, b_inverse, mask=m_r)
        acc *= b_inverse[:, None]
    tl.store(p_out + o_r[:, None] * s_out + o_n[None, :], acc.to(p_out.dtype.element_ty), mask=mask)


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
    p_dz,  # [rows, D] float32, contiguous; or bfloat16, whose second part is s_part elements further
    rows, D, s_grad, s_y, s_part,
    NORMALIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
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
        b_high = b_dz.to(p_dz.dtype.element_ty)
        tl.store(p_dz + o_r[:, None] * D + o_d[None, :], b_high, mask=mask)
        if PARTS:
            # What the first part leaves; of an infinity nothing, as inf - inf is NaN.
            b_rest = tl.where(tl.abs(b_dz) < float("inf"), b_dz - b_high.to(tl.float32), 0.0)
            tl.store(p_dz + s_part + o_r[:, None] * D + o_d[None, :], b_rest.to(p_dz.dtype.element_ty), mask=mask)
