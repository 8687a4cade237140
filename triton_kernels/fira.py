"""fira in Triton: four launches for a group of matrices, six near a_r = 1. Formulas: csrc/fira.h.

``project``: a program owns a block of vectors and a block of coordinates; R = X P over tiles of d, |x|^2 beside it.
``moments``: a program owns a block of vectors and walks over r: the moments, |R|^2, |N|^2 (and R^T M R).
``limiter``: one program a matrix: s, lim, f, and the scalars of the step. Near a_r = 1 ``residual`` and
``limiter_exact`` follow it, and end at once for matrices of which it found that s had not cancelled.
``apply``: a program owns a tile of W; C = a_n N - a_r f R is made in registers, tile by tile of r, from m, v and R, and
multiplied by P; the epilogue reads W and G and writes W.

A group's matrices have one side and one alignment. Its table holds FIELDS numbers a matrix, addresses among them, and
for each kernel the first program of each matrix: a program finds its matrix there. Only the side is a constant: all is
read as vectors along the first dimension, with unit strides along coordinates on the right and along vectors on the
left. 16-bit operands enter tl.dot as they are with float32 sums, float32 in three tf32 products (an error of 2^-21 of a
product). Offsets are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

# (operand bits, aligned) -> (vectors, coordinates or columns, depth, num_warps, num_stages) of a tile. Chosen by
# compiling: none spills on sm_80, sm_90, sm_100 (tests/test_kernel_budget.py). Not yet measured on a GPU.
FIRA_CONFIGS = {
    (16, True): (64, 64, 32, 4, 3),
    (32, True): (64, 32, 32, 4, 2),
    (16, False): (32, 32, 32, 4, 2),
    (32, False): (32, 32, 32, 8, 2),
}
WIDE_WARPS = 8  # of `apply` with stochastic rounding (4 spill on sm_80) or 8-bit moments and 16-bit operands (sm_100)
NORM_EPS = tl.constexpr(1e-8)  # beside |R_j| and beside the limiter's norm
LIMITER_BLOCK, LIMITER_WARPS = 1024, 16  # 8 warps spill on sm_80
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

# --- the table ---

GROUP = 64  # matrices of a launch
FIELDS = tl.constexpr(24)
# Addresses (R, stats, f, scalars: offsets in the scratch), then sizes and row strides in elements. W, X (the gradient):
# [L, d]; P: [d, r]; R, m, v: [L, r]; scales: [L, ceil(r / 128)]; gram: [r, r]; rest, what rounding W cut off: [L, d];
# stats: [4, L], |x|^2 (then |x - a_r P r|^2), |R|^2, |N|^2, R^T M R; f: [L]; scalars: [8]; the limiter's norm and the
# step: numbers. All float32 but W, X, P, rest (of W's dtype), m and v. The unit stride is the second on the right, the
# first on the left, but for P the other way round; scales and stats lie the same on both sides.
W, X, P, R_, M, V, M_SCALE, V_SCALE, GRAM, REST, STATS, F, SCALARS, NORM, STEP = map(tl.constexpr, range(15))
VECTORS, DIM, RANK, W_STRIDE, X_STRIDE, SEED_LOW, SEED_HIGH = map(tl.constexpr, range(15, 22))
# Of scalars: the step's size, 1 - lr wd, 1 if the residual has to be formed, steps taken, the limiter's norm before,
# the correction of N.
SIZE, KEEP, FORM, TAKEN, BEFORE, CORRECTION = map(tl.constexpr, range(6))


@triton.jit
def _matrix(p_table, p_first):
    """The row of this program's matrix, and the program's number within it. p_first: [GROUP]."""
    pid = tl.program_id(0).to(tl.int64)
    at = pid * 0
    for i in tl.static_range(6):  # 2^6 is GROUP
        later = at + (32 >> i)
        at = tl.where(tl.load(p_first + later) <= pid, later, at)
    return p_table + at * FIELDS, pid - tl.load(p_first + at)


@triton.jit
def _pointer(p_row, FIELD: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr):
    p = tl.load(p_row + FIELD).to(tl.pointer_type(T))
    return tl.multiple_of(p, 16) if ALIGNED else p


@triton.jit
def _scratch(p_scratch, p_row, FIELD: tl.constexpr, ALIGNED: tl.constexpr):
    """Scratch is an argument and the table holds where in it: the table is the same from step to step."""
    p = p_scratch + tl.load(p_row + FIELD)
    return tl.multiple_of(p, 16) if ALIGNED else p


@triton.jit
def _size(p_row, FIELD: tl.constexpr, ALIGNED: tl.constexpr):
    n = tl.load(p_row + FIELD)
    return tl.multiple_of(n, 16) if ALIGNED else n


@triton.jit
def _at(o_a, o_b, stride, LEFT: tl.constexpr):
    """Offsets [A, B] of a matrix whose unit stride is along b, on the left along a."""
    return o_a[:, None] + o_b[None, :] * stride if LEFT else o_a[:, None] * stride + o_b[None, :]


# --- what all steps share ---


@triton.jit
def _factor(p_factor, HAS_FACTOR: tl.constexpr, MAXIMIZE: tl.constexpr):
    c = 1.0
    if HAS_FACTOR:
        c = tl.load(p_factor)
    if MAXIMIZE:
        c = -c
    return c


@triton.jit
def _runs(p_inf, HAS_INF: tl.constexpr):
    """Whether the step is taken."""
    runs = tl.program_id(0) >= 0
    if HAS_INF:
        runs = (tl.load(p_inf) > 0.0) == 0  # NaN is not above
    return runs


@triton.jit
def _correction(taken, log_beta1, log_beta2):
    """sqrt(1 - b2^t) / (1 - b1^t), in float64: 1 - b2^t loses digits."""
    t = taken.to(tl.float64)
    return tl.sqrt(1.0 - tl.exp(t * log_beta2)) / (1.0 - tl.exp(t * log_beta1))


@triton.jit
def _normalized(b_m, b_v, eps, correction):
    return correction * (b_m / (tl.sqrt(b_v) + eps))


# --- 8-bit moments, coded as in pyelastic.eager.fira: codes as float32, scales along the first dimension ---


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


# --- kernels ---


@triton.jit
def project(
    p_table, p_first, p_scratch,
    LEFT: tl.constexpr, ALIGNED: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    p_row, block = _matrix(p_table, p_first)
    L, D, R = _size(p_row, VECTORS, ALIGNED), _size(p_row, DIM, ALIGNED), _size(p_row, RANK, ALIGNED)
    p_x, p_p = _pointer(p_row, X, OPERAND, ALIGNED), _pointer(p_row, P, OPERAND, ALIGNED)
    s_x = _size(p_row, X_STRIDE, ALIGNED)
    tiles = (L + BLOCK_L - 1) // BLOCK_L
    o_l = block % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    o_n = block // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_l, m_n = o_l < L, o_n < R
    s_p = R if LEFT else D
    acc = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_L], tl.float32)
    for k in range(0, D, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        m_k = o_k < D
        b_x = tl.load(p_x + _at(o_l, o_k, s_x, LEFT), mask=m_l[:, None] & m_k[None, :], other=0.0)
        b_p = tl.load(p_p + _at(o_k, o_n, s_p, not LEFT), mask=m_k[:, None] & m_n[None, :], other=0.0)
        acc = tl.dot(b_x, b_p, acc, input_precision="tf32x3")
        wide = b_x.to(tl.float32)
        square += tl.sum(wide * wide, axis=1)
    p_r = _scratch(p_scratch, p_row, R_, ALIGNED)
    tl.store(p_r + _at(o_l, o_n, L if LEFT else R, LEFT), acc, mask=m_l[:, None] & m_n[None, :])
    if block // tiles == 0:
        tl.store(_scratch(p_scratch, p_row, STATS, ALIGNED) + o_l, square, mask=m_l)


@triton.jit
def moments(
    p_table, p_first, p_scratch, p_factor, p_inf, beta1, rest1, beta2, rest2, eps, log_beta1, log_beta2,
    LEFT: tl.constexpr, ALIGNED: tl.constexpr, MOMENT: tl.constexpr, EIGHT: tl.constexpr, HAS_GRAM: tl.constexpr,
    HAS_FACTOR: tl.constexpr, HAS_INF: tl.constexpr, MAXIMIZE: tl.constexpr, PAPER: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """EIGHT: moments are codes, and a tile is as wide as a block that shares a scale; MOMENT is int8 then."""
    if _runs(p_inf, HAS_INF):
        p_row, block = _matrix(p_table, p_first)
        L, R = _size(p_row, VECTORS, ALIGNED), _size(p_row, RANK, ALIGNED)
        p_r = _scratch(p_scratch, p_row, R_, ALIGNED)
        p_m, p_v = _pointer(p_row, M, MOMENT, ALIGNED), _pointer(p_row, V, tl.uint8 if EIGHT else MOMENT, ALIGNED)
        p_m_scale, p_v_scale = _pointer(p_row, M_SCALE, tl.float32, False), _pointer(p_row, V_SCALE, tl.float32, False)
        p_gram, p_stats = _pointer(p_row, GRAM, tl.float32, ALIGNED), _scratch(p_scratch, p_row, STATS, ALIGNED)
        factor = _factor(p_factor, HAS_FACTOR, MAXIMIZE)
        correction = 1.0
        if PAPER:
            taken = tl.load(_pointer(p_row, STEP, tl.float32, False)) + 1.0
            correction = _correction(taken, log_beta1, log_beta2).to(tl.float32)
        s_r = L if LEFT else R
        o_l = block * BLOCK_L + tl.arange(0, BLOCK_L)
        m_l = o_l < L
        r2 = tl.zeros([BLOCK_L], tl.float32)
        n2 = tl.zeros([BLOCK_L], tl.float32)
        g2 = tl.zeros([BLOCK_L], tl.float32)
        for k in range(0, R, BLOCK_N):
            o_n = k + tl.arange(0, BLOCK_N).to(tl.int64)
            mask = m_l[:, None] & (o_n < R)[None, :]
            at = _at(o_l, o_n, s_r, LEFT)
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
                    b_o = tl.load(p_r + _at(o_l, o_j, s_r, LEFT), mask=m_l[:, None] & m_j[None, :], other=0.0)
                    b_g = tl.load(p_gram + o_j[:, None] * R + o_n[None, :],
                                  mask=m_j[:, None] & (o_n < R)[None, :], other=0.0)  # fmt: skip
                    row = tl.dot(factor * b_o, b_g, row, input_precision="tf32x3")
                g2 += tl.sum(b_r * row, axis=1)
        tl.store(p_stats + L + o_l, r2, mask=m_l)
        tl.store(p_stats + L * 2 + o_l, n2, mask=m_l)
        tl.store(p_stats + L * 3 + o_l, g2 if HAS_GRAM else r2, mask=m_l)


@triton.jit
def _limit(
    p_row, p_scratch, before, factor, gamma, a_r, a_s, most,
    EXACT: tl.constexpr, ALIGNED: tl.constexpr, PER_MATRIX: tl.constexpr, COLLAPSE: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """f and the limiter's norm; sums in float64. EXACT: the first row of stats holds |x - a_r P r|^2."""
    L = _size(p_row, VECTORS, ALIGNED)
    p_stats, p_f = _scratch(p_scratch, p_row, STATS, ALIGNED), _scratch(p_scratch, p_row, F, ALIGNED)
    r_all = tl.zeros([BLOCK_L], tl.float64)
    n_all = tl.zeros([BLOCK_L], tl.float64)
    if PER_MATRIX:
        for j in range(0, L, BLOCK_L):
            o = j + tl.arange(0, BLOCK_L).to(tl.int64)
            r_all += tl.load(p_stats + L + o, mask=o < L, other=0.0).to(tl.float64)
            n_all += tl.load(p_stats + L * 2 + o, mask=o < L, other=0.0).to(tl.float64)
    one = tl.sqrt(tl.sum(n_all, axis=0)) / (tl.sqrt(tl.sum(r_all, axis=0)) + NORM_EPS)
    s_all = tl.zeros([BLOCK_L], tl.float64)
    x_all = tl.zeros([BLOCK_L], tl.float64)
    for j in range(0, L, BLOCK_L):
        o = j + tl.arange(0, BLOCK_L).to(tl.int64)
        x2 = tl.load(p_stats + o, mask=o < L, other=0.0).to(tl.float64) * factor * factor
        r2 = tl.load(p_stats + L + o, mask=o < L, other=0.0).to(tl.float64)
        phi2 = one * one
        if not PER_MATRIX:
            n2 = tl.load(p_stats + L * 2 + o, mask=o < L, other=0.0).to(tl.float64)
            phi2 = tl.sqrt(r2) + NORM_EPS
            phi2 = n2 / (phi2 * phi2)
        q = x2
        if not EXACT:
            g2 = tl.load(p_stats + L * 3 + o, mask=o < L, other=0.0).to(tl.float64)
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
    tl.store(_pointer(p_row, NORM, tl.float32, False), kept.to(tl.float32))
    if not EXACT:
        form = (tl.sum(x_all, axis=0) > most * s2).to(tl.float32)
        tl.store(_scratch(p_scratch, p_row, SCALARS, False) + FORM, form)
    for j in range(0, L, BLOCK_L):
        o = j + tl.arange(0, BLOCK_L).to(tl.int64)
        phi = tl.zeros([BLOCK_L], tl.float64) + one
        if not PER_MATRIX:
            r2 = tl.load(p_stats + L + o, mask=o < L, other=0.0).to(tl.float64)
            n2 = tl.load(p_stats + L * 2 + o, mask=o < L, other=0.0).to(tl.float64)
            phi = tl.sqrt(n2) / (tl.sqrt(r2) + NORM_EPS)
        tl.store(p_f + o, (a_s * phi / lim).to(tl.float32), mask=o < L)


