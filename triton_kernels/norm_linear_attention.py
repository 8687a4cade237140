"""norm_linear_attention in Triton: features, states, forward. Formulas and layouts: csrc/norm_linear_attention.h.

Algorithm. Features never reach memory: every kernel makes them from q or k in registers. A feature vector is four tiles
of half the head's width, the even and the odd channels of its two halves, so that RoPE is elementwise; nothing is
concatenated. `state` sums phi_k v^T over the tokens of a part of a sequence, `scan` adds parts up in their order, and
`forward` reads the sum. In the causal form a part is 128 tokens, `scan` leaves the state before each part, and
`forward` adds the tokens of the part up to its own by their weights: no state is carried in registers, and the grid has
one program for each tile of tokens. Sums are float32, addresses int64; token counts are runtime values.

ALONE: short sequences without states, whose tiles meet all tokens by weights (the quadratic order).

Products. PRECISION "bf16": operands rounded to bfloat16 (bfloat16 inputs); "tf32x3": float32 as three products, also
for float16 inputs: cubes of their keys leave its range.

Bytes moved: q, k, v read once, o written once; states of 4 R dv bytes per part, causal one per 128 tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .norm_linear_attention_mala import elu_features, first_pair, readout
from .norm_linear_attention_tiles import (
    dot,
    four_of,
    load_pairs,
    load_state,
    load_sums,
    load_tile,
    load_values,
    meeting,
    store_state,
    store_sums,
    tile_of,
    weights_of,
)

# (operand bits, width of the head up to) -> (tokens of a tile, columns of the values at a time), of the forward pass
# and of the backward pass; 8 warps. Chosen by compiling for sm_80, sm_90 and sm_100, where no request of
# tests/norm_linear_attention_budget.py spills; not yet measured on a GPU.
NORM_LINEAR_ATTENTION_CONFIGS = {
    (16, 32): ((32, 32), (16, 32)),
    (16, 64): ((32, 64), (16, 32)),
    (16, 128): ((16, 64), (16, 32)),
    (32, 32): ((16, 32), (16, 32)),
    (32, 64): ((16, 32), (16, 32)),
    (32, 128): ((16, 32), (16, 32)),
}
WARPS = 8
REGISTERS = 255  # at most, of float32 `forward` and `grad_queries`, and of causal `grad_keys`
SCAN_BLOCK = 1024
SIZES = (
    "N", "keys", "queries", "parts", "tiles", "first_tile", "group", "width", "key_power", "alpha", "eps", "norm_eps",
)  # fmt: skip
QUARTER = tl.constexpr(0.7853981633974483)
LN2 = tl.constexpr(0.6931471805599453)
COSINE = tl.constexpr(1)
POLA = tl.constexpr(2)
OPPOSITE = tl.constexpr(3)
MALA = tl.constexpr(4)


@triton.jit
def log2_or_0(a):
    return tl.log2(tl.where(a == 0, 1.0, a))


@triton.jit
def power(a, exponent):
    """a^exponent, 0 for a = 0; NaN stays NaN."""
    return tl.where(a == 0, 0.0, tl.exp2(exponent * log2_or_0(a)))


@triton.jit
def tanh_and_slope(x):
    """tanh x and 1 - tanh^2 x, without cancellation."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def cos_sin(x):
    """For |x| <= pi/4, where tl.cos would bring the stack of its reduction of large arguments."""
    y = x * x
    c = 1.0 + y * (-0.5 + y * (4.16666667e-2 + y * (-1.38888889e-3 + y * (2.48015873e-5 - 2.75573192e-7 * y))))
    s = x * (1.0 + y * (-1.66666667e-1 + y * (8.33333333e-3 + y * (-1.98412698e-4 + 2.75573192e-6 * y))))
    return c, s


@triton.jit
def by_sign(x, w):
    return tl.where(x <= 0, 0.0, w), tl.where(x >= 0, 0.0, w)


@triton.jit
def norm_of(even, odd, norm_eps):
    square = tl.sum(even * even + odd * odd, axis=1) + norm_eps * norm_eps
    return tl.sqrt(tl.where(square == 0, 1.0, square))


