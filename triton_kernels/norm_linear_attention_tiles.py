"""Four tiles of features, and products of them, for norm_linear_attention's Triton kernels.

A feature vector is four tiles [tokens, pairs]: the even and the odd channels of its upper half, then of its lower; a
state has four tiles [pairs, values] likewise. A float32 product holds the left operand in the registers of every warp,
twice (three TF32 products). ptxas prepares the operands of all products between two branches at once, and unrolls a
loop over four tiles, so that a kernel then spills: with LOOP the tiles are taken one by one, in loops whose end the
compiler does not know, and what is said to hang on `always` stays where it is written.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def four_of(heads):
    """4, which the compiler does not know."""
    return 4 + tl.minimum(heads, 0)


@triton.jit
def always(i, four):
    """True for any i >= 0."""
    return i + four > 3


@triton.jit
def zero_of(i, four, LEAST: tl.constexpr):
    """0 for any i >= 0, another value to the compiler for each LEAST <= 3."""
    return tl.where(i + four > LEAST, 0, 1)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "bf16":
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_pairs(p_x, o_token, m_token, s_token, o_pair, D: tl.constexpr):
    """Even and odd channels [tokens, pairs] in float32; zeros outside."""
    at = p_x + o_token[:, None] * s_token + 2 * o_pair[None, :]
    even = tl.load(at, mask=m_token[:, None] & (2 * o_pair < D)[None, :], other=0.0).to(tl.float32)
    odd = tl.load(at + 1, mask=m_token[:, None] & (2 * o_pair + 1 < D)[None, :], other=0.0).to(tl.float32)
    return even, odd


@triton.jit
def store_pairs(p_x, o_token, m_token, s_token, even, odd, o_pair, D: tl.constexpr):
    at = p_x + o_token[:, None] * s_token + 2 * o_pair[None, :]
    tl.store(at, even.to(p_x.dtype.element_ty), mask=m_token[:, None] & (2 * o_pair < D)[None, :])
    tl.store(at + 1, odd.to(p_x.dtype.element_ty), mask=m_token[:, None] & (2 * o_pair + 1 < D)[None, :])


@triton.jit
def load_values(p_v, o_token, m_token, s_token, o_v, DV: tl.constexpr):
    at = p_v + o_token[:, None] * s_token + o_v[None, :]
    return tl.load(at, mask=m_token[:, None] & (o_v < DV)[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_state(p_s, o_pair, o_v, D: tl.constexpr, DV: tl.constexpr):
    """Rows of the four tiles [pairs, values] of a state at p_s."""
    m_v = (o_v < DV)[None, :]
    at = p_s + (2 * o_pair)[:, None] * DV + o_v[None, :]
    m_even, m_odd = (2 * o_pair < D)[:, None] & m_v, (2 * o_pair + 1 < D)[:, None] & m_v
    ue = tl.load(at, mask=m_even, other=0.0)
    uo = tl.load(at + DV, mask=m_odd, other=0.0)
    le = tl.load(at + D * DV, mask=m_even, other=0.0)
    lo = tl.load(at + (D + 1) * DV, mask=m_odd, other=0.0)
    return ue, uo, le, lo


@triton.jit
def load_tile(p_s, i, o_pair, o_v, D: tl.constexpr, DV: tl.constexpr):
    """The i-th of them, in the order of the features."""
    row = 2 * o_pair + i % 2
    at = p_s + (tl.where(i < 2, 0, D) + row)[:, None] * DV + o_v[None, :]
    return tl.load(at, mask=(row < D)[:, None] & (o_v < DV)[None, :], other=0.0)


@triton.jit
def store_state(p_s, ue, uo, le, lo, o_pair, o_v, D: tl.constexpr, DV: tl.constexpr):
    m_v = (o_v < DV)[None, :]
    at = p_s + (2 * o_pair)[:, None] * DV + o_v[None, :]
    m_even, m_odd = (2 * o_pair < D)[:, None] & m_v, (2 * o_pair + 1 < D)[:, None] & m_v
    tl.store(at, ue, mask=m_even)
    tl.store(at + DV, uo, mask=m_odd)
    tl.store(at + D * DV, le, mask=m_even)
    tl.store(at + (D + 1) * DV, lo, mask=m_odd)


@triton.jit
def load_sums(p_z, o_pair, D: tl.constexpr):
    """The four parts [pairs] of z."""
    m_even, m_odd = 2 * o_pair < D, 2 * o_pair + 1 < D
    at = p_z + 2 * o_pair
    return (
        tl.load(at, mask=m_even, other=0.0),
        tl.load(at + 1, mask=m_odd, other=0.0),
        tl.load(at + D, mask=m_even, other=0.0),
        tl.load(at + D + 1, mask=m_odd, other=0.0),
    )


@triton.jit
def store_sums(p_z, ue, uo, le, lo, o_pair, D: tl.constexpr):
    m_even, m_odd = 2 * o_pair < D, 2 * o_pair + 1 < D
    at = p_z + 2 * o_pair
    tl.store(at, ue, mask=m_even)
    tl.store(at + 1, uo, mask=m_odd)
    tl.store(at + D, le, mask=m_even)
    tl.store(at + D + 1, lo, mask=m_odd)


@triton.jit
def tile_of(i, ue, uo, le, lo):
    """The i-th of four tiles."""
    return tl.where(i < 2, tl.where(i == 0, ue, uo), tl.where(i == 2, le, lo))


@triton.jit
def add_to(i, x, ue, uo, le, lo):
    """The four tiles, with x added to the i-th."""
    ue, uo = tl.where(i == 0, ue + x, ue), tl.where(i == 1, uo + x, uo)
    return ue, uo, tl.where(i == 2, le + x, le), tl.where(i == 3, lo + x, lo)


@triton.jit
def add_sums(h_ue, h_uo, h_le, h_lo, w, ue, uo, le, lo, PRECISION: tl.constexpr, LOOP: tl.constexpr, four):
    """h + w phi, tile by tile."""
    if LOOP:
        for i in range(0, four):
            x = dot(w, tile_of(i, ue, uo, le, lo), tl.zeros_like(h_ue), PRECISION)
            h_ue, h_uo, h_le, h_lo = add_to(i, x, h_ue, h_uo, h_le, h_lo)
    else:
        h_ue = dot(w, ue, h_ue, PRECISION)
        h_uo = dot(w, uo, h_uo, PRECISION)
        h_le = dot(w, le, h_le, PRECISION)
        h_lo = dot(w, lo, h_lo, PRECISION)
    return h_ue, h_uo, h_le, h_lo


@triton.jit
def weights_of(
    q_ue, q_uo, q_le, q_lo, k_ue, k_uo, k_le, k_lo, BT: tl.constexpr, PRECISION: tl.constexpr, LOOP: tl.constexpr, four
):  # fmt: skip
    """phi_q phi_k^T [BT, BT]."""
    w = tl.zeros([BT, BT], tl.float32)
    if LOOP:
        for i in range(0, four):
            w = dot(tile_of(i, q_ue, q_uo, q_le, q_lo), tl.trans(tile_of(i, k_ue, k_uo, k_le, k_lo)), w, PRECISION)
    else:
        w = dot(q_ue, tl.trans(k_ue), w, PRECISION)
        w = dot(q_uo, tl.trans(k_uo), w, PRECISION)
        w = dot(q_le, tl.trans(k_le), w, PRECISION)
        w = dot(q_lo, tl.trans(k_lo), w, PRECISION)
    return w


@triton.jit
def through_state(
    p_s, h_ue, h_uo, h_le, h_lo, x, g_ue, g_uo, g_le, g_lo, made, o_pair, o_v, D: tl.constexpr, DV: tl.constexpr,
    BOTH: tl.constexpr, PRECISION: tl.constexpr, LOOP: tl.constexpr, four,
):  # fmt: skip
    """h + x S^T, and with BOTH made + g S, for columns o_v of the state at p_s."""
    if LOOP:
        for i in range(0, four):
            s = load_tile(p_s, i, o_pair, o_v, D, DV)
            y = dot(x, tl.trans(s), tl.zeros_like(h_ue), PRECISION)
            h_ue, h_uo, h_le, h_lo = add_to(i, y, h_ue, h_uo, h_le, h_lo)
            if BOTH:  # noqa: SIM102 (one is of the compiler's time)
                if always(i, four):
                    made = dot(tile_of(i, g_ue, g_uo, g_le, g_lo), s, made, PRECISION)
    else:
        s_ue, s_uo, s_le, s_lo = load_state(p_s, o_pair, o_v, D, DV)
        h_ue, h_uo, h_le, h_lo = add_sums(h_ue, h_uo, h_le, h_lo, x, tl.trans(s_ue), tl.trans(s_uo), tl.trans(s_le),
                                          tl.trans(s_lo), PRECISION, False, 4)  # fmt: skip
        if BOTH:
            made = dot(g_ue, s_ue, made, PRECISION)
            made = dot(g_uo, s_uo, made, PRECISION)
            made = dot(g_le, s_le, made, PRECISION)
            made = dot(g_lo, s_lo, made, PRECISION)
    return h_ue, h_uo, h_le, h_lo, made


@triton.jit
def meeting(w, key, query, CAUSAL: tl.constexpr):
    """w where the key is not after the query."""
    return tl.where(key <= query, w, 0.0) if CAUSAL else w
