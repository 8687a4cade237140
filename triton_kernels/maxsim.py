"""maxsim in Triton, forward: similarities a tile at a time, never stored. Formulas and layouts: csrc/maxsim.h.

Algorithm. A program owns BLOCK_Q consecutive query tokens, of as many queries as they belong to (of one query for a
list of pairs), and walks over one document in tiles of BLOCK_D tokens. Packing queries this way divides the reads of
a document by BLOCK_Q / Lq. The running maximum is deferred: each of the BLOCK_Q x BLOCK_D lanes keeps the largest
similarity it has seen and where, and lanes are compared once per document, not once per tile. Each lane keeps its
first winner, and of equal lanes the earliest token wins, so ties go to the first token.

The dimension is cut into powers of two, 96 = 64 + 32: Q stays on chip for the whole document up to D = 512 in 16 bits;
beyond it, and in float32, a loop over BLOCK_K columns reads it again. Operands are never rounded: 16-bit tokens of one
dtype are multiplied as they are; float32 and mixed ones as sums of three bfloat16 parts, six products (error 2^-24,
for the cost of three tf32 products). Norms and int8 scales are factors of the similarity. Sums are float32;
addresses int64. Numbers of sequences, tokens and pairs are runtime values: only D, the flags and the powers of two
that bound short sequences make Triton compile again.

Bytes moved: each document ceil(tokens of queries / BLOCK_Q) times, mostly from L2; 4 bytes of maximum and 2 of winner
per query token and document.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import multiply

# (operand bits, D up to; 0: any) -> (BLOCK_Q, BLOCK_D, BLOCK_K, num_warps, num_stages). BLOCK_K = 0: Q is held in
# pieces; else read again, BLOCK_K columns at a time. Chosen by compiling: nothing spills on sm_80, sm_90 and sm_100
# (tests/test_kernel_budget.py); not yet measured on a GPU. Fewer query tokens shrink BLOCK_Q.
MAXSIM_CONFIGS = {
    (16, 128): (128, 64, 0, 8, 3),
    (16, 256): (128, 64, 0, 8, 2),
    (16, 512): (64, 32, 0, 8, 2),
    (16, 0): (128, 64, 64, 8, 3),
    (32, 0): (64, 32, 32, 8, 2),
}
MAXSIM_CONFIGS_SM90 = MAXSIM_CONFIGS | {(32, 0): (64, 64, 32, 8, 2)}  # sm_90 and newer
# Arguments that change from call to call: no kernel is compiled again for their values.
SIZES = (
    "tokens", "rows", "width", "tiles", "splits", "parts", "count", "blocks", "longest", "n", "temperature", "scale",
)  # fmt: skip
NONE = tl.constexpr(float("-inf"))
NEVER = tl.constexpr(2147483647)  # after every token of a document


@triton.jit
def load_rows(p_x, row, m_row, o_k, s_row, D):
    """x[row, o_k] [rows, columns]; zeros where m_row is not and from column D on."""
    mask = m_row[:, None] & (o_k < D)[None, :]
    return tl.load(p_x + row[:, None] * s_row + o_k[None, :], mask=mask, other=0)


@triton.jit
def load_documents(
    p_d, p_codes, p_centroids, p_buckets, row, m_row, o_k, s_d, s_centroid, D, BITS: tl.constexpr
):  # fmt: skip
    """As load_rows for documents, decoded if BITS (8: the integers, without their scale; 2 or 4: residuals)."""
    if BITS == 0 or BITS == 8:
        x = load_rows(p_d, row, m_row, o_k, s_d, D)
    else:
        mask = m_row[:, None] & (o_k < D)[None, :]
        per_byte: tl.constexpr = 8 // BITS
        byte = tl.load(p_d + row[:, None] * s_d + (o_k // per_byte)[None, :], mask=mask, other=0).to(tl.int32)
        which = (byte >> ((o_k % per_byte) << (BITS // 2))[None, :]) & ((1 << BITS) - 1)
        code = tl.load(p_codes + row, mask=m_row, other=0).to(tl.int64)
        x = tl.load(p_centroids + code[:, None] * s_centroid + o_k[None, :], mask=mask, other=0.0)
        x += tl.load(p_buckets + which, mask=mask, other=0.0)
    return x


@triton.jit(do_not_specialize=SIZES)
def inverse_norms(
    p_d, p_codes, p_centroids, p_buckets,  # [n, D], strides s_d and 1
    p_out,  # [n]: 1 / max(|x|, 1e-12); NaN stays NaN
    n, s_d, s_centroid,
    D: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_row = row < n
    square = tl.zeros([BLOCK], tl.float64)  # the squares of a float32 row of norm 1e19 overflow float32
    for k in range(0, D, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        x = load_documents(p_d, p_codes, p_centroids, p_buckets, row, m_row, o_k, s_d, s_centroid, D, BITS)
        x = x.to(tl.float64)
        square += tl.sum(x * x, axis=1)
    norm = tl.sqrt(square)
    tl.store(p_out + row, (1.0 / tl.where(norm < 1e-12, 1e-12, norm)).to(tl.float32), mask=m_row)


@triton.jit
def load_pieces(p_q, o_q, m_q, s_q, D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr):
    """Rows o_q of Q in pieces of W0, W1 and W2 columns; a piece of no columns repeats the first."""
    b_0 = load_rows(p_q, o_q, m_q, tl.arange(0, W0), s_q, D)
    b_1, b_2 = b_0, b_0
    if W1 > 0:
        b_1 = load_rows(p_q, o_q, m_q, W0 + tl.arange(0, W1), s_q, D)
    if W2 > 0:
        b_2 = load_rows(p_q, o_q, m_q, W0 + W1 + tl.arange(0, W2), s_q, D)
    return b_0, b_1, b_2


@triton.jit
def similarities(
    b_0, b_1, b_2, p_q, o_q, m_q, s_q, p_d, p_codes, p_centroids, p_buckets, row, m_t, s_d, s_centroid,
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, HOLD: tl.constexpr, BITS: tl.constexpr,
    OPERAND: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Products [BLOCK_Q, BLOCK_D] of query tokens o_q, with pieces b_0 .. b_2 if HOLD, and document tokens row."""
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if HOLD:
        x = load_documents(p_d, p_codes, p_centroids, p_buckets, row, m_t, tl.arange(0, W0), s_d, s_centroid, D, BITS)
        acc = multiply(b_0.to(OPERAND), tl.trans(x.to(OPERAND)), acc)
        if W1 > 0:
            o_k = W0 + tl.arange(0, W1)
            x = load_documents(p_d, p_codes, p_centroids, p_buckets, row, m_t, o_k, s_d, s_centroid, D, BITS)
            acc = multiply(b_1.to(OPERAND), tl.trans(x.to(OPERAND)), acc)
        if W2 > 0:
            o_k = W0 + W1 + tl.arange(0, W2)
            x = load_documents(p_d, p_codes, p_centroids, p_buckets, row, m_t, o_k, s_d, s_centroid, D, BITS)
            acc = multiply(b_2.to(OPERAND), tl.trans(x.to(OPERAND)), acc)
    else:
        for k in range(0, D, W0):
            o_k = k + tl.arange(0, W0)
            b_q = load_rows(p_q, o_q, m_q, o_k, s_q, D)
            x = load_documents(p_d, p_codes, p_centroids, p_buckets, row, m_t, o_k, s_d, s_centroid, D, BITS)
            acc = multiply(b_q.to(OPERAND), tl.trans(x.to(OPERAND)), acc)
    return acc


