"""norm_linear_attention in Triton, backward. Formulas: csrc/norm_linear_attention.h.

Algorithm. `grad_queries`, a tile of queries each, makes dq and leaves the denominator D and its gradient per token;
`grad_state` sums R phi_q y^T and phi_q dD over parts of a sequence, with y = g / D; `scan` adds the parts up, from the
last on in the causal form, where it leaves the gradient of the state after each part; `grad_keys`, a tile of keys
each, makes dk and dv. The causal form adds the tokens of the same part by their weights, as the forward pass does.
Nothing is read from the forward pass but the states; o is made again only for the gate's gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .norm_linear_attention import (
    MALA,
    POLA,
    SIZES,
    effective_eps,
    first_part,
    key_features,
    load_angles,
    load_params,
    locate,
    query_features,
    turn,
)
from .norm_linear_attention_gradients import key_gradient, query_gradient
from .norm_linear_attention_mala import first_pair, readout
from .norm_linear_attention_tiles import (
    add_sums,
    always,
    dot,
    four_of,
    load_pairs,
    load_sums,
    load_values,
    meeting,
    store_pairs,
    store_state,
    store_sums,
    through_state,
    weights_of,
    zero_of,
)


@triton.jit
def gated(p_grad, p_gate, o_token, m_token, s_grad, s_gate, o_v, DV: tl.constexpr, HAS_GATE: tl.constexpr):
    """The gradient of the output before the gate [tokens, values]."""
    g = load_values(p_grad, o_token, m_token, s_grad, o_v, DV)
    if HAS_GATE:
        gate = load_values(p_gate, o_token, m_token, s_gate, o_v, DV)
        g = g * gate / (1.0 + tl.exp(-gate))
    return g


@triton.jit(do_not_specialize=SIZES)
def grad_queries(
    p_q, p_k, p_v, p_gate, p_grad,  # as in forward; grad [B, N, Hq, DV]
    p_dq, p_dgate,  # as q and gate
    p_d, p_dd,  # [B N, Hq]: the denominator, and its gradient
    p_dparams,  # [tiles of all, Hq, 3], for pola [tiles of all, Hq, D], for MALA [B N, Hq]: the readout's last feature
    p_params, p_sin, p_cos, p_start, p_count, p_offsets, p_sequence, p_part, p_s, p_z,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_gb, s_gn, s_gh, s_ob, s_on, s_oh,  # o: grad's
    s_dqb, s_dqn, s_dqh, s_dgb, s_dgn, s_dgh,
    N, keys, tiles, parts, heads, group, key_power, alpha, eps, norm_eps,
    D: tl.constexpr, DV: tl.constexpr, HD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, PART: tl.constexpr,
    MAP: tl.constexpr, CUBE: tl.constexpr, ROPE: tl.constexpr, PACKED: tl.constexpr, HAS_START: tl.constexpr,
    HAS_COUNT: tl.constexpr, HAS_GATE: tl.constexpr, CAUSAL: tl.constexpr, ALONE: tl.constexpr, MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    LOOP: tl.constexpr = PRECISION != "bf16" or (CAUSAL and D > 64)
    four = four_of(heads)
    slot, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence, tile, batch, begin, length = locate(p_offsets, p_sequence, p_part, slot, tiles, N, PACKED)
    kv, kv_heads = head // group, heads // group
    o_pair = tl.arange(0, HD).to(tl.int64)
    token = tile * BT + tl.arange(0, BT)
    near = tl.arange(0, BT)
    m_token = token < length
    a, b, c = load_params(p_params, head, heads, o_pair, D, MAP)
    p_q += batch * s_qb + head * s_qh
    p_k += batch * s_kb + kv * s_kh
    p_v += batch * s_vb + kv * s_vh
    p_gate += batch * s_gb + head * s_gh
    p_grad += batch * s_ob + head * s_oh
    even, odd = load_pairs(p_q, begin + token, m_token, s_qn, o_pair, D)
    ue, uo, le, lo = query_features(even, odd, a, b, c, alpha, norm_eps, MAP)
    if ROPE == 2:
        sin, cos = load_angles(p_sin, p_cos, p_start, sequence, token, m_token, o_pair, D, HAS_START)
        ue, uo, le, lo = turn(ue, uo, le, lo, sin, cos)
    at = sequence
    if CAUSAL:
        at = first_part(p_offsets, sequence, parts, PART, PACKED) + tile * BT // PART
    if tile * BT < length:
        at = at * kv_heads + kv
        row = (batch * N + begin + token) * heads + head
        ka, kb, _ = load_params(p_params, kv, heads, o_pair, D, MAP)
        # keys that these queries meet by weights
        start = tile * BT // PART * PART if CAUSAL else 0
        stop = tile * BT + BT if CAUSAL else (keys if ALONE else 0)
        last_key = length if CAUSAL else keys
        if ALONE:
            d = tl.zeros([BT], tl.float32)
        else:
            x_ue, x_uo, x_le, x_lo = load_sums(p_z + at * (2 * D), o_pair, D)
            d = tl.sum(ue * x_ue[None, :] + uo * x_uo[None, :] + le * x_le[None, :] + lo * x_lo[None, :], axis=1)
        for other in range(start, stop, BT):
            key = other + tl.arange(0, BT)
            m_key = key < last_key
            k_even, k_odd = load_pairs(p_k, begin + key, m_key, s_kn, o_pair, D)
            k_ue, k_uo, k_le, k_lo = key_features(k_even, k_odd, ka, kb, key_power, alpha, norm_eps, MAP, CUBE)
            if ROPE == 2:
                sin, cos = load_angles(p_sin, p_cos, p_start, sequence, key, m_key, o_pair, D, HAS_START)
                k_ue, k_uo, k_le, k_lo = turn(k_ue, k_uo, k_le, k_lo, sin, cos)
            w = weights_of(ue, uo, le, lo, k_ue, k_uo, k_le, k_lo, BT, PRECISION, LOOP, four)
            there = near + (other - tile * BT).to(tl.int32)
            d += tl.sum(meeting(w, there[None, :], near[:, None], CAUSAL), axis=1)
        if MAP == MALA:
            count = effective_eps(p_count, sequence, token, length if PACKED else keys, 1.0, False, True, HAS_COUNT)
            factor, last, slope, scale = readout(d, count, eps, D)
            d = tl.full([BT], 1.0, tl.float32)
        else:
            d += effective_eps(p_count, sequence, token, length if PACKED else keys, eps, CAUSAL, MEAN, HAS_COUNT)
            d = tl.where(m_token, d, 1.0)
        g_ue, g_uo, g_le, g_lo = ue, uo, le, lo
        if ROPE == 1:
            sin, cos = load_angles(p_sin, p_cos, p_start, sequence, token, m_token, o_pair, D, HAS_START)
            g_ue, g_uo, g_le, g_lo = turn(ue, uo, le, lo, sin, cos)
        # the gradient of the rotated features
        h_ue, h_uo = tl.zeros([BT, HD], tl.float32), tl.zeros([BT, HD], tl.float32)
        h_le, h_lo = tl.zeros([BT, HD], tl.float32), tl.zeros([BT, HD], tl.float32)
        for first in range(0, DV, BV):
            o_v = first + tl.arange(0, BV)
            here = begin + token + (zero_of(first, four, 3) if LOOP else 0)
            y = gated(p_grad, p_gate, here, m_token, s_on, s_gn, o_v, DV, HAS_GATE) / d[:, None]
            o = tl.zeros([BT, BV], tl.float32)
            if not ALONE:
                h_ue, h_uo, h_le, h_lo, o = through_state(
                    p_s + at * (2 * D * DV), h_ue, h_uo, h_le, h_lo, y, g_ue, g_uo, g_le, g_lo, o, o_pair, o_v, D, DV,
                    HAS_GATE, PRECISION, LOOP, four,
                )  # fmt: skip
            for other in range(start, stop, BT):
                key = other + tl.arange(0, BT)
                m_key = key < last_key
                k_even, k_odd = load_pairs(p_k, begin + key, m_key, s_kn, o_pair, D)
                v = load_values(p_v, begin + key, m_key, s_vn, o_v, DV)
                k_ue, k_uo, k_le, k_lo = key_features(k_even, k_odd, ka, kb, key_power, alpha, norm_eps, MAP, CUBE)
                if ROPE > 0:
                    sin, cos = load_angles(p_sin, p_cos, p_start, sequence, key, m_key, o_pair, D, HAS_START)
                    k_ue, k_uo, k_le, k_lo = turn(k_ue, k_uo, k_le, k_lo, sin, cos)
                there = near + (other - tile * BT).to(tl.int32)
                w = tl.where(always(other, four), y, 0.0) if LOOP else y
                w = dot(w, tl.trans(v), tl.zeros([BT, BT], tl.float32), PRECISION)
                w = meeting(w, there[None, :], near[:, None], CAUSAL)
                h_ue, h_uo, h_le, h_lo = add_sums(
                    h_ue, h_uo, h_le, h_lo, w, k_ue, k_uo, k_le, k_lo, PRECISION, LOOP, four
                )
                if HAS_GATE:
                    w = weights_of(g_ue, g_uo, g_le, g_lo, k_ue, k_uo, k_le, k_lo, BT, PRECISION, LOOP, four)
                    if always(other, four) if LOOP else True:
                        v = load_values(p_v, begin + key, m_key, s_vn, o_v, DV)
                        o = dot(meeting(w, there[None, :], near[:, None], CAUSAL), v, o, PRECISION)
            if HAS_GATE:
                here = begin + token + (zero_of(first, four, 2) if LOOP else 0)
                gate = load_values(p_gate, here, m_token, s_gn, o_v, DV)
                sigmoid = 1.0 / (1.0 + tl.exp(-gate))
                g = load_values(p_grad, here, m_token, s_on, o_v, DV)
                dgate = g * (o / d[:, None]) * sigmoid * (1.0 + gate * (1.0 - sigmoid))
                m_o = m_token[:, None] & (o_v < DV)[None, :]
                at_o = p_dgate + batch * s_dgb + head * s_dgh + here[:, None] * s_dgn + o_v[None, :]
                tl.store(at_o, dgate.to(p_dgate.dtype.element_ty), mask=m_o)
        if LOOP:  # made again: held through the loops they are registers that those lack
            even, odd = load_pairs(p_q, begin + token, m_token, s_qn, o_pair, D)
            g_ue, g_uo, g_le, g_lo = query_features(even, odd, a, b, c, alpha, norm_eps, MAP)
            if ROPE > 0:
                sin, cos = load_angles(p_sin, p_cos, p_start, sequence, token, m_token, o_pair, D, HAS_START)
                g_ue, g_uo, g_le, g_lo = turn(g_ue, g_uo, g_le, g_lo, sin, cos)
        dd = -tl.sum(g_ue * h_ue + g_uo * h_uo + g_le * h_le + g_lo * h_lo, axis=1) / d
        if MAP == MALA:  # of phi_q . z; y = g / d is to be the gradient before the factor
            of_last = tl.sum(tl.where((o_pair == 0)[None, :], h_le, 0.0), axis=1)
            dd = -(dd * slope + of_last / count) * scale
            d = 1.0 / factor
            h_ue, h_uo = h_ue * factor[:, None], h_uo * factor[:, None]
            tl.store(p_dparams + row, last, mask=m_token)
        tl.store(p_d + row, d, mask=m_token)
        tl.store(p_dd + row, dd, mask=m_token)
        # What the denominator sends to phi_q: dD times phi_k summed up to each row, after the rotation is undone, if z
        # has none. Made in a pass of its own, so that no running sums are held meanwhile.
        if ROPE == 1:
            sin, cos = load_angles(p_sin, p_cos, p_start, sequence, token, m_token, o_pair, D, HAS_START)
            h_ue, h_uo, h_le, h_lo = turn(h_ue, h_uo, h_le, h_lo, -sin, cos)
        if not ALONE:
            x_ue, x_uo, x_le, x_lo = load_sums(p_z + at * (2 * D), o_pair, D)
            h_ue, h_uo = h_ue + dd[:, None] * x_ue[None, :], h_uo + dd[:, None] * x_uo[None, :]
            h_le, h_lo = h_le + dd[:, None] * x_le[None, :], h_lo + dd[:, None] * x_lo[None, :]
        for other in range(start, stop, BT):
            key = other + tl.arange(0, BT)
            m_key = key < last_key
            k_even, k_odd = load_pairs(p_k, begin + key, m_key, s_kn, o_pair, D)
            k_ue, k_uo, k_le, k_lo = key_features(k_even, k_odd, ka, kb, key_power, alpha, norm_eps, MAP, CUBE)
            if ROPE == 2:
                sin, cos = load_angles(p_sin, p_cos, p_start, sequence, key, m_key, o_pair, D, HAS_START)
                k_ue, k_uo, k_le, k_lo = turn(k_ue, k_uo, k_le, k_lo, sin, cos)
            there = near + (other - tile * BT).to(tl.int32)
            w = meeting(dd[:, None] + tl.zeros([BT, BT], tl.float32), there[None, :], near[:, None], CAUSAL)
            h_ue, h_uo, h_le, h_lo = add_sums(
                h_ue, h_uo, h_le, h_lo, w, k_ue, k_uo, k_le, k_lo, PRECISION, LOOP, four
            )
        if ROPE == 2:
            sin, cos = load_angles(p_sin, p_cos, p_start, sequence, token, m_token, o_pair, D, HAS_START)
            h_ue, h_uo, h_le, h_lo = turn(h_ue, h_uo, h_le, h_lo, -sin, cos)
        dq_even, dq_odd, x, y_, z = query_gradient(even, odd, a, b, c, h_ue, h_uo, h_le, h_lo, alpha, norm_eps, MAP)
        p_dq += batch * s_dqb + head * s_dqh
        store_pairs(p_dq, begin + token, m_token, s_dqn, dq_even, dq_odd, o_pair, D)
        if MAP >= POLA and MAP != MALA:
            p_dparams += (slot.to(tl.int64) * heads + head) * D
            tl.store(p_dparams + 2 * o_pair, tl.sum(x, axis=0), mask=2 * o_pair < D)
            tl.store(p_dparams + 2 * o_pair + 1, tl.sum(y_, axis=0), mask=2 * o_pair + 1 < D)
        elif MAP != MALA:
            p_dparams += (slot.to(tl.int64) * heads + head) * 3
            tl.store(p_dparams, tl.sum(tl.where(m_token, x, 0.0)))
            tl.store(p_dparams + 1, tl.sum(tl.where(m_token, y_, 0.0)))
            tl.store(p_dparams + 2, tl.sum(tl.where(m_token, z, 0.0)))


@triton.jit(do_not_specialize=SIZES)
def grad_state(
    p_q, p_gate, p_grad, p_d, p_dd, p_last,  # p_last: MALA's, as grad_queries left it
    p_s, p_z,  # [parts of all, Hq, 2 D, DV], [parts of all, Hq, 2 D]
    p_params, p_sin, p_cos, p_start, p_offsets, p_sequence, p_part,
    s_qb, s_qn, s_qh, s_gb, s_gn, s_gh, s_ob, s_on, s_oh, N, parts, heads, alpha, norm_eps,
    D: tl.constexpr, DV: tl.constexpr, HD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, PART: tl.constexpr,
    MAP: tl.constexpr, ROPE: tl.constexpr, PACKED: tl.constexpr, HAS_START: tl.constexpr, HAS_GATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over the queries of one part of a sequence."""
    slot, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence, part, batch, begin, length = locate(p_offsets, p_sequence, p_part, slot, parts, N, PACKED)
    o_pair, o_v = tl.arange(0, HD).to(tl.int64), tl.program_id(2).to(tl.int64) * BV + tl.arange(0, BV)
    a, b, c = load_params(p_params, head, heads, o_pair, D, MAP)
    p_q += batch * s_qb + head * s_qh
    p_gate += batch * s_gb + head * s_gh
    p_grad += batch * s_ob + head * s_oh
    s_ue, s_uo = tl.zeros([HD, BV], tl.float32), tl.zeros([HD, BV], tl.float32)
    s_le, s_lo = tl.zeros([HD, BV], tl.float32), tl.zeros([HD, BV], tl.float32)
    z_ue, z_uo = tl.zeros([HD], tl.float32), tl.zeros([HD], tl.float32)
    z_le, z_lo = tl.zeros([HD], tl.float32), tl.zeros([HD], tl.float32)
    first = part * PART
    last = tl.minimum(first + PART, length)
    for at in range(first, last, BT):
        token = at + tl.arange(0, BT)
        m_token = token < last
        row = (batch * N + begin + token) * heads + head
        even, odd = load_pairs(p_q, begin + token, m_token, s_qn, o_pair, D)
        ue, uo, le, lo = query_features(even, odd, a, b, c, alpha, norm_eps, MAP)
        if ROPE > 0:
            sin, cos = load_angles(p_sin, p_cos, p_start, sequence, token, m_token, o_pair, D, HAS_START)
            g_ue, g_uo, g_le, g_lo = turn(ue, uo, le, lo, sin, cos)
        else:
            g_ue, g_uo, g_le, g_lo = ue, uo, le, lo
        if ROPE == 2:
            ue, uo, le, lo = g_ue, g_uo, g_le, g_lo
        d = tl.load(p_d + row, mask=m_token, other=1.0)
        dd = tl.load(p_dd + row, mask=m_token, other=0.0)[:, None]
        if MAP == MALA:
            g_le = first_pair(tl.load(p_last + row, mask=m_token, other=0.0) * d, o_pair)
        y = gated(p_grad, p_gate, begin + token, m_token, s_on, s_gn, o_v, DV, HAS_GATE) / d[:, None]
        s_ue = dot(tl.trans(g_ue), y, s_ue, PRECISION)
        s_uo = dot(tl.trans(g_uo), y, s_uo, PRECISION)
        s_le = dot(tl.trans(g_le), y, s_le, PRECISION)
        s_lo = dot(tl.trans(g_lo), y, s_lo, PRECISION)
        z_ue += tl.sum(dd * ue, axis=0)
        z_uo += tl.sum(dd * uo, axis=0)
        z_le += tl.sum(dd * le, axis=0)
        z_lo += tl.sum(dd * lo, axis=0)
    at = slot.to(tl.int64) * heads + head
    if first < length:
        store_state(p_s + at * (2 * D * DV), s_ue, s_uo, s_le, s_lo, o_pair, o_v, D, DV)
        if tl.program_id(2) == 0:
            store_sums(p_z + at * (2 * D), z_ue, z_uo, z_le, z_lo, o_pair, D)


