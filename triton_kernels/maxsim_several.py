"""maxsim in Triton, several results of one pass over a document: the k largest similarities, or a maximum for each
prefix of the dimension (Matryoshka). Formulas: csrc/maxsim.h; parts and layouts: maxsim.py.

Top-k. A similarity and its token are one int64, larger for a larger similarity and, of equal ones, for the earlier
token; NaN is above all. A row's k best of those are a tile of their own. Each tile of similarities gives up its largest
until none is above the worst of the row's k: k log(n / k) times for a document of n tokens in random order.

Prefixes. The products run on over the columns; where a prefix ends, the sums so far are its similarities, and their
maximum goes into the row's [PLANES] maxima. So the last prefix pays for all. Query tokens are read again for each tile,
from L1 or L2. With few steps they are unrolled, and compiled for their prefixes, so that loads run ahead over the tiles
of a document; else prefixes are runtime values, and loads run ahead within a prefix.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import multiply
from .maxsim import NONE, SIZES, first_of, kept_tokens, load_documents, load_pieces, load_rows, similarities

MAX_PLANES = 8  # prefixes of one launch; its unrolled code and its registers grow with them
PLANE_BITS = 16  # prefixes of the dimension are passed as digits of integers, 0 the lowest
UNROLLED_STEPS = {16: 4, 32: 0}  # up to here
# operand bits -> (BLOCK_Q, BLOCK_D, widest step in columns, num_warps, num_stages). Chosen by compiling; not measured.
MAXSIM_PREFIX_CONFIGS = {16: (128, 64, 64, 8, 3), 32: (32, 32, 32, 8, 2)}
# Slots of a row up to -> (BLOCK_Q, BLOCK_D) at most: the row's best are in registers beside the tile.
MAXSIM_TOPK_TILES = {16: (64, 64), 64: (32, 32)}
EMPTY = tl.constexpr(-9223372036854775808)  # plus the slot: below every similarity, and no two the same
FULL = tl.constexpr(9223372036854775807)
NAN_KEY = tl.constexpr(2147483647)
NO_KEY = tl.constexpr(-2147483648)


@triton.jit
def encode(s, token):
    """int64 in the order of (similarity, earlier token); a NaN is the largest, -0 equals 0."""
    bits = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)
    key = tl.where(s != s, NAN_KEY, tl.where(bits < 0, bits ^ NAN_KEY, bits))
    return (key.to(tl.int64) << 32) | (~token).to(tl.int64) & 0xFFFFFFFF


@triton.jit
def decode(code):
    """Similarity and token of a code; 0 and -1 of an empty slot."""
    key = (code >> 32).to(tl.int32)
    bits = tl.where(key < 0, key ^ NAN_KEY, key)
    there = key != NO_KEY
    return tl.where(there, bits.to(tl.float32, bitcast=True), 0.0), tl.where(there, ~(code.to(tl.int32)), -1)


@triton.jit(do_not_specialize=SIZES)
def forward_topk(
    p_q, p_d, p_codes, p_centroids, p_buckets, p_q_inv, p_d_inv, p_q_first, p_d_first, p_mask, p_pair_q, p_pair_d,
    p_maxima,  # [rows, width], if MAXIMA
    p_winners,  # [TOPK, rows, width], if WINNERS
    tokens, rows, width, tiles, s_q, s_d, s_centroid,
    LIST: tl.constexpr, HAS_MASK: tl.constexpr, Q_INV: tl.constexpr, D_INV: tl.constexpr, MAXIMA: tl.constexpr,
    WINNERS: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, W0: tl.constexpr,
    W1: tl.constexpr, W2: tl.constexpr, HOLD: tl.constexpr, BITS: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The mean of the TOPK largest, and which they are. SLOTS: a power of two from TOPK up."""
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
    o_slot = tl.arange(0, SLOTS)
    b_0, b_1, b_2 = load_pieces(p_q, o_q, m_q, s_q, D, W0, W1, W2)
    m_slot = (o_slot < TOPK)[None, :]
    best = tl.zeros([BLOCK_Q, SLOTS], tl.int64) + tl.where(m_slot, EMPTY + o_slot[None, :].to(tl.int64), FULL)
    worst = tl.min(best, axis=1)
    for t in range(0, length, BLOCK_D):
        row, m_t = begin + t + o_t, t + o_t < length
        s = similarities(b_0, b_1, b_2, p_q, o_q, m_q, s_q, p_d, p_codes, p_centroids, p_buckets, row, m_t, s_d,
                         s_centroid, D, W0, W1, W2, HOLD, BITS, OPERAND, BLOCK_Q, BLOCK_D)  # fmt: skip
        if D_INV:
            s *= tl.load(p_d_inv + row, mask=m_t, other=0.0)[None, :]
        if HAS_MASK:
            m_t = m_t & (tl.load(p_mask + row, mask=m_t, other=0) != 0)
        code = tl.where(m_t[None, :], encode(s, (t + o_t)[None, :]), EMPTY)
        top = tl.max(code, axis=1)
        while tl.max((top > worst).to(tl.int32), axis=0) > 0:
            better = top > worst
            best = tl.where(better[:, None] & (best == worst[:, None]), top[:, None], best)
            code = tl.where(code == top[:, None], EMPTY, code)  # no two are the same
            worst, top = tl.min(best, axis=1), tl.max(code, axis=1)
    n_kept, _ = kept_tokens(p_mask, begin, length, HAS_MASK)
    total = tl.zeros([BLOCK_Q], tl.float32)
    best = tl.where(m_slot, best, EMPTY)
    p_out = i_r * width + o_s
    for level in range(TOPK):
        top = tl.max(best, axis=1)
        best = tl.where(best == top[:, None], EMPTY, best)
        value, token = decode(top)
        total += value
        if WINNERS:
            to = p_winners + tl.cast(level, tl.int64) * rows * width + p_out
            tl.store(to, token.to(p_winners.dtype.element_ty), mask=m_s)
    if MAXIMA:
        total /= tl.minimum(tl.maximum(n_kept, 1), TOPK).to(tl.float32)
        if Q_INV:
            total *= tl.load(p_q_inv + o_q, mask=m_q, other=0.0)
        tl.store(p_maxima + p_out, tl.where(m_q, total, 0.0), mask=m_s)


