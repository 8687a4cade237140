"""Triton kernels with planted bugs, each with a clean twin, for the self-test of the checked interpreter."""

import triton
import triton.language as tl


@triton.jit
def copy(p_x, p_y, n, LOAD_PAST: tl.constexpr, STORE_PAST: tl.constexpr, BLOCK: tl.constexpr):
    """y = x; the masks are off by one where asked."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o, mask=o < n + LOAD_PAST, other=0.0)
    tl.store(p_y + o, b_x, mask=o < n + STORE_PAST)


@triton.jit
def gather(p_x, p_index, p_y, n, BLOCK: tl.constexpr):
    """y = x[index]; an index out of range is the caller's bug."""
    o = tl.arange(0, BLOCK)
    m = o < n
    tl.store(p_y + o, tl.load(p_x + tl.load(p_index + o, mask=m, other=0), mask=m, other=0.0), mask=m)


@triton.jit
def row_sums(p_x, p_y, n, OVERLAP: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = sum x[i, :]; with OVERLAP every program also stores its neighbour's."""
    i = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(p_x + i * n + o, mask=o < n, other=0.0), axis=0)
    tl.store(p_y + i, total)
    if OVERLAP:
        tl.store(p_y + (i + 1) % tl.num_programs(0), total)


@triton.jit
def total(p_x, p_y, n, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    """y += sum x, from all programs: by an atomic, or by load and store."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.sum(tl.load(p_x + o, mask=o < n, other=0.0), axis=0)
    if ATOMIC:
        tl.atomic_add(p_y, part)
    else:
        tl.store(p_y, tl.load(p_y) + part)


@triton.jit
def chain(p_y):
    """y[i + 1] = y[i] + 1: right only if programs run in order."""
    i = tl.program_id(0)
    tl.store(p_y + i + 1, tl.load(p_y + i) + 1.0)


@triton.jit
def one_place(p_y, BLOCK: tl.constexpr):
    """All lanes store their number to one place."""
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o * 0, o.to(tl.float32))


@triton.jit
def strided(p_x, p_y, n, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = x[i * stride], addresses in int32 or int64; past n the mask is off."""
    o = tl.arange(0, BLOCK)
    at = o.to(tl.int64) * stride if WIDE else o * stride
    tl.store(p_y + o, tl.load(p_x + at, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def positive(p_x, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.device_assert(tl.load(p_x + o, mask=o < n, other=1.0) > 0, "x is not positive")


@triton.jit
def arithmetic(p_x, p_y, p_out, n, BLOCK: tl.constexpr):
    """out[k, :] for k = 0..5: x + y, x * y, max(x, y), -x, where(x > y, x, y), sum of x in every place."""
    o = tl.arange(0, BLOCK)
    m = o < n
    x, y = tl.load(p_x + o, mask=m, other=0.0), tl.load(p_y + o, mask=m, other=0.0)
    tl.store(p_out + o, x + y, mask=m)
    tl.store(p_out + n + o, x * y, mask=m)
    tl.store(p_out + 2 * n + o, tl.maximum(x, y), mask=m)
    tl.store(p_out + 3 * n + o, -x, mask=m)
    tl.store(p_out + 4 * n + o, tl.where(x > y, x, y), mask=m)
    tl.store(p_out + 5 * n + o, tl.zeros_like(x) + tl.max(x, axis=0), mask=m)


@triton.jit
def cast(p_x, p_y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n, other=0.0).to(p_y.dtype.element_ty), mask=o < n)


@triton.jit
def dot(p_a, p_b, p_c, PRECISION: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    at = o[:, None] * N + o[None, :]
    tl.store(p_c + at, tl.dot(tl.load(p_a + at), tl.load(p_b + at), input_precision=PRECISION))


@triton.jit
def scalar_comparison(x, y, n, BLOCK: tl.constexpr):
    """No bug: a comparison of scalars is part of a mask."""
    offsets = tl.arange(0, BLOCK)
    mask = (offsets < n) & (tl.load(x) < 1.0)
    tl.store(y + offsets, tl.load(x + offsets, mask=mask, other=0.0), mask=offsets < n)


@triton.jit
def through_table(p_table, n, MULTIPLE: tl.constexpr, BLOCK: tl.constexpr):
    """The array at the table's first address to that at its second."""
    p_x = tl.multiple_of(tl.load(p_table).to(tl.pointer_type(tl.float32)), MULTIPLE)
    p_y = tl.load(p_table + 1).to(tl.pointer_type(tl.float32))
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n), mask=o < n)