@triton.jit(do_not_specialize=SIZES)
def grad_keys(
    p_q, p_k, p_v, p_gate, p_grad, p_d, p_dd,
    p_ds, p_dz,  # gradients of the states after the tile's part: [sequences or parts, Hk, 2 D, DV], [.., 2 D]
    p_dk, p_dv,  # as k and v
    p_dparams,  # pola: [tiles of all, Hk, D]
    p_params, p_sin, p_cos, p_start, p_offsets, p_sequence, p_part,
    s_qb, s_qn, s_qh, s_kb, s_kn, s_kh, s_vb, s_vn, s_vh, s_gb, s_gn, s_gh, s_ob, s_on, s_oh,  # o: grad's
    s_dkb, s_dkn, s_dkh, s_dvb, s_dvn, s_dvh,
    N, queries, tiles, parts, heads, group, key_power, alpha, norm_eps,
    D: tl.constexpr, DV: tl.constexpr, HD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, PART: tl.constexpr,
    MAP: tl.constexpr, CUBE: tl.constexpr, ROPE: tl.constexpr, PACKED: tl.constexpr, HAS_START: tl.constexpr,
    HAS_GATE: tl.constexpr, CAUSAL: tl.constexpr, ALONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    LOOP: tl.constexpr = PRECISION != "bf16"
    four = four_of(heads)
    slot, kv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence, tile, batch, begin, length = locate(p_offsets, p_sequence, p_part, slot, tiles, N, PACKED)
    kv_heads = heads // group
    o_pair = tl.arange(0, HD).to(tl.int64)
    token = tile * BT + tl.arange(0, BT)
    m_token = token < length
    a, b, _ = load_params(p_params, kv, heads, o_pair, D, MAP)
    p_k += batch * s_kb + kv * s_kh
    p_v += batch * s_vb + kv * s_vh
    even, odd = load_pairs(p_k, begin + token, m_token, s_kn, o_pair, D)
    g_ue, g_uo, g_le, g_lo = key_features(even, odd, a, b, key_power, alpha, norm_eps, MAP, CUBE)
    if ROPE > 0:
        sin, cos = load_angles(p_sin, p_cos, p_start, sequence, token, m_token, o_pair, D, HAS_START)
        g_ue, g_uo, g_le, g_lo = turn(g_ue, g_uo, g_le, g_lo, sin, cos)
    if MAP == MALA:
        g_le = first_pair(m_token.to(tl.float32), o_pair)
    at = sequence
    if CAUSAL:
        at = first_part(p_offsets, sequence, parts, PART, PACKED) + tile * BT // PART
    if tile * BT < length:
        at = at * kv_heads + kv
        # queries that meet these keys by weights
        start = tile * BT if CAUSAL else 0
        stop = tl.minimum((tile * BT // PART + 1) * PART, length) if CAUSAL else queries
        last_query = length if CAUSAL else queries
        h_ue, h_uo = tl.zeros([BT, HD], tl.float32), tl.zeros([BT, HD], tl.float32)
        h_le, h_lo = tl.zeros([BT, HD], tl.float32), tl.zeros([BT, HD], tl.float32)
        for first in range(0, DV, BV):
            o_v = first + tl.arange(0, BV)
            v = load_values(p_v, begin + token, m_token, s_vn, o_v, DV)
            dv = tl.zeros([BT, BV], tl.float32)
            if not ALONE:
                h_ue, h_uo, h_le, h_lo, dv = through_state(
                    p_ds + at * (2 * D * DV), h_ue, h_uo, h_le, h_lo, v, g_ue, g_uo, g_le, g_lo, dv, o_pair, o_v, D,
                    DV, True, PRECISION, LOOP, four,
                )  # fmt: skip
            if CAUSAL or ALONE:
                for member in range(0, group):
                    head = kv * group + member
                    qa, qb, qc = load_params(p_params, head, heads, o_pair, D, MAP)
                    for other in range(start, stop, BT):
                        query = other + tl.arange(0, BT)
                        m_query = query < last_query
                        q_row = ((batch * queries + begin + query) * kv_heads + kv) * group + member
                        q_even, q_odd = load_pairs(
                            p_q + batch * s_qb + head * s_qh, begin + query, m_query, s_qn, o_pair, D
                        )
                        ue, uo, le, lo = query_features(q_even, q_odd, qa, qb, qc, alpha, norm_eps, MAP)
                        if ROPE > 0:
                            sin, cos = load_angles(
                                p_sin, p_cos, p_start, sequence, query, m_query, o_pair, D, HAS_START
                            )
                            ue, uo, le, lo = turn(ue, uo, le, lo, sin, cos)
                        w = weights_of(g_ue, g_uo, g_le, g_lo, ue, uo, le, lo, BT, PRECISION, LOOP, four)
                        d = tl.load(p_d + q_row, mask=m_query, other=1.0)
                        y = gated(
                            p_grad + batch * s_ob + head * s_oh, p_gate + batch * s_gb + head * s_gh, begin + query,
                            m_query, s_on, s_gn, o_v, DV, HAS_GATE,
                        ) / d[:, None]  # fmt: skip
                        dv = dot(meeting(w, token[:, None], query[None, :], CAUSAL), y, dv, PRECISION)
                        if always(other, four) if LOOP else True:
                            w = dot(v, tl.trans(y), tl.zeros([BT, BT], tl.float32), PRECISION)
                            w = meeting(w, token[:, None], query[None, :], CAUSAL)
                            h_ue, h_uo, h_le, h_lo = add_sums(
                                h_ue, h_uo, h_le, h_lo, w, ue, uo, le, lo, PRECISION, LOOP, four
                            )
            m_v = m_token[:, None] & (o_v < DV)[None, :]
            at_v = p_dv + batch * s_dvb + kv * s_dvh + (begin + token)[:, None] * s_dvn + o_v[None, :]
            tl.store(at_v, dv.to(p_dv.dtype.element_ty), mask=m_v)
        # What denominators send to phi_k, as in grad_queries.
        if ROPE == 1:
            sin, cos = load_angles(p_sin, p_cos, p_start, sequence, token, m_token, o_pair, D, HAS_START)
            h_ue, h_uo, h_le, h_lo = turn(h_ue, h_uo, h_le, h_lo, -sin, cos)
        if not ALONE:
            x_ue, x_uo, x_le, x_lo = load_sums(p_dz + at * (2 * D), o_pair, D)
            h_ue, h_uo = h_ue + x_ue[None, :], h_uo + x_uo[None, :]
            h_le, h_lo = h_le + x_le[None, :], h_lo + x_lo[None, :]
        if CAUSAL or ALONE:
            for member in range(0, group):
                head = kv * group + member
                qa, qb, qc = load_params(p_params, head, heads, o_pair, D, MAP)
                for other in range(start, stop, BT):
                    query = other + tl.arange(0, BT)
                    m_query = query < last_query
                    q_row = ((batch * queries + begin + query) * kv_heads + kv) * group + member
                    q_even, q_odd = load_pairs(
                        p_q + batch * s_qb + head * s_qh, begin + query, m_query, s_qn, o_pair, D
                    )
                    ue, uo, le, lo = query_features(q_even, q_odd, qa, qb, qc, alpha, norm_eps, MAP)
                    if ROPE == 2:
                        sin, cos = load_angles(p_sin, p_cos, p_start, sequence, query, m_query, o_pair, D, HAS_START)
                        ue, uo, le, lo = turn(ue, uo, le, lo, sin, cos)
                    dd = tl.load(p_dd + q_row, mask=m_query, other=0.0)[None, :]
                    w = meeting(dd + tl.zeros([BT, BT], tl.float32), token[:, None], query[None, :], CAUSAL)
                    h_ue, h_uo, h_le, h_lo = add_sums(
                        h_ue, h_uo, h_le, h_lo, w, ue, uo, le, lo, PRECISION, LOOP, four
                    )
        if ROPE == 2:
            sin, cos = load_angles(p_sin, p_cos, p_start, sequence, token, m_token, o_pair, D, HAS_START)
            h_ue, h_uo, h_le, h_lo = turn(h_ue, h_uo, h_le, h_lo, -sin, cos)
        if LOOP:  # read again, likewise
            even, odd = load_pairs(p_k, begin + token, m_token, s_kn, o_pair, D)
        dk_even, dk_odd, x, y_ = key_gradient(
            even, odd, a, b, h_ue, h_uo, h_le, h_lo, key_power, alpha, norm_eps, MAP, CUBE
        )
        p_dk += batch * s_dkb + kv * s_dkh
        store_pairs(p_dk, begin + token, m_token, s_dkn, dk_even, dk_odd, o_pair, D)
        if MAP >= POLA and MAP != MALA:
            p_dparams += (slot.to(tl.int64) * kv_heads + kv) * D
            tl.store(p_dparams + 2 * o_pair, tl.sum(x, axis=0), mask=2 * o_pair < D)
            tl.store(p_dparams + 2 * o_pair + 1, tl.sum(y_, axis=0), mask=2 * o_pair + 1 < D)
