"""maxsim in Triton, backward: every row of a gradient is owned by one program, which adds in a fixed order; no atomics.

dQ: a program owns a few query tokens with all their columns and gathers the winners' rows, document after document.
dD: a program owns BLOCK_D rows of a document and passes over the query tokens; the rows c q^ of a block of them are
added where their winners point by a product with the one-hot matrix of the winners, in three bfloat16 parts, which
is exact up to the order of its float32 sums. That is three times the operations of a 16-bit forward.
The smooth maximum recomputes its similarities (once per WIDTH columns of the result).

The normalisation's Jacobian is applied before the only store, if one program has all columns of a row; `finish_rows`
does it otherwise. A plane of prefixes or a chunk of documents adds to what is there (ADD, float32).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import split3
from .maxsim import SIZES, load_documents, load_rows

# (operand bits, columns WIDTH of the accumulator) -> (BLOCK_D, BLOCK_Q, num_warps, num_stages) of grad_documents.
# Chosen by compiling, as MAXSIM_CONFIGS; not measured on a GPU.
MAXSIM_BACKWARD_CONFIGS = {
    (16, 128): (64, 64, 8, 2),
    (16, 256): (32, 32, 8, 2),
    (32, 128): (64, 32, 8, 2),
    (32, 256): (32, 32, 8, 2),
}
GATHER_ELEMENTS = 4096  # of the accumulator of a program of grad_queries
GATHER_UNROLL = 4  # documents whose rows a program of grad_queries fetches at once
LARGEST_INVERSE = tl.constexpr(0.999e12)  # 1 / F.normalize's eps, up to rounding: there the norm is constant


@triton.jit
def through_norm(dx, x, inverse):
    """(dx - <dx, x^> x^) / |x| for rows x; a row without a gradient stays without one, whatever it holds."""
    some = tl.sum(tl.where(dx != 0, 1.0, 0.0), axis=1) > 0
    along = tl.sum(dx * x, axis=1) * inverse * inverse
    along = tl.where(inverse >= LARGEST_INVERSE, 0.0, along)
    return tl.where(some[:, None], (dx - along[:, None] * x) * inverse[:, None], 0.0)


@triton.jit
def store_rows(
    acc, p_x, p_inv, row, m_row, o_k, s_x, p_out, s_out, D: tl.constexpr, INV: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """acc through the norm of rows x if INV, added to what is there if ADD."""
    if INV:
        x = load_rows(p_x, row, m_row, o_k, s_x, D).to(tl.float32)
        acc = through_norm(acc, x, tl.load(p_inv + row, mask=m_row, other=0.0))
    p_o = p_out + row[:, None] * s_out + o_k[None, :]
    mask = m_row[:, None] & (o_k < D)[None, :]
    if ADD:
        acc += tl.load(p_o, mask=mask, other=0.0)
    tl.store(p_o, acc.to(p_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def finish_rows(
    p_parts,  # [parts, n, D] float32
    p_x, p_inv, p_out, n, parts, s_x, s_out,
    D: tl.constexpr, INV: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The parts of each row added up in order, and through its norm."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_row, o_k = row < n, tl.arange(0, WIDTH)
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    for part in range(0, parts):
        acc += load_rows(p_parts + tl.cast(part, tl.int64) * n * D, row, m_row, o_k, D, D)
    store_rows(acc, p_x, p_inv, row, m_row, o_k, s_x, p_out, s_out, D, INV, ADD)


@triton.jit
def winner(p, mask):
    """Position of the winners in their document, -1 for none; 16-bit ones are unsigned, 0xffff none."""
    w = tl.load(p, mask=mask, other=-1).to(tl.int32)
    if p.dtype.element_ty == tl.int16:
        w = w & 0xFFFF
        w = tl.where(w == 0xFFFF, -1, w)
    return w


@triton.jit
def coefficient(
    p_grad, p_weights, p_query_of, i_r, o_s, o_q, m_q, s_g0, s_g1,
    LIST: tl.constexpr, PER_TOKEN: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """c of query tokens o_q in row i_r of the per-token arrays: the gradient of each m, from the strided grad.

    grad: [rows, width] if PER_TOKEN, else [Nq, Nd], or [P] if LIST.
    """
    if PER_TOKEN:
        c = tl.load(p_grad + i_r * s_g0 + o_s * s_g1, mask=m_q, other=0.0)
    else:
        if LIST:
            c = tl.load(p_grad + i_r * s_g0 + o_q * 0, mask=m_q, other=0.0)
        else:
            query = tl.load(p_query_of + o_q, mask=m_q, other=0)
            c = tl.load(p_grad + query * s_g0 + i_r * s_g1, mask=m_q, other=0.0)
        if HAS_WEIGHTS:
            w = tl.load(p_weights + o_q, mask=m_q, other=0.0)
            c = tl.where(w == 0.0, 0.0, c * w)
    return c


@triton.jit(do_not_specialize=SIZES)
def grad_queries(
    p_q, p_d, p_codes, p_centroids, p_buckets, p_q_inv, p_d_inv, p_q_first, p_d_first,
    p_pair_d, p_order, p_order_first,  # if LIST: documents of pairs, pairs by query [P], first of each query [Nq + 1]
    p_grad, p_weights, p_query_of, p_winners,
    p_out,  # [tokens, D]; [splits, tokens, D] float32 if splits > 1
    tokens, rows, width, tiles, splits, s_q, s_d, s_centroid, s_g0, s_g1, s_out,
    LIST: tl.constexpr, PER_TOKEN: tl.constexpr, HAS_WEIGHTS: tl.constexpr, D_INV: tl.constexpr,
    JACOBIAN: tl.constexpr, ADD: tl.constexpr, TOPK: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
    BLOCK_Q: tl.constexpr, WIDTH: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """sum_j c d^ of the winners. Program (tile of query tokens, or query and tile of its own; share of the rows)."""
    i_t, i_s = tl.program_id(0), tl.program_id(1)
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
    o_k = tl.arange(0, WIDTH)
    acc = tl.zeros([BLOCK_Q, WIDTH], tl.float32)
    for n in range(start, stop, UNROLL):
        for u in tl.static_range(UNROLL):
            i_r = tl.cast(n + u, tl.int64)
            i_d, there = i_r, i_r < stop
            if LIST:
                i_r = tl.load(p_order + i_r, mask=there, other=0)
                i_d = tl.load(p_pair_d + i_r, mask=there, other=0)
            first = tl.load(p_d_first + i_d, mask=there, other=0)
            c = coefficient(p_grad, p_weights, p_query_of, i_r, o_s, o_q, m_q & there, s_g0, s_g1,
                            LIST, PER_TOKEN, HAS_WEIGHTS)  # fmt: skip
            for level in range(TOPK):
                at = p_winners + (tl.cast(level, tl.int64) * rows + i_r) * width + o_s
                w = winner(at, m_q & there)
                active = (w >= 0) & (c != 0)
                # Of a token without a winner the row is read by nobody. Triton 3.6 lays the select over `active` out
                # wrongly and does not compile it; without it LIST spills on sm_100 (3.9).
                row = first + (tl.where(active, w, 0) if LIST else tl.maximum(w, 0))
                x = load_documents(p_d, p_codes, p_centroids, p_buckets, row, active, o_k, s_d, s_centroid, D, BITS)
                each = tl.where(active, c, 0.0)
                if D_INV:
                    each *= tl.load(p_d_inv + row, mask=active, other=0.0)
                acc += each[:, None] * x.to(tl.float32)
    p_o = p_out + tl.cast(i_s, tl.int64) * tokens * s_out
    store_rows(acc, p_q, p_q_inv, o_q, m_q, o_k, s_q, p_o, s_out, D, JACOBIAN, ADD)


@triton.jit
def add_rows(hot, x, acc):
    """acc + hot x for a matrix of zeros and ones and float32 x: three products of bfloat16, which are exact."""
    high, middle, low = split3(x)
    acc = tl.dot(hot, low, acc)
    acc = tl.dot(hot, middle, acc)
    return tl.dot(hot, high, acc)


@triton.jit
def query_rows(
    p_q, p_q_inv, p_grad, p_weights, p_query_of, p_winners, i_r, o_s, o_q, m_q, o_k, rows, width, level, s_q, s_g0,
    s_g1, LIST: tl.constexpr, PER_TOKEN: tl.constexpr, HAS_WEIGHTS: tl.constexpr, Q_INV: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Winners and rows c q^ of query tokens; -1 and zeros where there is nothing to add."""
    w = winner(p_winners + (tl.cast(level, tl.int64) * rows + i_r) * width + o_s, m_q)
    c = coefficient(p_grad, p_weights, p_query_of, i_r, o_s, o_q, m_q, s_g0, s_g1, LIST, PER_TOKEN, HAS_WEIGHTS)
    w = tl.where(c != 0, w, -1)
    active = w >= 0
    if Q_INV:
        c *= tl.load(p_q_inv + o_q, mask=active, other=0.0)
    x = load_rows(p_q, o_q, active, o_k, s_q, D).to(tl.float32)
    return w, tl.where(active, c, 0.0)[:, None] * x


