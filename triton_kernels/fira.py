"""fira in Triton: four kernels a matrix. Formulas: csrc/fira.h.

``project``: a program owns a block of vectors and a block of coordinates; R = X P over tiles of d, |x|^2 beside it.
``moments``: a program owns a block of vectors and walks over r: the moments, |R|^2, |N|^2 (and R^T M R).
``apply``: a program owns a tile of W; C = a_n N - a_r f R is made in registers, tile by tile of r, from m, v and R, and
multiplied by P; the epilogue reads W and G and writes W.
``limiter``: s, lim and f, between ``moments`` and ``apply``. Near a_r = 1 ``residual`` and the limiter again follow it,
and end at once unless it found that s had cancelled.

The side only swaps strides: every array is read as vectors along the first dimension. 16-bit operands enter tl.dot as
they are with float32 sums, float32 in three tf32 products (an error of 2^-21 of a product). Addresses are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

# operand bits -> (vectors, coordinates or columns, depth, num_warps, num_stages) of a tile. Chosen by compiling: none
# spills on sm_80, sm_90, sm_100 (tests/test_kernel_budget.py). Not yet measured on a GPU.
FIRA_CONFIGS = {16: (64, 64, 32, 4, 3), 32: (64, 32, 32, 4, 2)}
WIDE_WARPS = 8  # of `apply` with stochastic rounding (4 spill on sm_80) or 8-bit moments and 16-bit operands (sm_100)
NORM_EPS = tl.constexpr(1e-8)  # beside |R_j| and beside the limiter's norm
LIMITER_BLOCK, LIMITER_WARPS = 1024, 8  # 4 warps spill
# The limiter's s^2 may be this much smaller than sum_j phi_j^2 |x_j|^2 before the residual is formed; the second number
# where P is 16-bit and no Gram matrix is given: P^T P is then off by up to 2^-9.
KAPPA = (1e3, 16.0)
BLOCK = tl.constexpr(128)  # coordinates that share a scale of 8-bit moments
# (8-bit moments, with a Gram matrix) -> vectors, coordinates, depth of R M, num_warps
MOMENTS_CONFIGS = {
    (False, False): (32, 64, 32, 4),
    (False, True): (32, 32, 32, 4),
    (True, False): (16, 128, 32, 4),
    (True, True): (16, 128, 16, 8),
}


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


# 8-bit moments, coded as in pyelastic.eager.fira: codes as float32, scales along the first dimension.
@triton.jit
def _decode_m(b, scale):
    y = b / 127.0
    return y * tl.abs(y) * scale


@triton.jit
def _decode_v(b, scale):
    y = b / 255.0
    return y * y * (y * y) * scale


@triton.jit
def _largest(b):
    """The largest |b| of each row; NaN where one is, which tl.max would drop."""
    bad = tl.sum(tl.where(b != b, 1.0, 0.0), axis=1)
    return tl.where(bad > 0.0, float("nan"), tl.max(tl.where(b != b, 0.0, tl.abs(b)), axis=1))


@triton.jit
def _round(y):
    """To the nearest integer, ties to even, for |y| < 2^22."""
    return (y + 12582912.0) - 12582912.0


@triton.jit
def _encode_m(b, scale):
    y = 127.0 * tl.sqrt(tl.abs(b) / tl.where(scale > 0.0, scale, 1.0))
    y = _round(tl.minimum(tl.where(y == y, y, 0.0), 127.0))
    return tl.where(b < 0.0, -y, y)


@triton.jit
def _encode_v(b, scale):
    y = 255.0 * tl.sqrt(tl.sqrt(b / tl.where(scale > 0.0, scale, 1.0)))
    y = _round(tl.minimum(tl.where(y == y, y, 0.0), 255.0))
    return tl.where((b > 0.0) & (y < 1.0), 1.0, y)


@triton.jit
def moments(
    p_r, p_m, p_v,  # [L, r], strides s_rl, s_rr (all three alike)
    p_m_scale, p_v_scale,  # [L, ceil(r / 128)], or anything if not EIGHT
    p_gram,  # [r, r], or anything if not HAS_GRAM
    p_stats,  # [4, L]: |R|^2, |N|^2, R^T M R go to rows 1, 2, 3
    p_scalars,  # gradient factor, correction of N, 1 if the step is skipped
    L, R, s_rl, s_rr, beta1, rest1, beta2, rest2, eps,
    HAS_GRAM: tl.constexpr, EIGHT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """EIGHT: moments are codes, and a tile is as wide as a block that shares a scale."""
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
            b_m = tl.load(p_m + at, mask=mask, other=0).to(tl.float32)
            b_v = tl.load(p_v + at, mask=mask, other=0).to(tl.float32)
            scale = o_l * ((R + BLOCK - 1) // BLOCK) + k // BLOCK
            if EIGHT:
                b_m = _decode_m(b_m, tl.load(p_m_scale + scale, mask=m_l, other=0.0)[:, None])
                b_v = _decode_v(b_v, tl.load(p_v_scale + scale, mask=m_l, other=0.0)[:, None])
            b_m = beta1 * b_m + rest1 * b_r
            b_v = beta2 * b_v + rest2 * (b_r * b_r)
            if EIGHT:
                top_m, top_v = _largest(b_m), _largest(b_v)
                tl.store(p_m_scale + scale, top_m, mask=m_l)
                tl.store(p_v_scale + scale, top_v, mask=m_l)
                b_m, b_v = _encode_m(b_m, top_m[:, None]), _encode_v(b_v, top_v[:, None])
            s_m, s_v = b_m.to(p_m.dtype.element_ty), b_v.to(p_v.dtype.element_ty)
            tl.store(p_m + at, s_m, mask=mask)
            tl.store(p_v + at, s_v, mask=mask)
            b_m, b_v = s_m.to(tl.float32), s_v.to(tl.float32)
            if EIGHT:
                b_m, b_v = _decode_m(b_m, top_m[:, None]), _decode_v(b_v, top_v[:, None])
            b_n = _normalized(b_m, b_v, eps, correction)
            b_n = tl.where(mask, b_n, 0.0)  # eps may be 0
            r2 += tl.sum(b_r * b_r, axis=1)
            n2 += tl.sum(b_n * b_n, axis=1)
            if HAS_GRAM:
                row = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
                for j in range(0, R, BLOCK_K):
                    o_j = j + tl.arange(0, BLOCK_K).to(tl.int64)
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
def limiter(
    p_stats,  # [4, L], as `project`, `moments` and `residual` have left them
    p_f,  # [L]: a_s phi / lim
    p_scalars,  # gradient factor, skip at 2; to 6 goes 1 if the residual has to be formed, to 7 the norm as it was
    p_norm,  # the limiter's norm
    L, gamma, a_r, a_s, most,
    EXACT: tl.constexpr, PER_MATRIX: tl.constexpr, COLLAPSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a matrix; sums in float64. EXACT: stats' first row holds |x - a_r P r|^2, if it was formed at all."""
    factor, wanted = tl.load(p_scalars).to(tl.float64), tl.load(p_scalars + 2) == 0.0
    if EXACT:
        wanted = tl.load(p_scalars + 6) != 0.0
    if wanted:
        before = tl.load(p_norm)
        if EXACT:
            before = tl.load(p_scalars + 7)
        r_all = tl.zeros([BLOCK], tl.float64)
        n_all = tl.zeros([BLOCK], tl.float64)
        if PER_MATRIX:
            for j in range(0, L, BLOCK):
                o = j + tl.arange(0, BLOCK).to(tl.int64)
                r_all += tl.load(p_stats + L + o, mask=o < L, other=0.0).to(tl.float64)
                n_all += tl.load(p_stats + o + L + L, mask=o < L, other=0.0).to(tl.float64)
        one = tl.sqrt(tl.sum(n_all, axis=0)) / (tl.sqrt(tl.sum(r_all, axis=0)) + NORM_EPS)
        s_all = tl.zeros([BLOCK], tl.float64)
        x_all = tl.zeros([BLOCK], tl.float64)
        for j in range(0, L, BLOCK):
            o = j + tl.arange(0, BLOCK).to(tl.int64)
            x2 = tl.load(p_stats + o, mask=o < L, other=0.0).to(tl.float64) * factor * factor
            r2 = tl.load(p_stats + L + o, mask=o < L, other=0.0).to(tl.float64)
            phi2 = one * one
            if not PER_MATRIX:
                n2 = tl.load(p_stats + o + L + L, mask=o < L, other=0.0).to(tl.float64)
                phi2 = tl.sqrt(r2) + NORM_EPS
                phi2 = n2 / (phi2 * phi2)
            q = x2
            if not EXACT:
                g2 = tl.load(p_stats + o + L + L + L, mask=o < L, other=0.0).to(tl.float64)
                q = x2 - 2.0 * a_r * r2 + a_r * a_r * g2
            s_all += phi2 * tl.where(q < 0.0, 0.0, q)  # NaN is not below
            x_all += phi2 * x2
        s2 = tl.sum(s_all, axis=0)
        s = tl.sqrt(s2)
        old = before.to(tl.float64)
        first = old != old
        if not COLLAPSE:
            first = first | (old == 0.0)
        growth = s / (old + NORM_EPS)
        lim = tl.where(gamma > 0.0, tl.where(growth < gamma, gamma, growth) / gamma, 1.0)
        lim = tl.where(first, 1.0, lim)
        kept = s / lim
        if not COLLAPSE:
            kept = tl.where(s == 0.0, old, kept)
        tl.store(p_norm, kept.to(p_norm.dtype.element_ty))
        if not EXACT:
            tl.store(p_scalars + 7, before)
            tl.store(p_scalars + 6, (tl.sum(x_all, axis=0) > most * s2).to(tl.float32))
        for j in range(0, L, BLOCK):
            o = j + tl.arange(0, BLOCK).to(tl.int64)
            phi = tl.zeros([BLOCK], tl.float64) + one
            if not PER_MATRIX:
                r2 = tl.load(p_stats + L + o, mask=o < L, other=0.0).to(tl.float64)
                n2 = tl.load(p_stats + o + L + L, mask=o < L, other=0.0).to(tl.float64)
                phi = tl.sqrt(n2) / (tl.sqrt(r2) + NORM_EPS)
            tl.store(p_f + o, (a_s * phi / lim).to(tl.float32), mask=o < L)


