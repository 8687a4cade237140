"""fira in Triton: three kernels a matrix. Formulas: csrc/fira.h.

``project``: a program owns a block of vectors and a block of coordinates; R = X P over tiles of d, |x|^2 beside it.
``moments``: a program owns a block of vectors and walks over r: the moments, |R|^2, |N|^2 (and R^T M R).
``apply``: a program owns a tile of W; C = a_n N - a_r f R is made in registers, tile by tile of r, from m, v and R, and
multiplied by P; the epilogue reads W and G and writes W. Between them the launcher does the [L]-sized limiter in torch.

The side only swaps strides: every array is read as vectors along the first dimension. 16-bit operands enter tl.dot as
they are with float32 sums, float32 in three tf32 products (an error of 2^-21 of a product). Addresses are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

# operand bits -> (vectors, coordinates or columns, depth, num_warps, num_stages) of a tile. Chosen by compiling: none
# spills on sm_80, sm_90, sm_100 (tests/test_kernel_budget.py). Not yet measured on a GPU.
FIRA_CONFIGS = {16: (64, 64, 32, 4, 3), 32: (64, 32, 32, 4, 2)}
STOCHASTIC_WARPS = 8  # 4 spill on sm_80
MOMENTS_BLOCKS = {False: (32, 64), True: (32, 32)}  # with a Gram matrix -> vectors, coordinates


@triton.jit
def project(
    p_x,  # [L, d], strides s_xl, s_xd
    p_p,  # [d, r], strides s_pd, s_pr
    p_r,  # [L, r] float32, strides s_rl, s_rr
    p_stats,  # [4, L]: |x|^2 goes to row 0
    L, D, R, s_xl, s_xd, s_pd, s_pr, s_rl, s_rr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    o_l = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    o_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_l, m_n = o_l < L, o_n < R
    acc = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_L], tl.float32)
    for k in range(0, D, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        m_k = o_k < D
        b_x = tl.load(p_x + o_l[:, None] * s_xl + o_k[None, :] * s_xd, mask=m_l[:, None] & m_k[None, :], other=0.0)
        b_p = tl.load(p_p + o_k[:, None] * s_pd + o_n[None, :] * s_pr, mask=m_k[:, None] & m_n[None, :], other=0.0)
        acc = tl.dot(b_x, b_p, acc, input_precision="tf32x3")
        wide = b_x.to(tl.float32)
        square += tl.sum(wide * wide, axis=1)
    tl.store(p_r + o_l[:, None] * s_rl + o_n[None, :] * s_rr, acc, mask=m_l[:, None] & m_n[None, :])
    if tl.program_id(1) == 0:
        tl.store(p_stats + o_l, square, mask=m_l)


@triton.jit
def _normalized(b_m, b_v, eps, correction):
    return correction * (b_m / (tl.sqrt(b_v) + eps))


@triton.jit
def moments(
    p_r, p_m, p_v,  # [L, r], strides s_rl, s_rr (all three alike)
    p_gram,  # [r, r], or anything if not HAS_GRAM
    p_stats,  # [4, L]: |R|^2, |N|^2, R^T M R go to rows 1, 2, 3
    p_scalars,  # gradient factor, correction of N, 1 if the step is skipped
    L, R, s_rl, s_rr, beta1, rest1, beta2, rest2, eps,
    HAS_GRAM: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_l = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    m_l = o_l < L
    factor, correction, skip = tl.load(p_scalars), tl.load(p_scalars + 1), tl.load(p_scalars + 2)
    r2 = tl.zeros([BLOCK_L], tl.float32)
    n2 = tl.zeros([BLOCK_L], tl.float32)
    g2 = tl.zeros([BLOCK_L], tl.float32)
    if skip == 0.0:
        for k in range(0, R, BLOCK_N):
            o_n = k + tl.arange(0, BLOCK_N).to(tl.int64)
            mask = m_l[:, None] & (o_n < R)[None, :]
            at = o_l[:, None] * s_rl + o_n[None, :] * s_rr
            b_r = factor * tl.load(p_r + at, mask=mask, other=0.0)
            b_m = beta1 * tl.load(p_m + at, mask=mask, other=0.0).to(tl.float32) + rest1 * b_r
            b_v = beta2 * tl.load(p_v + at, mask=mask, other=0.0).to(tl.float32) + rest2 * (b_r * b_r)
            s_m, s_v = b_m.to(p_m.dtype.element_ty), b_v.to(p_v.dtype.element_ty)
            tl.store(p_m + at, s_m, mask=mask)
            tl.store(p_v + at, s_v, mask=mask)
            b_n = _normalized(s_m.to(tl.float32), s_v.to(tl.float32), eps, correction)
            b_n = tl.where(mask, b_n, 0.0)  # eps may be 0
            r2 += tl.sum(b_r * b_r, axis=1)
            n2 += tl.sum(b_n * b_n, axis=1)
            if HAS_GRAM:
                row = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
                for j in range(0, R, BLOCK_N):
                    o_j = j + tl.arange(0, BLOCK_N).to(tl.int64)
                    m_j = o_j < R
                    b_o = tl.load(p_r + o_l[:, None] * s_rl + o_j[None, :] * s_rr,
                                  mask=m_l[:, None] & m_j[None, :], other=0.0)  # fmt: skip
                    b_g = tl.load(p_gram + o_j[:, None] * R + o_n[None, :],
                                  mask=m_j[:, None] & (o_n < R)[None, :], other=0.0)  # fmt: skip
                    row = tl.dot(factor * b_o, b_g, row, input_precision="tf32x3")
                g2 += tl.sum(b_r * row, axis=1)
        tl.store(p_stats + L + o_l, r2, mask=m_l)
        tl.store(p_stats + o_l + L + L, n2, mask=m_l)  # no product in 32 bits
        tl.store(p_stats + o_l + L + L + L, g2 if HAS_GRAM else r2, mask=m_l)


@triton.jit
def _mix(x):
    """A 32-bit integer hash (Wellons' lowbias32), as pyelastic.eager.fira, of words held in int64.

    The factors are split: no product leaves int64.
    """
    x = x ^ (x >> 16)
    x = (x * 0x352D + (((x * 0x7FEB) & 0xFFFF) << 16)) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0xA68B + (((x * 0x846C) & 0xFFFF) << 16)) & 0xFFFFFFFF
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def apply(
    p_w, p_x,  # W and G as vectors [L, d], strides s_wl, s_wd and s_xl, s_xd
    p_rest,  # what rounding W cut off, strides s_el, s_ed; or anything if not HAS_REST
    p_p,  # [d, r]
    p_r, p_m, p_v,  # [L, r]
    p_f,  # [L]
    p_scalars,  # gradient factor, correction of N, 1 if the step is skipped, step size, 1 - lr wd, steps taken
    L, D, R, s_wl, s_wd, s_xl, s_xd, s_el, s_ed, s_pd, s_pr, s_rl, s_rr, eps, a_n, a_r, seed_low, seed_high,
    BACK: tl.constexpr, HAS_REST: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    o_l = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    o_d = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_l, m_d = o_l < L, o_d < D
    factor, correction, skip = tl.load(p_scalars), tl.load(p_scalars + 1), tl.load(p_scalars + 2)
    size, keep = tl.load(p_scalars + 3), tl.load(p_scalars + 4)
    if skip == 0.0:
        b_f = tl.load(p_f + o_l, mask=m_l, other=0.0)
        acc = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
        if BACK:
            for k in range(0, R, BLOCK_K):
                o_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
                mask = m_l[:, None] & (o_k < R)[None, :]
                at = o_l[:, None] * s_rl + o_k[None, :] * s_rr
                b_r = factor * tl.load(p_r + at, mask=mask, other=0.0)
                b_m = tl.load(p_m + at, mask=mask, other=0.0).to(tl.float32)
                b_v = tl.load(p_v + at, mask=mask, other=0.0).to(tl.float32)
                b_c = a_n * _normalized(b_m, b_v, eps, correction) - a_r * b_f[:, None] * b_r
                b_c = tl.where(mask, b_c, 0.0).to(p_p.dtype.element_ty)
                b_p = tl.load(p_p + o_d[None, :] * s_pd + o_k[:, None] * s_pr,
                              mask=(o_k < R)[:, None] & m_d[None, :], other=0.0)  # fmt: skip
                acc = tl.dot(b_c, b_p, acc, input_precision="tf32x3")
        mask = m_l[:, None] & m_d[None, :]
        p_out = p_w + o_l[:, None] * s_wl + o_d[None, :] * s_wd
        b_x = tl.load(p_x + o_l[:, None] * s_xl + o_d[None, :] * s_xd, mask=mask, other=0.0).to(tl.float32)
        base = tl.load(p_out, mask=mask, other=0.0).to(tl.float32)
        element = o_l[:, None] * s_el + o_d[None, :] * s_ed
        if HAS_REST:
            base += tl.load(p_rest + element, mask=mask, other=0.0).to(tl.float32)
        value = keep * (base - size * (acc + b_f[:, None] * (factor * b_x)))
        if STOCHASTIC:
            key = _mix(seed_high.to(tl.int64) ^ _mix(tl.load(p_scalars + 5).to(tl.int64)))
            key = _mix(seed_low.to(tl.int64) ^ key)
            noise = _mix((element & 0xFFFFFFFF) ^ _mix((element >> 32) ^ key)) & 0xFFFF
            bits = value.to(tl.int32, bitcast=True)
            finite = (bits & 0x7F800000) != 0x7F800000
            # The magnitude grows by less than one unit of bfloat16; the sign bit stays.
            raised = (bits + noise.to(tl.int32)) & -65536
            value = tl.where(finite, raised.to(tl.float32, bitcast=True), value)
        rounded = value.to(p_w.dtype.element_ty)
        tl.store(p_out, rounded, mask=mask)
        if HAS_REST:
            tl.store(p_rest + element, (value - rounded.to(tl.float32)).to(p_w.dtype.element_ty), mask=mask)
