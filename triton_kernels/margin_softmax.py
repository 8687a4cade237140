"""margin_softmax in Triton: kernels that walk over tiles of classes. Formulas: csrc/margin_softmax.h.

Algorithm. A program of the forward owns a block of rows and every S-th tile of classes, and carries its statistics with
a running maximum, as flash attention does; S partial results a row are merged by the caller: no locks, no atomics,
the same bits every time. Backward up to D = 512 (256 for float32) is fused: a program owns a block of rows of dE, or a
block of classes of dW, recomputes the tiles of cosines along the other axis and multiplies them in registers, so no
B x C array of any kind reaches memory. Beyond, `gradient_tile` writes P for one chunk of classes, for a GEMM.

Unit rows of W are never stored: a tile of W is loaded as it is, scaled by 1 / |w| and rounded to the operand type.
Operands are float16, or float32 in three tf32 products (an error of 2^-21 of a product); sums are float32; addresses
int64. Gradients are scaled as in the contract: P = 2^14 G / row_scale. Flags are constexpr, so what a call does not ask
for costs nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

# (operand bits, D up to, or 0 for a kernel without an accumulator of width D)
#   -> (BLOCK_B, BLOCK_C, BLOCK_D, num_warps, num_stages).
# Chosen by compiling: none spills on sm_80, sm_90, sm_100, and shared memory fits sm_80 (tests/test_kernel_budget.py).
# Not yet measured on a GPU. The widths listed are those of the fused backward; beyond, P goes through a GEMM.
MARGIN_SOFTMAX_CONFIGS = {
    (16, 0): (128, 64, 64, 8, 3),
    (16, 128): (64, 64, 64, 4, 3),
    (16, 256): (64, 64, 64, 8, 2),
    (16, 512): (64, 16, 64, 8, 2),
    (32, 0): (64, 64, 32, 4, 2),
    (32, 128): (32, 32, 32, 4, 1),
    (32, 256): (32, 32, 32, 8, 1),
}
MARGIN_SOFTMAX_CONFIGS_SM100 = MARGIN_SOFTMAX_CONFIGS | {(16, 512): (32, 32, 64, 8, 2)}
# For sub-centres, sampled classes and a weight whose columns are apart: more addresses a tile, so smaller tiles.
MARGIN_SOFTMAX_CONFIGS_SCATTERED = {
    (16, 0): (64, 32, 32, 4, 2),
    (16, 128): (32, 32, 32, 4, 2),
    (16, 256): (32, 32, 64, 8, 1),
    (16, 512): (32, 16, 64, 8, 1),
    (32, 0): (32, 32, 16, 4, 1),
    (32, 128): (16, 16, 16, 4, 1),
    (32, 256): (16, 16, 32, 8, 1),
}
SCATTERED_REGISTERS = 255  # at most, of scattered float32 `grad_e` and `grad_w`: ptxas might settle for 128, and spill
PARTIALS = 7  # max, sum, sum_sq, sum_z, sum_cos, rank, top


@triton.jit
def _max_or_nan(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def inverse_norms(
    p_w,  # [rows of W, D], strides s_row, s_col
    p_index,  # [n] rows of W, or anything if not HAS_INDEX
    p_out,  # [n]: 1 / |w|, 0 for |w| <= 1e-12, NaN for an infinite row
    n, D, s_row, s_col,
    HAS_INDEX: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < n
    row = tl.load(p_index + o_r, mask=m_r, other=0) if HAS_INDEX else o_r
    square = tl.zeros([BLOCK], tl.float64)  # the squares of a float32 row of norm 1e19 overflow float32
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        mask = m_r[:, None] & (o_d < D)[None, :]
        b_w = tl.load(p_w + row[:, None] * s_row + o_d.to(tl.int64)[None, :] * s_col, mask=mask, other=0.0)
        b_w = b_w.to(tl.float64)
        square += tl.sum(b_w * b_w, axis=1)
    norm = tl.sqrt(square)
    inverse = tl.where(norm <= 1e-12, 0.0, 1.0 / tl.where(norm <= 1e-12, 1.0, norm) + (norm - norm))
    tl.store(p_out + o_r, inverse.to(tl.float32), mask=m_r)


@triton.jit
def _unit_rows(p_w, p_inv, row, o_r, m_r, o_d, m_d, s_row, s_col, OPERAND: tl.constexpr):
    """Rows of W over their norms [len(row), len(o_d)]; `row` in W, `o_r` in the inverse norms."""
    mask = m_r[:, None] & m_d[None, :]
    b_w = tl.load(p_w + row[:, None] * s_row + o_d.to(tl.int64)[None, :] * s_col, mask=mask, other=0.0).to(tl.float32)
    b_inv = tl.load(p_inv + o_r, mask=m_r, other=0.0)
    # A row without direction is zero, whatever it holds.
    return tl.where((b_inv == 0.0)[:, None], 0.0, b_w * b_inv[:, None]).to(OPERAND)


@triton.jit
def _cosines(
    p_e, p_w, p_inv, p_index, o_b, m_b, o_c, m_c, k, D, K, s_row, s_col,
    HAS_INDEX: tl.constexpr, OPERAND: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cosines [BLOCK_B, BLOCK_C] of rows o_b of e^ [B, D] and sub-centre k of classes o_c."""
    o_r = o_c * K + k
    row = tl.load(p_index + o_r, mask=m_c, other=0) if HAS_INDEX else o_r
    acc = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_e = tl.load(p_e + o_b[:, None] * D + o_d[None, :], mask=m_b[:, None] & m_d[None, :], other=0.0)
        b_w = _unit_rows(p_w, p_inv, row, o_r, m_c, o_d, m_d, s_row, s_col, OPERAND)
        acc = tl.dot(b_e, tl.trans(b_w), acc, input_precision="tf32x3")
    return acc