@triton.jit
def load_params(p_params, head, heads, o_pair, D: tl.constexpr, MAP: tl.constexpr):
    """lam, tau, beta; or the powers of the even and the odd channels, and 0; or zeros."""
    if MAP == MALA:
        a, b, c = 0.0, 0.0, 0.0
    elif MAP >= POLA:
        at = p_params + head * D + 2 * o_pair
        a = tl.load(at, mask=2 * o_pair < D, other=1.0)[None, :]
        b = tl.load(at + 1, mask=2 * o_pair + 1 < D, other=1.0)[None, :]
        c = 0.0
    else:
        a = tl.load(p_params + head)
        b = tl.load(p_params + heads + head)
        c = tl.load(p_params + heads + heads + head)
    return a, b, c


@triton.jit
def query_features(even, odd, a, b, c, alpha, norm_eps, MAP: tl.constexpr):
    """phi_q as four tiles: even and odd channels of the upper half, then of the lower."""
    if MAP == MALA:
        ue, uo, le, lo = elu_features(even, odd)
    elif MAP >= POLA:
        ue, le = by_sign(even, power(tl.abs(even), a))
        uo, lo = by_sign(odd, power(tl.abs(odd), b))
        if MAP == OPPOSITE:
            ue, le, uo, lo = le, ue, lo, uo
    else:
        r = norm_of(even, odd, norm_eps)
        t, _ = tanh_and_slope(c * r)
        p = (a * (b + t))[:, None]
        we, wo = power(tl.abs(even) / r[:, None], p), power(tl.abs(odd) / r[:, None], p)
        if MAP == COSINE:
            te, _ = tanh_and_slope(alpha * (even / r[:, None]))
            to, _ = tanh_and_slope(alpha * (odd / r[:, None]))
            ce, se = cos_sin(te * QUARTER)
            co, so = cos_sin(to * QUARTER)
            ue, uo, le, lo = we * ce, wo * co, we * se, wo * so
        else:
            ue, le = by_sign(even, we)
            uo, lo = by_sign(odd, wo)
    return ue, uo, le, lo


@triton.jit
def key_features(even, odd, a, b, key_power, alpha, norm_eps, MAP: tl.constexpr, CUBE: tl.constexpr):
    """phi_k, likewise; MALA's without its 1."""
    if MAP == MALA:
        ue, uo, le, lo = elu_features(even, odd)
    elif MAP >= POLA:
        ue, le = by_sign(even, power(tl.abs(even), a))
        uo, lo = by_sign(odd, power(tl.abs(odd), b))
    else:
        if CUBE:
            we, wo = tl.abs(even * even * even), tl.abs(odd * odd * odd)
        else:
            we, wo = power(tl.abs(even), key_power), power(tl.abs(odd), key_power)
        if MAP == COSINE:
            r = norm_of(even, odd, norm_eps)
            te, _ = tanh_and_slope(alpha * (even / r[:, None]))
            to, _ = tanh_and_slope(alpha * (odd / r[:, None]))
            ce, se = cos_sin(te * QUARTER)
            co, so = cos_sin(to * QUARTER)
            ue, uo, le, lo = we * ce, wo * co, we * se, wo * so
        else:
            ue, le = by_sign(even, we)
            uo, lo = by_sign(odd, wo)
    return ue, uo, le, lo


