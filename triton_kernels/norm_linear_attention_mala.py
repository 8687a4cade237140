"""MALA's map and readout for norm_linear_attention's Triton kernels. Formulas: csrc/norm_linear_attention.h.

The upper half of a feature vector is elu + 1. The first channel of the lower half is 1 for a key, so that the state's
row D sums the values, and for a query what the readout takes of that row: o = S^T [c R phi_q; last].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def elu_and_slope(x):
    """elu(x) + 1 and its slope; a NaN in both."""
    e = tl.exp(tl.where(x > 0, 0.0, x))
    return tl.where(x > 0, x + 1.0, e), e


@triton.jit
def elu_features(even, odd):
    ue, _ = elu_and_slope(even)
    uo, _ = elu_and_slope(odd)
    return ue, uo, tl.zeros_like(ue), tl.zeros_like(uo)


@triton.jit
def elu_gradient(even, odd, d_ue, d_uo):
    _, slope_even = elu_and_slope(even)
    _, slope_odd = elu_and_slope(odd)
    return d_ue * slope_even, d_uo * slope_odd


@triton.jit
def first_pair(x, o_pair):
    """x [tokens] in the first channel of [tokens, pairs], zeros elsewhere."""
    return tl.where((o_pair == 0)[None, :], x[:, None], 0.0)


@triton.jit
def readout(z, tokens, eps, D: tl.constexpr):
    """(c, last, slope of c, 1 / (sqrt(D) tokens)) of rows with phi_q . z, the slope by the scaled phi_q . z."""
    scale = 1.0 / (tokens * tl.sqrt(tl.zeros_like(tokens) + D))
    weight = z * scale
    above = 1.0 / (weight + eps)
    return (1.0 + above) * scale, -weight / tokens, -above * above * scale, scale