@triton.jit
def residual(
    p_x,  # [L, d], strides s_xl, s_xd
    p_p,  # [d, r], strides s_pd, s_pr
    p_r,  # [L, r] float32, strides s_rl, s_rr
    p_stats,  # |x - a_r P r|^2 goes over |x|^2
    p_scalars,
    L, D, R, s_xl, s_xd, s_pd, s_pr, s_rl, s_rr, a_r,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Only where the limiter asks for it. A program walks over all of d: the sum has one order and needs no scratch."""
    if tl.load(p_scalars + 6) != 0.0:
        o_l = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
        m_l = o_l < L
        square = tl.zeros([BLOCK_L], tl.float64)
        for n in range(0, D, BLOCK_N):
            o_d = n + tl.arange(0, BLOCK_N).to(tl.int64)
            m_d = o_d < D
            acc = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
            for k in range(0, R, BLOCK_K):
                o_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
                m_k = o_k < R
                b_r = tl.load(p_r + o_l[:, None] * s_rl + o_k[None, :] * s_rr,
                              mask=m_l[:, None] & m_k[None, :], other=0.0)  # fmt: skip
                b_p = tl.load(p_p + o_d[None, :] * s_pd + o_k[:, None] * s_pr,
                              mask=m_k[:, None] & m_d[None, :], other=0.0)  # fmt: skip
                # In float32 also for 16 bits: the rounding of R would be the residual.
                acc = tl.dot(b_r, b_p.to(tl.float32), acc, input_precision="tf32x3")
            b_x = tl.load(p_x + o_l[:, None] * s_xl + o_d[None, :] * s_xd, mask=m_l[:, None] & m_d[None, :], other=0.0)
            b_q = b_x.to(tl.float32) - a_r * acc
            square += tl.sum(b_q * b_q, axis=1).to(tl.float64)
        tl.store(p_stats + o_l, square.to(tl.float32), mask=m_l)


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
    p_r, p_m, p_v, p_m_scale, p_v_scale,  # as in `moments`
    p_f,  # [L]
    p_scalars,  # gradient factor, correction of N, 1 if the step is skipped, step size, 1 - lr wd, steps taken
    L, D, R, s_wl, s_wd, s_xl, s_xd, s_el, s_ed, s_pd, s_pr, s_rl, s_rr, eps, a_n, a_r, seed_low, seed_high,
    BACK: tl.constexpr, EIGHT: tl.constexpr, HAS_REST: tl.constexpr, STOCHASTIC: tl.constexpr,
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
                b_m = tl.load(p_m + at, mask=mask, other=0).to(tl.float32)
                b_v = tl.load(p_v + at, mask=mask, other=0).to(tl.float32)
                if EIGHT:  # a tile lies in one block of coordinates
                    scale = o_l * ((R + BLOCK - 1) // BLOCK) + k // BLOCK
                    b_m = _decode_m(b_m, tl.load(p_m_scale + scale, mask=m_l, other=0.0)[:, None])
                    b_v = _decode_v(b_v, tl.load(p_v_scale + scale, mask=m_l, other=0.0)[:, None])
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
