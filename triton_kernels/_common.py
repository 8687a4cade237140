"""Products of tiles that are as exact as float32, shared by the ops."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split3(x):
    """float32 as a sum of three bfloat16, exactly (nearly so below 2^-110); the first alone holds Inf and NaN."""
    high = x.to(tl.bfloat16)
    rest = tl.where(tl.abs(x) < float("inf"), x - high.to(tl.float32), 0.0)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def finite(x):
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, tl.zeros_like(x))


@triton.jit
def multiply(a, b, acc):
    """acc + a b for operands of one 16-bit dtype, or of float32, to which any others are widened."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        acc = tl.dot(a, b, acc)
    else:
        a_high, a_middle, a_low = split3(a.to(tl.float32))
        b_high, b_middle, b_low = split3(b.to(tl.float32))
        # An infinity times a part of the other operand could be NaN, or infinite with another sign: once is enough.
        a_finite, b_finite = finite(a_high), finite(b_high)
        # Smallest first; the three products left out are below 2^-25.
        acc = tl.dot(a_low, b_finite, acc)
        acc = tl.dot(a_finite, b_low, acc)
        acc = tl.dot(a_middle, b_middle, acc)
        acc = tl.dot(a_middle, b_finite, acc)
        acc = tl.dot(a_finite, b_middle, acc)
        acc = tl.dot(a_high, b_high, acc)
    return acc