@triton.jit
def kept_tokens(p_mask, begin, length, HAS_MASK: tl.constexpr):
    """How many of a document's tokens count, and the first of those."""
    count, first = length, tl.zeros([], tl.int32)
    if HAS_MASK:
        o_t = tl.arange(0, 1024)
        each, lowest = tl.zeros([1024], tl.int32), tl.full([1024], NEVER, tl.int32)
        for t in range(0, length, 1024):
            kept = tl.load(p_mask + begin + t + o_t, mask=t + o_t < length, other=0) != 0
            each += kept.to(tl.int32)
            lowest = tl.minimum(lowest, tl.where(kept, t + o_t, NEVER))
        count, first = tl.sum(each), tl.min(lowest)
    return count, first


@triton.jit
def first_of(best, at, o_t):
    """Largest lane of each row and the first token that has it, -1 if none; a NaN is the largest. at: of the lanes."""
    token = tl.where(at < 0, NEVER, at + o_t[None, :])
    broken = best != best
    first_nan = tl.min(tl.where(broken, token, NEVER), axis=1)
    value = tl.max(tl.where(broken, NONE, best), axis=1)
    first = tl.min(tl.where(best == value[:, None], token, NEVER), axis=1)
    value = tl.where(first_nan < NEVER, float("nan"), value)
    first = tl.where(first_nan < NEVER, first_nan, first)
    return value, tl.where(first < NEVER, first, -1)


