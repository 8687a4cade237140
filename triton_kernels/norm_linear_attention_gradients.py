"""Gradients of norm_linear_attention's feature maps, for its Triton kernels. Formulas: csrc/norm_linear_attention.h."""

from __future__ import annotations

import triton
import triton.language as tl

from .norm_linear_attention import (
    COSINE,
    LN2,
    MALA,
    OPPOSITE,
    POLA,
    QUARTER,
    cos_sin,
    log2_or_0,
    norm_of,
    power,
    tanh_and_slope,
)
from .norm_linear_attention_mala import elu_gradient


@triton.jit
def magnitude_gradient(x, upper, lower):
    """What reaches the magnitude of a channel, by its sign."""
    return tl.where(x > 0, upper, tl.where(x < 0, lower, tl.where(x == 0, 0.0, x)))


@triton.jit
def angle_gradients(weight, u, upper, lower, alpha):
    """What reaches u and the weight of features weight (cos t(u), sin t(u)), whose gradients are upper and lower."""
    t, slope = tanh_and_slope(alpha * u)
    c, s = cos_sin(t * QUARTER)
    return weight * (lower * c - upper * s) * (alpha * QUARTER) * slope, upper * c + lower * s


@triton.jit
def query_gradient(
    even, odd, a, b, c, d_ue, d_uo, d_le, d_lo, alpha, norm_eps, MAP: tl.constexpr
):  # fmt: skip
    """(dq even, dq odd, and sums over the row for lam, tau and beta; pola: the powers' gradients of each channel)."""
    if MAP == MALA:
        dq_even, dq_odd = elu_gradient(even, odd, d_ue, d_uo)
        first, second, third = 0.0, 0.0, 0.0
    elif MAP >= POLA:
        if MAP == OPPOSITE:
            d_ue, d_le, d_uo, d_lo = d_le, d_ue, d_lo, d_uo
        e_even, e_odd = magnitude_gradient(even, d_ue, d_le), magnitude_gradient(odd, d_uo, d_lo)
        x_even, x_odd = tl.abs(even), tl.abs(odd)
        w_even, w_odd = e_even * power(x_even, a), e_odd * power(x_odd, b)
        dq_even = a * w_even / tl.where(even == 0, 1.0, even)
        dq_odd = b * w_odd / tl.where(odd == 0, 1.0, odd)
        first, second, third = w_even * log2_or_0(x_even) * LN2, w_odd * log2_or_0(x_odd) * LN2, 0.0
    else:
        r = norm_of(even, odd, norm_eps)
        t, flat = tanh_and_slope(c * r)
        p = a * (b + t)
        u_even, u_odd = even / r[:, None], odd / r[:, None]
        l_even, l_odd = log2_or_0(tl.abs(u_even)), log2_or_0(tl.abs(u_odd))
        w_even = tl.where(u_even == 0, 0.0, tl.exp2(p[:, None] * l_even))
        w_odd = tl.where(u_odd == 0, 0.0, tl.exp2(p[:, None] * l_odd))
        if MAP == COSINE:
            n_even, e_even = angle_gradients(w_even, u_even, d_ue, d_le, alpha)
            n_odd, e_odd = angle_gradients(w_odd, u_odd, d_uo, d_lo, alpha)
            along = tl.sum(u_even * n_even + u_odd * n_odd, axis=1)
        else:
            e_even, e_odd = magnitude_gradient(even, d_ue, d_le), magnitude_gradient(odd, d_uo, d_lo)
            n_even, n_odd = 0.0, 0.0
            along = 0.0 * r
        w_even, w_odd = e_even * w_even, e_odd * w_odd
        P = tl.sum(w_even * l_even + w_odd * l_odd, axis=1) * LN2
        T = tl.sum(w_even + w_odd, axis=1)
        # of the direction's length: p T / r^2 along q, and what the norm does to the exponent
        pull = P * (a * c * flat) - (p * T + along) / r
        dq_even = p[:, None] * w_even / tl.where(even == 0, 1.0, even) + pull[:, None] * u_even + n_even / r[:, None]
        dq_odd = p[:, None] * w_odd / tl.where(odd == 0, 1.0, odd) + pull[:, None] * u_odd + n_odd / r[:, None]
        first, second, third = P * (b + t), P * a, P * a * r * flat
    return dq_even, dq_odd, first, second, third


@triton.jit
def key_gradient(
    even, odd, a, b, d_ue, d_uo, d_le, d_lo, key_power, alpha, norm_eps, MAP: tl.constexpr, CUBE: tl.constexpr
):  # fmt: skip
    """(dk even, dk odd, the powers' gradients of each channel: pola)."""
    first, second = 0.0, 0.0
    x_even, x_odd = tl.abs(even), tl.abs(odd)
    if MAP == MALA:
        dk_even, dk_odd = elu_gradient(even, odd, d_ue, d_uo)
    elif MAP >= POLA:
        e_even, e_odd = magnitude_gradient(even, d_ue, d_le), magnitude_gradient(odd, d_uo, d_lo)
        w_even, w_odd = e_even * power(x_even, a), e_odd * power(x_odd, b)
        dk_even = a * w_even / tl.where(even == 0, 1.0, even)
        dk_odd = b * w_odd / tl.where(odd == 0, 1.0, odd)
        first, second = w_even * log2_or_0(x_even) * LN2, w_odd * log2_or_0(x_odd) * LN2
    else:
        if CUBE:
            slope_even, slope_odd = 3.0 * even * x_even, 3.0 * odd * x_odd
        else:
            slope_even = key_power * tl.exp2((key_power - 1.0) * log2_or_0(x_even))
            slope_odd = key_power * tl.exp2((key_power - 1.0) * log2_or_0(x_odd))
            slope_even = tl.where(even == 0, 0.0, tl.where(even < 0, -slope_even, slope_even))
            slope_odd = tl.where(odd == 0, 0.0, tl.where(odd < 0, -slope_odd, slope_odd))
        if MAP == COSINE:
            if CUBE:
                m_even, m_odd = tl.abs(even * even * even), tl.abs(odd * odd * odd)
            else:
                m_even, m_odd = power(x_even, key_power), power(x_odd, key_power)
            r = norm_of(even, odd, norm_eps)[:, None]
            u_even, u_odd = even / r, odd / r
            n_even, e_even = angle_gradients(m_even, u_even, d_ue, d_le, alpha)
            n_odd, e_odd = angle_gradients(m_odd, u_odd, d_uo, d_lo, alpha)
            along = tl.sum(u_even * n_even + u_odd * n_odd, axis=1)[:, None]
            dk_even = slope_even * e_even + (n_even - u_even * along) / r
            dk_odd = slope_odd * e_odd + (n_odd - u_odd * along) / r
        else:
            dk_even = slope_even * magnitude_gradient(even, d_ue, d_le)
            dk_odd = slope_odd * magnitude_gradient(odd, d_uo, d_lo)
    return dk_even, dk_odd, first, second