@triton.jit
def add_columns(
    p_q, p_d, p_codes, p_centroids, p_buckets, o_q, m_q, row, m_t, s_q, s_d, s_centroid, acc, k, end,
    STEP: tl.constexpr, BITS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """acc + products of STEP columns from k on, but not of `end` and beyond."""
    o_k = k + tl.arange(0, STEP)
    b_q = load_rows(p_q, o_q, m_q, o_k, s_q, end)
    x = load_documents(p_d, p_codes, p_centroids, p_buckets, row, m_t, o_k, s_d, s_centroid, end, BITS)
    return multiply(b_q.to(OPERAND), tl.trans(x.to(OPERAND)), acc)


@triton.jit
def take_plane(best, at, acc, p_d_inv, row, m_t, counts, t, o_t, o_p, plane, s_d_inv, D_INV: tl.constexpr):
    """The maxima so far [BLOCK_Q, PLANES] and their tokens, with a tile of one plane's products."""
    s = acc
    if D_INV:
        s = acc * tl.load(p_d_inv + tl.cast(plane, tl.int64) * s_d_inv + row, mask=m_t, other=0.0)[None, :]
    s = tl.where(counts[None, :], s, NONE)
    # As lanes of one tile: nothing is above -inf, so such a token has no place here.
    value, token = first_of(s, tl.where(s == NONE, -1, t), o_t)
    better = (value[:, None] > best) | ((value != value)[:, None] & (best == best))
    better = better & (o_p == plane)
    return tl.where(better, value[:, None], best), tl.where(better, token[:, None], at)


@triton.jit(do_not_specialize=(*SIZES, "planes", "ends_0", "ends_4", "s_q_inv", "s_d_inv"))
def forward_prefixes(
    p_q, p_d, p_codes, p_centroids, p_buckets,
    p_q_inv, p_d_inv,  # factors of the tokens, planes s_q_inv and s_d_inv elements apart
    p_q_first, p_d_first, p_mask, p_floor, p_pair_q, p_pair_d,
    p_maxima,  # [planes, rows, width], if MAXIMA
    p_winners,  # [planes, rows, width], if WINNERS
    tokens, rows, width, tiles, planes, ends_0, ends_4, s_q, s_d, s_centroid, s_q_inv, s_d_inv,
    LIST: tl.constexpr, HAS_MASK: tl.constexpr, HAS_FLOOR: tl.constexpr, Q_INV: tl.constexpr, D_INV: tl.constexpr,
    MAXIMA: tl.constexpr, WINNERS: tl.constexpr, PLANES: tl.constexpr, UNROLL: tl.constexpr, PREFIXES: tl.constexpr,
    ALIGNED: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr, OPERAND: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The maximum, and its first token, for each of `planes` prefixes. PLANES: a power of two from there up.

    ends_0 and ends_4: int64, the prefixes in 16 bits each, four and four. If UNROLL, PREFIXES has them, and a 0 before.
    ALIGNED: all are multiples of 16.
    """
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
    o_p = tl.arange(0, PLANES)[None, :]
    best = tl.full([BLOCK_Q, PLANES], NONE, tl.float32)
    at = tl.full([BLOCK_Q, PLANES], -1, tl.int32)
    for t in range(0, length, BLOCK_D):
        row, m_t = begin + t + o_t, t + o_t < length
        counts = m_t
        if HAS_MASK:
            counts = m_t & (tl.load(p_mask + row, mask=m_t, other=0) != 0)
        acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        if UNROLL:
            for plane in tl.static_range(PLANES):
                if (PREFIXES >> (16 * plane + 16)) & 0xFFFF > 0:
                    for k in tl.static_range(
                        (PREFIXES >> (16 * plane)) & 0xFFFF, (PREFIXES >> (16 * plane + 16)) & 0xFFFF, STEP
                    ):
                        acc = add_columns(
                            p_q, p_d, p_codes, p_centroids, p_buckets, o_q, m_q, row, m_t, s_q, s_d, s_centroid, acc,
                            k, (PREFIXES >> (16 * plane + 16)) & 0xFFFF, STEP, BITS, OPERAND,
                        )  # fmt: skip
                    best, at = take_plane(
                        best, at, acc, p_d_inv, row, m_t, counts, t, o_t, o_p, plane, s_d_inv, D_INV
                    )
        else:
            start = tl.zeros([], tl.int32)
            for plane in range(planes):
                end = ((tl.where(plane < 4, ends_0, ends_4) >> tl.cast(plane % 4, tl.int64) * 16) & 0xFFFF).to(tl.int32)
                if ALIGNED:  # so that masked loads stay wide
                    end = tl.multiple_of(end, 16)
                    start = tl.multiple_of(start, 16)
                for k in range(start, end, STEP):
                    acc = add_columns(
                        p_q, p_d, p_codes, p_centroids, p_buckets, o_q, m_q, row, m_t, s_q, s_d, s_centroid, acc, k,
                        end, STEP, BITS, OPERAND,
                    )  # fmt: skip
                best, at = take_plane(best, at, acc, p_d_inv, row, m_t, counts, t, o_t, o_p, plane, s_d_inv, D_INV)
                start = end
    n_kept, first_kept = kept_tokens(p_mask, begin, length, HAS_MASK)
    total = tl.where(n_kept > 0, best, 0.0)
    at = tl.where((at < 0) & (n_kept > 0), first_kept, at)
    m_q = m_q[:, None] & (o_p < planes)
    if Q_INV:
        total *= tl.load(p_q_inv + o_p.to(tl.int64) * s_q_inv + o_q[:, None], mask=m_q, other=0.0)
    if HAS_FLOOR:
        below = (tl.load(p_floor + i_d) != 0) & (total < 0)
        total = tl.where(below, 0.0, total)
        at = tl.where(below, -1, at)
    m_s = m_s[:, None] & (o_p < planes)
    to = (o_p.to(tl.int64) * rows + i_r) * width + o_s[:, None]
    if WINNERS:
        tl.store(p_winners + to, at.to(p_winners.dtype.element_ty), mask=m_s)
    if MAXIMA:
        tl.store(p_maxima + to, tl.where(m_q, total, 0.0), mask=m_s)