@triton.jit
def limiter(
    p_table, p_scratch, p_factor, p_inf, p_lr, log_beta1, log_beta2, weight_decay, gamma, a_r, a_s, most,
    ALIGNED: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_INF: tl.constexpr, MAXIMIZE: tl.constexpr, PAPER: tl.constexpr,
    HAS_S: tl.constexpr, PER_MATRIX: tl.constexpr, COLLAPSE: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One program a matrix. HAS_S: a_s is not 0; else f is 0 and the norm stays."""
    p_row = p_table + tl.program_id(0).to(tl.int64) * FIELDS
    p_scalars = _scratch(p_scratch, p_row, SCALARS, False)
    if _runs(p_inf, HAS_INF):
        p_step = _pointer(p_row, STEP, tl.float32, False)
        taken, before = tl.load(p_step) + 1.0, tl.load(_pointer(p_row, NORM, tl.float32, False))
        correction, rate = _correction(taken, log_beta1, log_beta2), tl.load(p_lr)
        size, of_n = rate * correction, 1.0
        if PAPER:
            size, of_n = rate, correction.to(tl.float32)
        tl.store(p_scalars + SIZE, size.to(tl.float32))
        tl.store(p_scalars + KEEP, (1.0 - rate * weight_decay).to(tl.float32))
        tl.store(p_scalars + TAKEN, taken)
        tl.store(p_scalars + BEFORE, before)
        tl.store(p_scalars + CORRECTION, of_n)
        tl.store(p_step, taken)
        if HAS_S:
            factor = _factor(p_factor, HAS_FACTOR, MAXIMIZE)
            _limit(p_row, p_scratch, before, factor, gamma, a_r, a_s, most, False, ALIGNED, PER_MATRIX, COLLAPSE,
                   BLOCK_L)  # fmt: skip
        else:
            L = _size(p_row, VECTORS, ALIGNED)
            p_f = _scratch(p_scratch, p_row, F, ALIGNED)
            for j in range(0, L, BLOCK_L):
                o = j + tl.arange(0, BLOCK_L).to(tl.int64)
                tl.store(p_f + o, tl.zeros([BLOCK_L], tl.float32), mask=o < L)
    else:
        tl.store(p_scalars + FORM, 0.0)


@triton.jit
def limiter_exact(
    p_table, p_scratch, p_factor, gamma, a_r, a_s, most,
    ALIGNED: tl.constexpr, HAS_FACTOR: tl.constexpr, MAXIMIZE: tl.constexpr,
    PER_MATRIX: tl.constexpr, COLLAPSE: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """The limiter again, where ``residual`` has formed the norms."""
    p_row = p_table + tl.program_id(0).to(tl.int64) * FIELDS
    p_scalars = _scratch(p_scratch, p_row, SCALARS, False)
    if tl.load(p_scalars + FORM) != 0.0:
        factor, before = _factor(p_factor, HAS_FACTOR, MAXIMIZE), tl.load(p_scalars + BEFORE)
        _limit(p_row, p_scratch, before, factor, gamma, a_r, a_s, most, True, ALIGNED, PER_MATRIX, COLLAPSE, BLOCK_L)


@triton.jit
def residual(
    p_table, p_first, p_scratch, a_r,
    LEFT: tl.constexpr, ALIGNED: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """|x - a_r P r|^2 over |x|^2, where the limiter asks for it. A program walks over all of d: the sum has one order
    and needs no scratch."""
    p_row, block = _matrix(p_table, p_first)
    if tl.load(_scratch(p_scratch, p_row, SCALARS, False) + FORM) != 0.0:
        L, D, R = _size(p_row, VECTORS, ALIGNED), _size(p_row, DIM, ALIGNED), _size(p_row, RANK, ALIGNED)
        p_x, p_p = _pointer(p_row, X, OPERAND, ALIGNED), _pointer(p_row, P, OPERAND, ALIGNED)
        p_r, s_x = _scratch(p_scratch, p_row, R_, ALIGNED), _size(p_row, X_STRIDE, ALIGNED)
        o_l = block * BLOCK_L + tl.arange(0, BLOCK_L)
        m_l = o_l < L
        square = tl.zeros([BLOCK_L], tl.float64)
        for n in range(0, D, BLOCK_N):
            o_d = n + tl.arange(0, BLOCK_N).to(tl.int64)
            m_d = o_d < D
            acc = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
            for k in range(0, R, BLOCK_K):
                o_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
                m_k = o_k < R
                b_r = tl.load(p_r + _at(o_l, o_k, L if LEFT else R, LEFT), mask=m_l[:, None] & m_k[None, :], other=0.0)
                b_p = tl.load(p_p + _at(o_k, o_d, R if LEFT else D, LEFT), mask=m_k[:, None] & m_d[None, :], other=0.0)
                # In float32 also for 16 bits: the rounding of R would be the residual.
                acc = tl.dot(b_r, b_p.to(tl.float32), acc, input_precision="tf32x3")
            b_x = tl.load(p_x + _at(o_l, o_d, s_x, LEFT), mask=m_l[:, None] & m_d[None, :], other=0.0)
            b_q = b_x.to(tl.float32) - a_r * acc
            square += tl.sum(b_q * b_q, axis=1).to(tl.float64)
        tl.store(_scratch(p_scratch, p_row, STATS, ALIGNED) + o_l, square.to(tl.float32), mask=m_l)


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


@triton.jit
def apply(
    p_table, p_first, p_scratch, p_factor, p_inf, eps, a_n, a_r,
    LEFT: tl.constexpr, ALIGNED: tl.constexpr, OPERAND: tl.constexpr, MOMENT: tl.constexpr, EIGHT: tl.constexpr,
    HAS_FACTOR: tl.constexpr, HAS_INF: tl.constexpr, MAXIMIZE: tl.constexpr,
    BACK: tl.constexpr, HAS_REST: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BACK: C is not 0."""
    if _runs(p_inf, HAS_INF):
        p_row, block = _matrix(p_table, p_first)
        L, D, R = _size(p_row, VECTORS, ALIGNED), _size(p_row, DIM, ALIGNED), _size(p_row, RANK, ALIGNED)
        tiles = (L + BLOCK_L - 1) // BLOCK_L
        o_l = block % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
        o_d = block // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        m_l, m_d = o_l < L, o_d < D
        factor = _factor(p_factor, HAS_FACTOR, MAXIMIZE)
        p_scalars = _scratch(p_scratch, p_row, SCALARS, False)
        size, keep = tl.load(p_scalars + SIZE), tl.load(p_scalars + KEEP)
        b_f = tl.load(_scratch(p_scratch, p_row, F, ALIGNED) + o_l, mask=m_l, other=0.0)
        acc = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
        if BACK:
            p_p, p_r = _pointer(p_row, P, OPERAND, ALIGNED), _scratch(p_scratch, p_row, R_, ALIGNED)
            p_m = _pointer(p_row, M, MOMENT, ALIGNED)
            p_v = _pointer(p_row, V, tl.uint8 if EIGHT else MOMENT, ALIGNED)
            p_m_scale = _pointer(p_row, M_SCALE, tl.float32, False)
            p_v_scale = _pointer(p_row, V_SCALE, tl.float32, False)
            correction = tl.load(p_scalars + CORRECTION)
            for k in range(0, R, BLOCK_K):
                o_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
                mask = m_l[:, None] & (o_k < R)[None, :]
                at = _at(o_l, o_k, L if LEFT else R, LEFT)
                b_r = factor * tl.load(p_r + at, mask=mask, other=0.0)
                b_m = tl.load(p_m + at, mask=mask, other=0).to(tl.float32)
                b_v = tl.load(p_v + at, mask=mask, other=0).to(tl.float32)
                if EIGHT:  # a tile lies in one block of coordinates
                    scale = o_l * ((R + BLOCK - 1) // BLOCK) + k // BLOCK
                    b_m = _decode_m(b_m, tl.load(p_m_scale + scale, mask=m_l, other=0.0)[:, None])
                    b_v = _decode_v(b_v, tl.load(p_v_scale + scale, mask=m_l, other=0.0)[:, None])
                b_c = a_n * _normalized(b_m, b_v, eps, correction) - a_r * b_f[:, None] * b_r
                b_c = tl.where(mask, b_c, 0.0).to(OPERAND)
                b_p = tl.load(p_p + _at(o_k, o_d, R if LEFT else D, LEFT),
                              mask=(o_k < R)[:, None] & m_d[None, :], other=0.0)  # fmt: skip
                acc = tl.dot(b_c, b_p, acc, input_precision="tf32x3")
        mask = m_l[:, None] & m_d[None, :]
        p_x = _pointer(p_row, X, OPERAND, ALIGNED) + _at(o_l, o_d, _size(p_row, X_STRIDE, ALIGNED), LEFT)
        p_out = _pointer(p_row, W, OPERAND, ALIGNED) + _at(o_l, o_d, _size(p_row, W_STRIDE, ALIGNED), LEFT)
        b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
        base = tl.load(p_out, mask=mask, other=0.0).to(tl.float32)
        element = _at(o_l, o_d, L if LEFT else D, LEFT)  # where it lies in W counts for the noise
        p_rest = _pointer(p_row, REST, OPERAND, ALIGNED)
        if HAS_REST:
            base += tl.load(p_rest + element, mask=mask, other=0.0).to(tl.float32)
        value = keep * (base - size * (acc + b_f[:, None] * (factor * b_x)))
        if STOCHASTIC:
            key = _mix(tl.load(p_row + SEED_HIGH) ^ _mix(tl.load(p_scalars + TAKEN).to(tl.int64)))
            key = _mix(tl.load(p_row + SEED_LOW) ^ key)
            noise = _mix((element & 0xFFFFFFFF) ^ _mix((element >> 32) ^ key)) & 0xFFFF
            bits = value.to(tl.int32, bitcast=True)
            finite = (bits & 0x7F800000) != 0x7F800000
            # The magnitude grows by less than one unit of bfloat16; the sign bit stays.
            raised = (bits + noise.to(tl.int32)) & -65536
            value = tl.where(finite, raised.to(tl.float32, bitcast=True), value)
        rounded = value.to(OPERAND)
        tl.store(p_out, rounded, mask=mask)
        if HAS_REST:
            tl.store(p_rest + element, (value - rounded.to(tl.float32)).to(OPERAND), mask=mask)