@triton.jit
def load_angles(p_sin, p_cos, p_start, sequence, token, m_token, o_pair, D: tl.constexpr, HAS_START: tl.constexpr):
    """sin, cos [tokens, pairs] of the tokens' positions."""
    at = token.to(tl.int64)
    if HAS_START:
        at += tl.load(p_start + sequence)
    o_at = at[:, None] * (D // 2) + o_pair[None, :]
    mask = m_token[:, None] & (o_pair < D // 2)[None, :]
    return tl.load(p_sin + o_at, mask=mask, other=0.0), tl.load(p_cos + o_at, mask=mask, other=1.0)


@triton.jit
def turn(ue, uo, le, lo, s, c):
    return ue * c - uo * s, uo * c + ue * s, le * c - lo * s, lo * c + le * s


@triton.jit
def locate(p_offsets, p_sequence, p_part, program, parts, N, PACKED: tl.constexpr):
    """(sequence, its part, batch, its first token, its tokens) of a program over parts or tiles of sequences."""
    if PACKED:
        sequence = tl.load(p_sequence + program)
        part = tl.load(p_part + program)
        begin = tl.load(p_offsets + sequence)
        length = tl.load(p_offsets + sequence + 1) - begin
        batch = sequence * 0
    else:
        sequence = (program // parts).to(tl.int64)
        part = (program % parts).to(tl.int64)
        begin = sequence * 0
        length = begin + N
        batch = sequence
    return sequence, part, batch, begin, length


@triton.jit
def first_part(p_offsets, sequence, parts, CHUNK_: tl.constexpr, PACKED: tl.constexpr):
    """Place of a sequence's first part among all."""
    return tl.load(p_offsets + sequence) // CHUNK_ + sequence if PACKED else sequence * parts


@triton.jit(do_not_specialize=SIZES)
def state(
    p_k, p_v,  # [B, N, Hk, D], [B, N, Hk, DV]
    p_params, p_sin, p_cos, p_start, p_offsets, p_sequence, p_part,
    p_s, p_z,  # [parts of all, Hk, 2 D, DV], [parts of all, Hk, 2 D]
    s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, N, parts, heads, key_power, alpha, norm_eps,
    D: tl.constexpr, DV: tl.constexpr, HD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, PART: tl.constexpr,
    MAP: tl.constexpr, CUBE: tl.constexpr, ROPE: tl.constexpr, PACKED: tl.constexpr, HAS_START: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over the tokens of one part. ROPE: 0 none, 1 in S, 2 in S and z."""
    slot, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence, part, batch, begin, length = locate(p_offsets, p_sequence, p_part, slot, parts, N, PACKED)
    o_pair, o_v = tl.arange(0, HD).to(tl.int64), tl.program_id(2).to(tl.int64) * BV + tl.arange(0, BV)
    a, b, _ = load_params(p_params, head, heads, o_pair, D, MAP)
    p_k += batch * s_kb + head * s_kh
    p_v += batch * s_vb + head * s_vh
    s_ue, s_uo = tl.zeros([HD, BV], tl.float32), tl.zeros([HD, BV], tl.float32)
    s_le, s_lo = tl.zeros([HD, BV], tl.float32), tl.zeros([HD, BV], tl.float32)
    z_ue, z_uo = tl.zeros([HD], tl.float32), tl.zeros([HD], tl.float32)
    z_le, z_lo = tl.zeros([HD], tl.float32), tl.zeros([HD], tl.float32)
    first = part * PART
    last = tl.minimum(first + PART, length)
    for at in range(first, last, BT):
        token = at + tl.arange(0, BT)
        m_token = token < last
        even, odd = load_pairs(p_k, begin + token, m_token, s_kn, o_pair, D)
        v = load_values(p_v, begin + token, m_token, s_vn, o_v, DV)
        ue, uo, le, lo = key_features(even, odd, a, b, key_power, alpha, norm_eps, MAP, CUBE)
        if ROPE > 0:
            s, c = load_angles(p_sin, p_cos, p_start, sequence, token, m_token, o_pair, D, HAS_START)
            g_ue, g_uo, g_le, g_lo = turn(ue, uo, le, lo, s, c)
        else:
            g_ue, g_uo, g_le, g_lo = ue, uo, le, lo
        if ROPE == 2:
            ue, uo, le, lo = g_ue, g_uo, g_le, g_lo
        if MAP == MALA:  # rows without a token are not 0
            ue, uo = tl.where(m_token[:, None], ue, 0.0), tl.where(m_token[:, None], uo, 0.0)
            g_le = first_pair(m_token.to(tl.float32), o_pair)
        s_ue = dot(tl.trans(g_ue), v, s_ue, PRECISION)
        s_uo = dot(tl.trans(g_uo), v, s_uo, PRECISION)
        s_le = dot(tl.trans(g_le), v, s_le, PRECISION)
        s_lo = dot(tl.trans(g_lo), v, s_lo, PRECISION)
        z_ue += tl.sum(ue, axis=0)
        z_uo += tl.sum(uo, axis=0)
        z_le += tl.sum(le, axis=0)
        z_lo += tl.sum(lo, axis=0)
    at = slot.to(tl.int64) * heads + head
    if first < length:
        store_state(p_s + at * (2 * D * DV), s_ue, s_uo, s_le, s_lo, o_pair, o_v, D, DV)
        if tl.program_id(2) == 0:
            store_sums(p_z + at * (2 * D), z_ue, z_uo, z_le, z_lo, o_pair, D)


@triton.jit(do_not_specialize=SIZES)
def scan(
    p_x,  # [parts of all, heads, width]: sums of each part; with EXCLUSIVE replaced by the sum before it
    p_initial, p_final,  # [sequences, heads, width]
    p_offsets, N, parts, heads, width,
    PART: tl.constexpr, EXCLUSIVE: tl.constexpr, REVERSE: tl.constexpr, HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the parts of a sequence in their order, or from the last on."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length = sequence * 0 + N
    if PACKED:
        length = tl.load(p_offsets + sequence + 1) - tl.load(p_offsets + sequence)
    first = first_part(p_offsets, sequence, parts, PART, PACKED)
    count = (length + PART - 1) // PART
    o = tl.program_id(2).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < width
    total = tl.zeros([BLOCK], tl.float32)
    at_end = (sequence * heads + head) * width + o
    if HAS_INITIAL:
        total += tl.load(p_initial + at_end, mask=mask, other=0.0)
    for i in range(0, count):
        part = count - 1 - i if REVERSE else i
        at = p_x + ((first + part) * heads + head) * width + o
        x = tl.load(at, mask=mask, other=0.0)
        if EXCLUSIVE:
            tl.store(at, total, mask=mask)
        total += x
    tl.store(p_final + at_end, total, mask=mask)


@triton.jit
def effective_eps(
    p_count, sequence, token, length, eps, CAUSAL: tl.constexpr, MEAN: tl.constexpr, HAS_COUNT: tl.constexpr
):  # fmt: skip
    """eps times the tokens in z, per row."""
    e = tl.zeros_like(token).to(tl.float32) + eps
    if MEAN:
        tokens = token + 1 if CAUSAL else tl.zeros_like(token) + length
        if HAS_COUNT:
            tokens += tl.load(p_count + sequence)
        e = eps * tokens.to(tl.float32)
    return e


@triton.jit(do_not_specialize=SIZES)
def forward(
    p_q, p_k, p_v, p_gate, p_o,  # [B, N, Hq, D], [B, M, Hk, D], [B, M, Hk, DV], [B, N, Hq, DV], and alike
    p_params, p_sin, p_cos, p_start, p_count, p_offsets, p_sequence, p_part,
    p_s, p_z,  # states that a tile starts from: [sequences or parts, Hk, 2 D, DV] and [.., 2 D]
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_gb, s_gn, s_gh, s_ob, s_on, s_oh,
    N, keys, tiles, parts, heads, group, key_power, alpha, eps, norm_eps,
    D: tl.constexpr, DV: tl.constexpr, HD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, PART: tl.constexpr,
    MAP: tl.constexpr, CUBE: tl.constexpr, ROPE: tl.constexpr, PACKED: tl.constexpr, HAS_START: tl.constexpr,
    HAS_COUNT: tl.constexpr, HAS_GATE: tl.constexpr, CAUSAL: tl.constexpr, ALONE: tl.constexpr, MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o of a tile of tokens of one head, BV columns."""
    LOOP: tl.constexpr = PRECISION != "bf16"
    four = four_of(heads)
    head = tl.program_id(1).to(tl.int64)
    sequence, tile, batch, begin, length = locate(p_offsets, p_sequence, p_part, tl.program_id(0), tiles, N, PACKED)
    kv, kv_heads = head // group, heads // group
    o_pair, o_v = tl.arange(0, HD).to(tl.int64), tl.program_id(2).to(tl.int64) * BV + tl.arange(0, BV)
    token = tile * BT + tl.arange(0, BT)
    m_token = token < length
    a, b, c = load_params(p_params, head, heads, o_pair, D, MAP)
    even, odd = load_pairs(p_q + batch * s_qb + head * s_qh, begin + token, m_token, s_qn, o_pair, D)
    ue, uo, le, lo = query_features(even, odd, a, b, c, alpha, norm_eps, MAP)
    g_ue, g_uo, g_le, g_lo = ue, uo, le, lo
    if ROPE > 0:
        sin, cos = load_angles(p_sin, p_cos, p_start, sequence, token, m_token, o_pair, D, HAS_START)
        g_ue, g_uo, g_le, g_lo = turn(ue, uo, le, lo, sin, cos)
    if ROPE == 2:
        ue, uo, le, lo = g_ue, g_uo, g_le, g_lo
    at = sequence
    if CAUSAL:
        at = first_part(p_offsets, sequence, parts, PART, PACKED) + tile * BT // PART
    if tile * BT < length:
        o = tl.zeros([BT, BV], tl.float32)
        if ALONE:
            d = tl.zeros([BT], tl.float32)
        else:
            at = at * kv_heads + kv
            z_ue, z_uo, z_le, z_lo = load_sums(p_z + at * (2 * D), o_pair, D)
            d = tl.sum(ue * z_ue[None, :] + uo * z_uo[None, :] + le * z_le[None, :] + lo * z_lo[None, :], axis=1)
            if MAP == MALA:
                count = effective_eps(p_count, sequence, token, length if PACKED else keys, 1.0, False, True, HAS_COUNT)
                factor, last, _, _ = readout(d, count, eps, D)
                g_ue, g_uo, g_le = g_ue * factor[:, None], g_uo * factor[:, None], first_pair(last, o_pair)
            if LOOP:
                for i in range(0, four):
                    s = load_tile(p_s + at * (2 * D * DV), i, o_pair, o_v, D, DV)
                    o = dot(tile_of(i, g_ue, g_uo, g_le, g_lo), s, o, PRECISION)
            else:
                s_ue, s_uo, s_le, s_lo = load_state(p_s + at * (2 * D * DV), o_pair, o_v, D, DV)
                o = dot(g_ue, s_ue, o, PRECISION)
                o = dot(g_uo, s_uo, o, PRECISION)
                o = dot(g_le, s_le, o, PRECISION)
                o = dot(g_lo, s_lo, o, PRECISION)
        if CAUSAL or ALONE:
            p_k += batch * s_kb + kv * s_kh
            p_v += batch * s_vb + kv * s_vh
            ka, kb, _ = load_params(p_params, kv, heads, o_pair, D, MAP)
            last_key = length if CAUSAL else keys
            for other in range(tile * BT // PART * PART, tile * BT + BT if CAUSAL else keys, BT):
                key = other + tl.arange(0, BT)
                m_key = key < last_key
                even, odd = load_pairs(p_k, begin + key, m_key, s_kn, o_pair, D)
                v = load_values(p_v, begin + key, m_key, s_vn, o_v, DV)
                k_ue, k_uo, k_le, k_lo = key_features(even, odd, ka, kb, key_power, alpha, norm_eps, MAP, CUBE)
                if ROPE == 1:  # the weights of the denominator are others
                    w = weights_of(ue, uo, le, lo, k_ue, k_uo, k_le, k_lo, BT, PRECISION, LOOP, four)
                    d += tl.sum(meeting(w, key[None, :], token[:, None], CAUSAL), axis=1)
                if ROPE > 0:
                    sin, cos = load_angles(p_sin, p_cos, p_start, sequence, key, m_key, o_pair, D, HAS_START)
                    k_ue, k_uo, k_le, k_lo = turn(k_ue, k_uo, k_le, k_lo, sin, cos)
                w = weights_of(g_ue, g_uo, g_le, g_lo, k_ue, k_uo, k_le, k_lo, BT, PRECISION, LOOP, four)
                w = meeting(w, key[None, :], token[:, None], CAUSAL)
                if ROPE != 1:
                    d += tl.sum(w, axis=1)
                o = dot(w, v, o, PRECISION)
        if MAP != MALA:
            d += effective_eps(p_count, sequence, token, length if PACKED else keys, eps, CAUSAL, MEAN, HAS_COUNT)
            o = o / d[:, None]
        m_o = m_token[:, None] & (o_v < DV)[None, :]
        if HAS_GATE:
            gate = load_values(p_gate + batch * s_gb + head * s_gh, begin + token, m_token, s_gn, o_v, DV)
            o = o * gate / (1.0 + tl.exp(-gate))
        p_o += batch * s_ob + head * s_oh
        tl.store(p_o + (begin + token)[:, None] * s_on + o_v[None, :], o.to(p_o.dtype.element_ty), mask=m_o)