@triton.jit(do_not_specialize=SIZES)
def grad_documents(
    p_q, p_d, p_q_inv, p_d_inv, p_q_first, p_d_first,
    p_pair_q, p_order, p_order_first,  # if LIST: queries of pairs, pairs by document [P], first of each [Nd + 1]
    p_grad, p_weights, p_query_of, p_winners,
    p_out,  # [tokens of D, D]
    tokens, rows, width, s_q, s_d, s_g0, s_g1, s_out,
    LIST: tl.constexpr, PER_TOKEN: tl.constexpr, HAS_WEIGHTS: tl.constexpr, Q_INV: tl.constexpr,
    JACOBIAN: tl.constexpr, ADD: tl.constexpr, TOPK: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """sum of c q^ over the query tokens that a row won. Program (document, tile of its rows, WIDTH columns)."""
    i_d, i_t, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    begin = tl.load(p_d_first + i_d)
    length = (tl.load(p_d_first + i_d + 1) - begin).to(tl.int32)
    low = (i_t.to(tl.int64) * BLOCK_D).to(tl.int32)
    o_t = low + tl.arange(0, BLOCK_D)
    m_t = o_t < length
    o_k = (i_c.to(tl.int64) * WIDTH).to(tl.int32) + tl.arange(0, WIDTH)
    o_b = tl.arange(0, BLOCK_Q)
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
        for level in range(TOPK):
            for s in range(0, longest, BLOCK_Q):
                o_s = s + o_b
                w, x = query_rows(p_q, p_q_inv, p_grad, p_weights, p_query_of, p_winners, i_r, o_s, q_first + o_s,
                                  o_s < longest, o_k, rows, width, level, s_q, s_g0, s_g1, LIST, PER_TOKEN,
                                  HAS_WEIGHTS, Q_INV, D)  # fmt: skip
                acc = add_rows((o_t[:, None] == w[None, :]).to(tl.bfloat16), x, acc)
    # 0 times an infinity or NaN has spoilt every row of its column: then again, token by token.
    if tl.sum((acc - acc != 0).to(tl.int32)) > 0:
        acc = tl.zeros([BLOCK_D, WIDTH], tl.float32)
        o_one = tl.arange(0, 1)
        for n in range(start, stop):
            i_r, q_first, longest = i_d, tl.zeros([], tl.int64), tl.cast(tokens, tl.int64)
            if LIST:
                i_r = tl.load(p_order + n)
                i_q = tl.load(p_pair_q + i_r)
                q_first = tl.load(p_q_first + i_q)
                longest = tl.load(p_q_first + i_q + 1) - q_first
            for level in range(TOPK):
                for s in range(0, longest):
                    o_s = s + o_one
                    w, x = query_rows(p_q, p_q_inv, p_grad, p_weights, p_query_of, p_winners, i_r, o_s, q_first + o_s,
                                      o_s < longest, o_k, rows, width, level, s_q, s_g0, s_g1, LIST, PER_TOKEN,
                                      HAS_WEIGHTS, Q_INV, D)  # fmt: skip
                    acc += tl.where(o_t[:, None] == w[None, :], x, 0.0)
    store_rows(acc, p_d, p_d_inv, begin + o_t, m_t, o_k, s_d, p_out, s_out, D, JACOBIAN, ADD)