@triton.jit
def _class_cosines(
    p_e, p_w, p_inv, p_index, o_b, m_b, o_c, m_c, D, s_row, s_col,
    K: tl.constexpr, HAS_INDEX: tl.constexpr, OPERAND: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cosines of the closest sub-centres, and which they are; a NaN sub-centre shows."""
    c = _cosines(p_e, p_w, p_inv, p_index, o_b, m_b, o_c, m_c, 0, D, K, s_row, s_col,
                 HAS_INDEX, OPERAND, BLOCK_B, BLOCK_C, BLOCK_D)  # fmt: skip
    winner = tl.zeros([BLOCK_B, BLOCK_C], tl.int32)
    for k in range(1, K):  # a loop also on the device: unrolled, the addresses of all sub-centres fill the registers
        other = _cosines(p_e, p_w, p_inv, p_index, o_b, m_b, o_c, m_c, k, D, K, s_row, s_col,
                         HAS_INDEX, OPERAND, BLOCK_B, BLOCK_C, BLOCK_D)  # fmt: skip
        closer = (other > c) | (other != other)
        c = tl.where(closer, other, c)
        winner = tl.where(closer, k, winner)
    return c, winner


@triton.jit
def _stress(c, threshold, p_map):
    """h(c) and h'(c) of hard negatives."""
    a0, a1, a2 = tl.load(p_map), tl.load(p_map + 1), tl.load(p_map + 2)
    hard = c > threshold[:, None]
    return tl.where(hard, a0 + c * (a1 + c * a2), c), tl.where(hard, a1 + 2.0 * c * a2, 1.0)


@triton.jit
def forward(
    p_e,  # [B, D] unit rows in OPERAND
    p_w, p_inv, p_index,  # W, inverse norms [n K], rows [n K]
    p_labels,  # [B], -1 ignored
    p_threshold, p_map, p_cos_target,  # [B], [3], [B]
    p_out,  # [PARTIALS, splits, B]
    B, C, D, s_row, s_col, scale, splits,
    K: tl.constexpr, HAS_INDEX: tl.constexpr, HARD: tl.constexpr, EXTRA: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_b, i_s = tl.program_id(0), tl.program_id(1)
    o_b = i_b.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_b = o_b < B
    target = tl.load(p_labels + o_b, mask=m_b, other=-1)
    threshold = tl.load(p_threshold + o_b, mask=m_b, other=0.0) if HARD else tl.zeros([BLOCK_B], tl.float32)
    own = tl.load(p_cos_target + o_b, mask=m_b, other=0.0)
    top = tl.full([BLOCK_B], -1e30, tl.float32)
    most, total = top, tl.zeros([BLOCK_B], tl.float32)
    sum_sq, sum_z, sum_cos, rank = total, total, total, total
    for i_c in range(i_s, tl.cdiv(C, BLOCK_C), splits):
        o_c = tl.cast(i_c, tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        c, _ = _class_cosines(p_e, p_w, p_inv, p_index, o_b, m_b, o_c, m_c, D, s_row, s_col,
                              K, HAS_INDEX, OPERAND, BLOCK_B, BLOCK_C, BLOCK_D)  # fmt: skip
        negative = m_c[None, :] & (o_c[None, :] != target[:, None])
        h = c
        if HARD:
            h, _ = _stress(c, threshold, p_map)
        z = h * scale
        # NaN must not decide the maximum, whose treatment of NaN differs between devices; it shows in the sums.
        highest = tl.maximum(most, tl.max(tl.where(negative & (z == z), z, -1e30), axis=1))
        rescale = tl.exp2((most - highest) * 1.4426950408889634)
        x = tl.where(negative, tl.exp2((z - highest[:, None]) * 1.4426950408889634), 0.0)
        total = total * rescale + tl.sum(x, axis=1)
        most = highest
        if EXTRA:
            sum_sq = sum_sq * rescale * rescale + tl.sum(x * x, axis=1)
            sum_z = sum_z * rescale + tl.sum(tl.where(negative, x * z, 0.0), axis=1)
            sum_cos += tl.sum(tl.where(negative, h, 0.0), axis=1)
            rank += tl.sum(tl.where(negative & (c > own[:, None]), 1.0, 0.0), axis=1)
            top = _max_or_nan(top, tl.max(tl.where(negative & (c == c), c, -1e30), axis=1))
            broken = tl.sum(tl.where(negative & (c != c), 1.0, 0.0), axis=1) > 0
            top = tl.where(broken, float("nan"), top)
    step = tl.cast(splits, tl.int64) * B
    p_o = p_out + tl.cast(i_s, tl.int64) * B + o_b
    tl.store(p_o, most, mask=m_b)
    tl.store(p_o + step, total, mask=m_b)
    if EXTRA:
        tl.store(p_o + 2 * step, sum_sq, mask=m_b)
        tl.store(p_o + 3 * step, sum_z, mask=m_b)
        tl.store(p_o + 4 * step, sum_cos, mask=m_b)
        tl.store(p_o + 5 * step, rank, mask=m_b)
        tl.store(p_o + 6 * step, top, mask=m_b)


@triton.jit
def _gradient(
    c, o_b, m_b, o_c, m_c, p_labels, p_lse, p_factor, p_sum, p_threshold, p_map, scale,
    HARD: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """P [BLOCK_B, BLOCK_C]: factor = 2^14 scale g_lse / row_scale, sum = 2^14 g_sum / row_scale, 0 for unused rows."""
    target = tl.load(p_labels + o_b, mask=m_b, other=-1)
    lse = tl.load(p_lse + o_b, mask=m_b, other=0.0)
    factor, added = tl.load(p_factor + o_b, mask=m_b, other=0.0), tl.load(p_sum + o_b, mask=m_b, other=0.0)
    used = (target >= 0) & ((factor != 0) | (added != 0))
    h, slope = c, tl.full(c.shape, 1.0, tl.float32)
    if HARD:
        h, slope = _stress(c, tl.load(p_threshold + o_b, mask=m_b, other=0.0), p_map)
    p = tl.exp2((h * scale - lse[:, None]) * 1.4426950408889634)
    p = (p * factor[:, None] + added[:, None]) * slope
    negative = m_c[None, :] & (o_c[None, :] != target[:, None])
    return tl.where(negative & used[:, None], p, 0.0).to(OPERAND)


@triton.jit
def grad_e(
    p_e, p_w, p_inv, p_index, p_labels, p_lse, p_factor, p_sum, p_threshold, p_map,
    p_out,  # [splits, B, D] float32
    B, C, D, s_row, s_col, scale, splits,
    K: tl.constexpr, HAS_INDEX: tl.constexpr, HARD: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """sum_j P_ij w^_j; WIDTH >= D is the width of the accumulator."""
    i_b, i_s = tl.program_id(0), tl.program_id(1)
    o_b = i_b.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_b = o_b < B
    o_w = tl.arange(0, WIDTH)
    m_w = o_w < D
    acc = tl.zeros([BLOCK_B, WIDTH], tl.float32)
    for i_c in range(i_s, tl.cdiv(C, BLOCK_C), splits):
        o_c = tl.cast(i_c, tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        c, winner = _class_cosines(p_e, p_w, p_inv, p_index, o_b, m_b, o_c, m_c, D, s_row, s_col,
                                   K, HAS_INDEX, OPERAND, BLOCK_B, BLOCK_C, BLOCK_D)  # fmt: skip
        p = _gradient(c, o_b, m_b, o_c, m_c, p_labels, p_lse, p_factor, p_sum, p_threshold, p_map, scale, HARD, OPERAND)
        for k in range(K):
            o_r = o_c * K + k
            row = tl.load(p_index + o_r, mask=m_c, other=0) if HAS_INDEX else o_r
            b_w = _unit_rows(p_w, p_inv, row, o_r, m_c, o_w, m_w, s_row, s_col, OPERAND)
            part = p if K == 1 else tl.where(winner == k, p, tl.zeros_like(p))
            acc = tl.dot(part, b_w, acc, input_precision="tf32x3")
    p_o = p_out + (tl.cast(i_s, tl.int64) * B + o_b[:, None]) * D + o_w[None, :]
    tl.store(p_o, acc, mask=m_b[:, None] & m_w[None, :])


@triton.jit
def _finish_w(
    acc, o_r, m_r, o_w, m_w, p_w, p_inv, p_index, p_unit, p_along, p_back, p_sorted, p_order, first, last, p_scale,
    p_out, D, s_row, s_col, s_out_row, s_out_col, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """(acc scale - <.., w^> w^ + the tangents of the samples of these rows) / |w|, stored once.

    The samples whose centre is in this tile are a run first .. last - 1 of the sorted ones, added in order.
    """
    row = tl.load(p_index + o_r, mask=m_r, other=0) if HAS_INDEX else o_r
    unit = _unit_rows(p_w, p_inv, row, o_r, m_r, o_w, m_w, s_row, s_col, tl.float32)
    d = acc * tl.load(p_scale)
    d -= tl.sum(d * unit, axis=1)[:, None] * unit
    for run in range(first, last):
        i = tl.load(p_order + run)
        mine = (o_r == tl.load(p_sorted + run)) & m_r
        e_hat = tl.load(p_unit + i * D + o_w, mask=m_w, other=0.0)
        tangent = tl.load(p_along + i) * e_hat[None, :] + tl.load(p_back + i) * unit
        d += tl.where(mine[:, None], tangent, 0.0)
    b_inv = tl.load(p_inv + o_r, mask=m_r, other=0.0)
    d = tl.where((b_inv == 0.0)[:, None], 0.0, d * b_inv[:, None])
    p_o = p_out + o_r[:, None] * s_out_row + o_w.to(tl.int64)[None, :] * s_out_col
    tl.store(p_o, d.to(p_out.dtype.element_ty), mask=m_r[:, None] & m_w[None, :])


@triton.jit
def grad_w(
    p_e, p_w, p_inv, p_index, p_labels, p_lse, p_factor, p_sum, p_threshold, p_map,
    p_scaled,  # [B, D] e^ times row_scale / max row_scale, in OPERAND
    p_unit, p_along, p_back,  # the tangent at sample i is along_i e^_i + back_i w^: [B, D] float32, [B], [B]
    p_sorted, p_order, p_first,  # rows of the samples' centres in order [B], samples in that order, run of a tile
    p_scale,  # [1] what the sums are multiplied by
    p_out,  # [n K, D], strides s_out_row, s_out_col
    B, C, D, s_row, s_col, s_out_row, s_out_col, scale,
    K: tl.constexpr, HAS_INDEX: tl.constexpr, HARD: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (i_c, k) finishes the rows of sub-centre k of a tile of classes."""
    i_c, k = tl.program_id(0), tl.program_id(1)
    o_c = i_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_w = tl.arange(0, WIDTH)
    m_w = o_w < D
    acc = tl.zeros([BLOCK_C, WIDTH], tl.float32)
    for i_b in range(0, tl.cdiv(B, BLOCK_B)):
        o_b = tl.cast(i_b, tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
        m_b = o_b < B
        c, winner = _class_cosines(p_e, p_w, p_inv, p_index, o_b, m_b, o_c, m_c, D, s_row, s_col,
                                   K, HAS_INDEX, OPERAND, BLOCK_B, BLOCK_C, BLOCK_D)  # fmt: skip
        p = _gradient(c, o_b, m_b, o_c, m_c, p_labels, p_lse, p_factor, p_sum, p_threshold, p_map, scale, HARD, OPERAND)
        if K > 1:
            p = tl.where(winner == k, p, tl.zeros_like(p))
        b_e = tl.load(p_scaled + o_b[:, None] * D + o_w[None, :], mask=m_b[:, None] & m_w[None, :], other=0.0)
        acc = tl.dot(tl.trans(p), b_e, acc, input_precision="tf32x3")
    _finish_w(acc, o_c * K + k, m_c, o_w, m_w, p_w, p_inv, p_index, p_unit, p_along, p_back, p_sorted, p_order,
              tl.load(p_first + i_c), tl.load(p_first + i_c + 1), p_scale, p_out, D, s_row, s_col, s_out_row, s_out_col,
              HAS_INDEX)  # fmt: skip


@triton.jit
def finish_w(
    p_acc,  # [n, D] float32: rows first .. first + n - 1
    p_w, p_inv, p_index, p_unit, p_along, p_back, p_sorted, p_order, p_first, p_scale, p_out,
    first, n, D, s_row, s_col, s_out_row, s_out_col,
    HAS_INDEX: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The end of grad_w for sums that a GEMM made; p_first [tiles + 1] counts from row `first`."""
    i_r = tl.program_id(0)
    o_n = i_r.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_r = o_n < n
    o_w = tl.arange(0, WIDTH)
    m_w = o_w < D
    acc = tl.load(p_acc + o_n[:, None] * D + o_w[None, :], mask=m_r[:, None] & m_w[None, :], other=0.0)
    _finish_w(acc, first + o_n, m_r, o_w, m_w, p_w, p_inv, p_index, p_unit, p_along, p_back, p_sorted, p_order,
              tl.load(p_first + i_r), tl.load(p_first + i_r + 1), p_scale, p_out, D, s_row, s_col, s_out_row, s_out_col,
              HAS_INDEX)  # fmt: skip


@triton.jit
def gradient_tile(
    p_e, p_w, p_inv, p_index, p_labels, p_lse, p_factor, p_sum, p_threshold, p_map,
    p_p,  # [B, n K] for classes first .. first + n - 1, in OPERAND
    B, C, D, first, n, s_row, s_col, scale,
    K: tl.constexpr, HAS_INDEX: tl.constexpr, HARD: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_b, i_c = tl.program_id(0), tl.program_id(1)
    o_b = i_b.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_b = o_b < B
    o_n = i_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_c, m_c = first + o_n, o_n < n
    c, winner = _class_cosines(p_e, p_w, p_inv, p_index, o_b, m_b, o_c, m_c, D, s_row, s_col,
                               K, HAS_INDEX, OPERAND, BLOCK_B, BLOCK_C, BLOCK_D)  # fmt: skip
    p = _gradient(c, o_b, m_b, o_c, m_c, p_labels, p_lse, p_factor, p_sum, p_threshold, p_map, scale, HARD, OPERAND)
    mask = m_b[:, None] & m_c[None, :]
    for k in tl.static_range(K):
        p_o = p_p + o_b[:, None] * (tl.cast(n, tl.int64) * K) + o_n[None, :] * K + k
        tl.store(p_o, p if K == 1 else tl.where(winner == k, p, tl.zeros_like(p)), mask=mask)