@triton.jit(do_not_specialize=SIZES)
def forward(
    p_q, p_d, p_codes, p_centroids, p_buckets,  # tokens, columns one element apart
    p_q_inv, p_d_inv,  # [tokens], factors
    p_q_first, p_d_first,  # offsets
    p_mask, p_floor,  # [tokens of D], [Nd]
    p_pair_q, p_pair_d,  # [rows], if LIST
    p_maxima,  # [rows, width], if MAXIMA
    p_winners,  # [rows, width], if WINNERS; 16 or 32 bits
    tokens, width, tiles, s_q, s_d, s_centroid,
    LIST: tl.constexpr, HAS_MASK: tl.constexpr, HAS_FLOOR: tl.constexpr, Q_INV: tl.constexpr, D_INV: tl.constexpr,
    MAXIMA: tl.constexpr, WINNERS: tl.constexpr, D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
    W2: tl.constexpr, HOLD: tl.constexpr, BITS: tl.constexpr, OPERAND: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row r of the output is document r, or pair r; its columns the tokens of all queries, or of the pair's."""
    i_r, i_t = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64)
    i_d, q_first, q_end = i_r, tl.zeros([], tl.int64), tl.cast(tokens, tl.int64)
    if LIST:
        i_q = tl.load(p_pair_q + i_r)
        i_d = tl.load(p_pair_d + i_r)
        q_first, q_end = tl.load(p_q_first + i_q), tl.load(p_q_first + i_q + 1)
    o_s = i_t * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_s = o_s < width
    o_q = q_first + o_s
    m_q = m_s & (o_q < q_end)
    begin = tl.load(p_d_first + i_d)
    length = (tl.load(p_d_first + i_d + 1) - begin).to(tl.int32)
    o_t = tl.arange(0, BLOCK_D)
    b_0, b_1, b_2 = load_pieces(p_q, o_q, m_q, s_q, D, W0, W1, W2)
    p_out = i_r * width + o_s
    n_kept, first_kept = kept_tokens(p_mask, begin, length, HAS_MASK)
    best = tl.full([BLOCK_Q, BLOCK_D], NONE, tl.float32)
    at = tl.full([BLOCK_Q, BLOCK_D], -1, tl.int32)
    for t in range(0, length, BLOCK_D):
        row, m_t = begin + t + o_t, t + o_t < length
        s = similarities(b_0, b_1, b_2, p_q, o_q, m_q, s_q, p_d, p_codes, p_centroids, p_buckets, row, m_t, s_d,
                         s_centroid, D, W0, W1, W2, HOLD, BITS, OPERAND, BLOCK_Q, BLOCK_D)  # fmt: skip
        if D_INV:
            s *= tl.load(p_d_inv + row, mask=m_t, other=0.0)[None, :]
        if HAS_MASK:
            m_t = m_t & (tl.load(p_mask + row, mask=m_t, other=0) != 0)
        s = tl.where(m_t[None, :], s, NONE)
        better = (s > best) | ((s != s) & (best == best))
        best = tl.where(better, s, best)
        at = tl.where(better, t, at)
    total, winner = first_of(best, at, o_t)
    # Nothing is above -inf, so a token that has only such similarities has no winner yet: the first.
    winner = tl.where((winner < 0) & (n_kept > 0), first_kept, winner)
    total = tl.where(n_kept > 0, total, 0.0)
    if Q_INV:
        total *= tl.load(p_q_inv + o_q, mask=m_q, other=0.0)
    if HAS_FLOOR:
        below = (tl.load(p_floor + i_d) != 0) & (total < 0)
        total = tl.where(below, 0.0, total)
        winner = tl.where(below, -1, winner)
    if WINNERS:
        tl.store(p_winners + p_out, winner.to(p_winners.dtype.element_ty), mask=m_s)
    if MAXIMA:
        tl.store(p_maxima + p_out, tl.where(m_q, total, 0.0), mask=m_s)


@triton.jit(do_not_specialize=SIZES)
def sum_tokens(
    p_maxima,  # [rows, width]
    p_weights,  # [tokens], if HAS_WEIGHTS
    p_q_first, p_pair_q,
    p_scores,  # [Nq, rows], or [rows] if LIST
    count, blocks, rows, width, longest,
    LIST: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w m over each query's tokens, in their order; a weight of 0 drops a token whatever it holds.

    count: of queries, or of pairs. A program takes BLOCK_N queries and one document, or BLOCK_N pairs.
    """
    i_r, i_n = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < count
    query = o_n
    if LIST:
        query = tl.load(p_pair_q + o_n, mask=m_n, other=0)
    first = tl.load(p_q_first + query, mask=m_n, other=0)
    end = tl.load(p_q_first + query + 1, mask=m_n, other=0)
    base = o_n * width if LIST else i_r * width + first
    score = tl.zeros([BLOCK_N], tl.float32)
    for s in range(0, longest, BLOCK):
        o_s = s + tl.arange(0, BLOCK)
        inside = m_n[:, None] & (first[:, None] + o_s[None, :] < end[:, None])
        m = tl.load(p_maxima + base[:, None] + o_s[None, :], mask=inside, other=0.0)
        if HAS_WEIGHTS:
            w = tl.load(p_weights + first[:, None] + o_s[None, :], mask=inside, other=0.0)
            m = tl.where(w == 0.0, 0.0, m * w)
        score += tl.sum(m, axis=1)
    tl.store(p_scores + (o_n if LIST else o_n * rows + i_r), score, mask=m_n)
