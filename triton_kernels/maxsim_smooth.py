"""The smooth maximum of maxsim in Triton: temperature log sum exp(s / temperature), forward and backward.

Backward computes the similarities of a tile again, from the maxima that the forward saved, and multiplies
c exp((s - m) / temperature) with the other side's rows; nothing is rounded to 16 bits on the way. A program owns the
rows it writes, WIDTH columns of them, and recomputes once for each WIDTH columns. Parts: maxsim.py, maxsim_backward.py.
scale is log2(e) / temperature.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import multiply, split3
from .maxsim import NONE, SIZES, kept_tokens, load_documents, load_pieces, load_rows, similarities
from .maxsim_backward import coefficient, store_rows

LN2 = tl.constexpr(0.6931471805599453)
# (operand bits, WIDTH) -> (rows owned, rows of the other side, BLOCK_K, num_warps, num_stages); BLOCK_K as in
# MAXSIM_CONFIGS, a loop beyond WIDTH columns. Chosen by compiling; not measured on a GPU.
MAXSIM_SMOOTH_CONFIGS = {
    (16, 128): (32, 64, 0, 8, 2),
    (16, 256): (32, 32, 0, 8, 2),
    (32, 128): (32, 32, 32, 8, 1),
    (32, 256): (32, 16, 32, 8, 2),
}

@triton.jit(do_not_specialize=SIZES)
def forward_smooth(
    p_q, p_d, p_codes, p_centroids, p_buckets, p_q_inv, p_d_inv, p_q_first, p_d_first, p_mask, p_pair_q, p_pair_d,
    p_maxima,  # [rows, width]
    tokens, width, tiles, s_q, s_d, s_centroid, temperature, scale,
    LIST: tl.constexpr, HAS_MASK: tl.constexpr, Q_INV: tl.constexpr, D_INV: tl.constexpr, D: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, HOLD: tl.constexpr, BITS: tl.constexpr,
    OPERAND: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """temperature log sum exp(s / temperature), with a running maximum as in flash attention."""
    i_r, i_t = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64)
    i_d, q_first, q_end = i_r, tl.zeros([], tl.int64), tl.cast(tokens, tl.int64)
    if LIST:
        i_q = tl.load(p_pair_q + i_r)
        i_d = tl.load(p_pair_d + i_r)
        q_first, q_end = tl.load(p_q_first + i_q), tl.load(p_q_first + i_q + 1)
    o_s = i_t.to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_s = o_s < width
    o_q = q_first + o_s
    m_q = m_s & (o_q < q_end)
    begin = tl.load(p_d_first + i_d)
    length = (tl.load(p_d_first + i_d + 1) - begin).to(tl.int32)
    o_t = tl.arange(0, BLOCK_D)
    b_0, b_1, b_2 = load_pieces(p_q, o_q, m_q, s_q, D, W0, W1, W2)
    factor = tl.full([BLOCK_Q], 1.0, tl.float32) * scale
    if Q_INV:
        factor *= tl.load(p_q_inv + o_q, mask=m_q, other=0.0)
    most, total = tl.full([BLOCK_Q], NONE, tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    n_kept, _ = kept_tokens(p_mask, begin, length, HAS_MASK)
    for t in range(0, length, BLOCK_D):
        row, m_t = begin + t + o_t, t + o_t < length
        s = similarities(b_0, b_1, b_2, p_q, o_q, m_q, s_q, p_d, p_codes, p_centroids, p_buckets, row, m_t, s_d,
                         s_centroid, D, W0, W1, W2, HOLD, BITS, OPERAND, BLOCK_Q, BLOCK_D)  # fmt: skip
        s *= factor[:, None]
        if D_INV:
            s *= tl.load(p_d_inv + row, mask=m_t, other=0.0)[None, :]
        if HAS_MASK:
            m_t = m_t & (tl.load(p_mask + row, mask=m_t, other=0) != 0)
        # NaN must not decide the maximum, whose treatment of NaN differs between devices; it shows in the sum.
        highest = tl.maximum(most, tl.max(tl.where(m_t[None, :] & (s == s), s, NONE), axis=1))
        base = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)  # inf - inf would be NaN
        total = total * tl.exp2(most - base) + tl.sum(tl.where(m_t[None, :], tl.exp2(s - base[:, None]), 0.0), axis=1)
        most = highest
    value = (tl.where(tl.abs(most) == float("inf"), 0.0, most) + tl.log2(total)) * (temperature * LN2)
    value = tl.where(m_q & (n_kept > 0), value, 0.0)
    tl.store(p_maxima + i_r * width + o_s, value, mask=m_s)


@triton.jit
def multiply_float(p, x, acc):
    """acc + p x for float32 p; x bfloat16 is taken as it is, anything else as three parts too."""
    if x.dtype == tl.bfloat16:
        high, middle, low = split3(p)
        acc = tl.dot(low, x, acc)
        acc = tl.dot(middle, x, acc)
        acc = tl.dot(high, x, acc)
    else:
        acc = multiply(p, x.to(tl.float32), acc)
    return acc


@triton.jit(do_not_specialize=SIZES)
def grad_queries_smooth(
    p_q, p_d, p_codes, p_centroids, p_buckets, p_q_inv, p_d_inv, p_q_first, p_d_first, p_mask,
    p_pair_d, p_order, p_order_first, p_grad, p_weights, p_query_of, p_maxima,
    p_out,  # [tokens, D]; [splits, tokens, D] float32 if splits > 1
    tokens, rows, width, tiles, splits, s_q, s_d, s_centroid, s_g0, s_g1, s_out, scale,
    LIST: tl.constexpr, PER_TOKEN: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_MASK: tl.constexpr,
    Q_INV: tl.constexpr, D_INV: tl.constexpr, JACOBIAN: tl.constexpr, ADD: tl.constexpr, D: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, HOLD: tl.constexpr, BITS: tl.constexpr,
    OPERAND: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """sum_jt c exp((s - m) / temperature) d^. Program (tile of query tokens; share of the rows; columns)."""
    i_t, i_s, i_c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_first, q_end = tl.zeros([], tl.int64), tl.cast(tokens, tl.int64)
    start, stop = tl.zeros([], tl.int64), tl.cast(rows, tl.int64)
    if LIST:
        i_q = (i_t // tiles).to(tl.int64)
        i_t = i_t % tiles
        q_first, q_end = tl.load(p_q_first + i_q), tl.load(p_q_first + i_q + 1)
        start, stop = tl.load(p_order_first + i_q), tl.load(p_order_first + i_q + 1)
    share = ((stop - start).to(tl.int32) + splits - 1) // splits
    start += share.to(tl.int64) * i_s
    stop = tl.minimum(stop, start + share)
    o_s = i_t.to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_q = q_first + o_s
    m_q = (o_s < width) & (o_q < q_end)
    o_k = (i_c.to(tl.int64) * WIDTH).to(tl.int32) + tl.arange(0, WIDTH)
    o_t = tl.arange(0, BLOCK_D)
    b_0, b_1, b_2 = load_pieces(p_q, o_q, m_q, s_q, D, W0, W1, W2)
    factor = tl.full([BLOCK_Q], 1.0, tl.float32)
    if Q_INV:
        factor = tl.load(p_q_inv + o_q, mask=m_q, other=0.0)
    acc = tl.zeros([BLOCK_Q, WIDTH], tl.float32)
    for n in range(start, stop):
        i_r, i_d = tl.cast(n, tl.int64), tl.cast(n, tl.int64)
        if LIST:
            i_r = tl.load(p_order + n)
            i_d = tl.load(p_pair_d + i_r)
        begin = tl.load(p_d_first + i_d)
        length = (tl.load(p_d_first + i_d + 1) - begin).to(tl.int32)
        c = coefficient(p_grad, p_weights, p_query_of, i_r, o_s, o_q, m_q, s_g0, s_g1, LIST, PER_TOKEN, HAS_WEIGHTS)
        m = tl.load(p_maxima + i_r * width + o_s, mask=m_q, other=0.0)
        for t in range(0, length, BLOCK_D):
            row, m_t = begin + t + o_t, t + o_t < length
            if HAS_MASK:
                m_t = m_t & (tl.load(p_mask + row, mask=m_t, other=0) != 0)
            s = similarities(b_0, b_1, b_2, p_q, o_q, m_q, s_q, p_d, p_codes, p_centroids, p_buckets, row, m_t, s_d,
                             s_centroid, D, W0, W1, W2, HOLD, BITS, OPERAND, BLOCK_Q, BLOCK_D)  # fmt: skip
            d_inv = tl.full([BLOCK_D], 1.0, tl.float32)
            if D_INV:
                d_inv = tl.load(p_d_inv + row, mask=m_t, other=0.0)
            s *= factor[:, None] * d_inv[None, :]
            p = c[:, None] * tl.exp2((s - m[:, None]) * scale)
            p = tl.where(m_t[None, :] & (c != 0)[:, None], p * d_inv[None, :], 0.0)
            x = load_documents(p_d, p_codes, p_centroids, p_buckets, row, m_t, o_k, s_d, s_centroid, D, BITS)
            acc = multiply_float(p, x, acc)
    p_o = p_out + tl.cast(i_s, tl.int64) * tokens * s_out
    store_rows(acc, p_q, p_q_inv, o_q, m_q, o_k, s_q, p_o, s_out, D, JACOBIAN, ADD)


@triton.jit(do_not_specialize=SIZES)
def grad_documents_smooth(
    p_q, p_d, p_q_inv, p_d_inv, p_q_first, p_d_first, p_mask,
    p_pair_q, p_order, p_order_first, p_grad, p_weights, p_query_of, p_maxima,
    p_out,  # [tokens of D, D]
    tokens, rows, width, s_q, s_d, s_g0, s_g1, s_out, scale,
    LIST: tl.constexpr, PER_TOKEN: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_MASK: tl.constexpr,
    Q_INV: tl.constexpr, D_INV: tl.constexpr, JACOBIAN: tl.constexpr, ADD: tl.constexpr, D: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, HOLD: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """sum_is c exp((s - m) / temperature) q^. Program (document, tile of its rows, WIDTH columns)."""
    i_d, i_t, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    begin = tl.load(p_d_first + i_d)
    length = (tl.load(p_d_first + i_d + 1) - begin).to(tl.int32)
    low = (i_t.to(tl.int64) * BLOCK_D).to(tl.int32)
    o_t = low + tl.arange(0, BLOCK_D)
    row, m_row = begin + o_t, o_t < length
    m_t = m_row
    if HAS_MASK:
        m_t = m_row & (tl.load(p_mask + row, mask=m_row, other=0) != 0)
    o_k = (i_c.to(tl.int64) * WIDTH).to(tl.int32) + tl.arange(0, WIDTH)
    b_0, b_1, b_2 = load_pieces(p_d, row, m_t, s_d, D, W0, W1, W2)
    factor = tl.full([BLOCK_D], 1.0, tl.float32)
    if D_INV:
        factor = tl.load(p_d_inv + row, mask=m_t, other=0.0)
    start, stop = tl.zeros([], tl.int64), tl.full([], 1, tl.int64)
    if LIST:
        start, stop = tl.load(p_order_first + i_d), tl.load(p_order_first + i_d + 1)
    stop = tl.where(low < length, stop, start)
    acc = tl.zeros([BLOCK_D, WIDTH], tl.float32)
    for n in range(start, stop):
        i_r, q_first, longest = i_d, tl.zeros([], tl.int64), tl.cast(tokens, tl.int64)
        if LIST:
            i_r = tl.load(p_order + n)
            i_q = tl.load(p_pair_q + i_r)
            q_first = tl.load(p_q_first + i_q)
            longest = tl.load(p_q_first + i_q + 1) - q_first
        for s_0 in range(0, longest, BLOCK_Q):
            o_s = s_0 + tl.arange(0, BLOCK_Q)
            o_q, m_q = q_first + o_s, o_s < longest
            c = coefficient(p_grad, p_weights, p_query_of, i_r, o_s, o_q, m_q, s_g0, s_g1, LIST, PER_TOKEN, HAS_WEIGHTS)
            m = tl.load(p_maxima + i_r * width + o_s, mask=m_q, other=0.0)
            m_q = m_q & (c != 0)  # 0 times what a token without weight holds may be NaN
            s = similarities(b_0, b_1, b_2, p_d, row, m_t, s_d, p_q, p_q, p_q, p_q, o_q, m_q, s_q, 0,
                             D, W0, W1, W2, HOLD, 0, OPERAND, BLOCK_D, BLOCK_Q)  # fmt: skip
            q_inv = tl.full([BLOCK_Q], 1.0, tl.float32)
            if Q_INV:
                q_inv = tl.load(p_q_inv + o_q, mask=m_q, other=0.0)
            s *= factor[:, None] * q_inv[None, :]
            p = (c * q_inv)[None, :] * tl.exp2((s - m[None, :]) * scale)
            p = tl.where(m_t[:, None] & m_q[None, :], p, 0.0)
            acc = multiply_float(p, load_rows(p_q, o_q, m_q, o_k, s_q, D), acc)
    store_rows(acc, p_d, p_d_inv, row, m_row, o_k, s_d, p_out, s_out, D, JACOBIAN, ADD)
