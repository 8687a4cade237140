"""A checked Triton interpreter: what TRITON_INTERPRET=1 gets wrong or does not see, put right for tests.

``install()`` patches ``triton.runtime.interpreter`` (of 3.6 and 3.9; ``moved()`` names patch points that are gone):

- bfloat16: arithmetic, reductions, dot and casts in float32 with one rounding to nearest even (the stock interpreter
  computes on the bits as if they were integers, and truncates);
- tf32: operands of a float32 ``tl.dot`` are cut short unless ``input_precision="ieee"``;
- ``tl.device_assert`` fires, and with it Triton's own check of int32 overflow;
- every lane of every load, store and atomic must lie inside a tensor that is an argument of the launch, or that an
  argument's attribute `points_to` lists (a table of addresses);
- races: within one launch no program may touch what another program writes, unless both do so by atomics; two lanes of
  one store may not put different values in one place;
- a number or address that `tl.multiple_of` vouches for is such a multiple;
- grids are those that CUDA can launch; programs run in a seeded random order.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

BUILDER = interpreter.InterpreterBuilder
PATCHED = {
    BUILDER: ("binary_op", "unary_op", "cast_impl", "create_fp_to_fp", "create_fma", "create_dot", "create_masked_load",
              "create_masked_store", "create_atomic_rmw", "create_atomic_cas", "create_assert", "set_grid_idx",
              "set_grid_dim"),
    interpreter.ReduceOps: ("sum", "min_max"),
    interpreter.TensorHandle: ("set_attr",),
    interpreter.GridExecutor: ("_init_args_hst", "__call__"),
    interpreter.InterpretedFunction: ("__call__",),
}  # fmt: skip
_original: dict[tuple[type, str], Any] = {}
_order = random.Random(0)


class CheckedError(AssertionError):
    """What the checks raise; Triton wraps it in an InterpreterError that shows it."""


class OutOfBounds(CheckedError):
    pass


class Race(CheckedError):
    pass


class DeviceAssert(CheckedError):
    pass


class GridTooLarge(CheckedError):
    pass


class Misaligned(CheckedError):
    pass


def moved() -> list[str]:
    """Patch points that this version of Triton does not have: empty, or the checks cannot be trusted."""
    points = [(owner, name) for owner, names in PATCHED.items() for name in names]
    lost = [f"{owner.__name__}.{name}" for owner, name in points if not hasattr(owner, name)]
    lost += [] if hasattr(interpreter, "interpreter_builder") else ["interpreter_builder"]
    options = interpreter.interpreter_builder.options
    return lost + [f"options.{name}" for name in ("debug", "sanitize_overflow") if not hasattr(options, name)]


def seed(value: int) -> None:
    """The order in which the programs of the next launches run."""
    _order.seed(value)


# --- bfloat16 and tf32 ---


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """The low 13 bits dropped: Triton emits no cvt.tf32, and tensor cores do not read those bits (inferred)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), bits.view(np.float32), values)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _widen(handle: Any) -> np.ndarray:
    return from_bfloat16(handle.data) if _is_bfloat16(handle) else handle.data


def _narrow(data: np.ndarray, dtype: Any) -> Any:
    """A handle of bfloat16 from float32 data; comparisons stay what they are."""
    if data.dtype == np.bool_:
        return interpreter.TensorHandle(data, tl.int1)
    return interpreter.TensorHandle(to_bfloat16(data), dtype)


def _binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    if _is_bfloat16(lhs) or _is_bfloat16(rhs):
        return _narrow(op(_widen(lhs), _widen(rhs)), lhs.dtype.scalar)
    made = _original[BUILDER, "binary_op"](self, lhs, rhs, op)
    # A comparison is said to have its operands' type, and would be an integer once broadcast: refused as a mask.
    return interpreter.TensorHandle(made.data, tl.int1) if made.data.dtype == np.bool_ else made


def _unary_op(self: Any, arg: Any, op: Any) -> Any:
    if _is_bfloat16(arg):
        return _narrow(op(_widen(arg)), arg.dtype.scalar)
    return _original[BUILDER, "unary_op"](self, arg, op)


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    if _is_bfloat16(src) and dst_type.scalar != tl.bfloat16:
        src = interpreter.TensorHandle(_widen(src), tl.float32)
    if dst_type.scalar == tl.bfloat16 and src.dtype.scalar != tl.bfloat16:
        return interpreter.TensorHandle(to_bfloat16(src.data.astype(np.float32)), tl.bfloat16)
    if src.dtype.scalar == dst_type.scalar == tl.bfloat16:
        return src
    return interpreter.TensorHandle(src.data.astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)


def _fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    if src.dtype.scalar.primitive_bitwidth < 16 or dst_type.scalar.primitive_bitwidth < 16:
        return _original[BUILDER, "create_fp_to_fp"](self, src, dst_type, rounding_mode)
    return _cast(self, src, dst_type)  # numpy rounds to nearest even


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    if any(map(_is_bfloat16, (x, y, z))):
        wide = [_widen(v).astype(np.float64) for v in (x, y, z)]
        return _narrow((wide[0] * wide[1] + wide[2]).astype(np.float32), z.dtype.scalar)
    return _original[BUILDER, "create_fma"](self, x, y, z)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    if a.dtype.scalar.primitive_bitwidth == 8:
        return _original[BUILDER, "create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)
    left, right = _widen(a), _widen(b)
    wide = np.float64 if d.data.dtype == np.float64 else np.float32
    precision = str(input_precision).upper() if a.dtype.scalar == tl.float32 else ""
    if precision.endswith(("TF32", "TF32X3")):
        high = [to_tf32(x) for x in (left, right)]
        product = np.matmul(*high)
        if precision.endswith("X3"):  # the remainders, but for their own product
            low = [to_tf32(x - h) for x, h in zip((left, right), high, strict=True)]
            product = product + (np.matmul(high[0], low[1]) + np.matmul(low[0], high[1]))
        total = product + _widen(d)
    else:
        total = np.matmul(left.astype(wide), right.astype(wide)) + _widen(d)
    if _is_bfloat16(d):
        return _narrow(total, d.dtype.scalar)
    return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)


def _reduce(name: str) -> Any:
    def reduce(self: Any, input: Any, **how: Any) -> Any:
        first = input[0] if isinstance(input, tuple) else input
        original = _original[interpreter.ReduceOps, name]
        if not _is_bfloat16(first.handle):
            return original(self, input, **how)
        wide = tl.core.tensor(interpreter.TensorHandle(_widen(first.handle), tl.float32), tl.float32)
        result = original(self, wide, **how)
        parts = result if isinstance(result, tuple) else (result,)
        made = tuple(
            self.to_tensor(to_bfloat16(part.handle.data), tl.bfloat16) if part.dtype.scalar == tl.float32 else part
            for part in parts
        )
        return made if isinstance(result, tuple) else made[0]

    return reduce


# --- bounds and races ---


class _Region:
    """The bytes an argument may be read and written at, and who did so in this launch (program numbers from 1)."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.writer, self.reader, self.atomic = (np.zeros(high - low, dtype=np.int32) for _ in range(3))


MANY = -1


class _Launch:
    def __init__(self) -> None:
        self.regions: list[_Region] = []
        self.lows = np.zeros(0, dtype=np.uint64)
        self.program = 0
        self.sequence: list[int] = []
        self.grid = (1, 1, 1)
        self.patched: set[int] = set()  # modules of device functions

    def begin(self, tensors: list[torch.Tensor]) -> None:
        self.patched.clear()
        spans = []
        for x in tensors:
            if x.numel():
                extent = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
                spans.append((x.data_ptr(), x.data_ptr() + extent * x.element_size()))
        merged: list[list[int]] = []
        for low, high in sorted(spans):  # views of one storage share a record
            if merged and low < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], high)
            else:
                merged.append([low, high])
        self.regions = [_Region(low, high) for low, high in merged]
        self.lows = np.array([r.low for r in self.regions], dtype=np.uint64)

    def touch(self, what: str, pointers: np.ndarray, mask: np.ndarray, size: int, values: np.ndarray | None) -> None:
        pointers, mask = np.broadcast_arrays(pointers, mask)
        at = pointers[mask.astype(bool)].ravel()
        if not at.size:
            return
        number = np.searchsorted(self.lows, at, side="right").astype(np.int64) - 1
        highs = np.array([r.high for r in self.regions] + [0], dtype=np.uint64)
        outside = (number < 0) | (at + np.uint64(size) > highs[number])
        if outside.any():
            bad = int(at[outside][0])
            past = [bad - r.high for r in self.regions if bad >= r.high]
            where = f", +{min(past)} bytes past the end of an argument" if past else ""
            raise OutOfBounds(f"{what} out of bounds: {int(outside.sum())} lanes{where}")
        if what == "store" and values is not None:
            self._one_value_each(at, np.broadcast_to(values, mask.shape)[mask.astype(bool)].ravel())
        for n in np.unique(number):
            region = self.regions[n]
            self._conflicts(what, region, (at[number == n] - np.uint64(region.low)).astype(np.int64))

    def _one_value_each(self, at: np.ndarray, values: np.ndarray) -> None:
        order = np.argsort(at, kind="stable")
        same = np.diff(at[order]) == 0
        bits = values[order].view(f"u{values.itemsize}") if values.dtype != np.bool_ else values[order]
        if (same & (bits[1:] != bits[:-1])).any():
            raise Race("two lanes of one store put different values in one place")

    def _conflicts(self, what: str, region: _Region, offset: np.ndarray) -> None:
        me = self.program

        def others(record: np.ndarray) -> bool:
            seen = record[offset]
            return bool(((seen != 0) & (seen != me)).any())

        def mark(record: np.ndarray) -> None:
            seen = record[offset]
            record[offset] = np.where((seen == 0) | (seen == me), me, MANY)

        if others(region.writer):
            raise Race(f"{what} of what another program stored")
        if what != "load" and others(region.reader):
            raise Race(f"{what} of what another program loaded")
        if what != "atomic" and others(region.atomic):
            raise Race(f"{what} of what another program changed by atomics")
        mark({"load": region.reader, "store": region.writer, "atomic": region.atomic}[what])


_launch = _Launch()


def _masked_load(self: Any, ptrs: Any, mask: Any, *how: Any) -> Any:
    size = interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
    _launch.touch("load", ptrs.data, mask.data, size, None)
    return _original[BUILDER, "create_masked_load"](self, ptrs, mask, *how)


def _masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *how: Any) -> Any:
    size = interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
    _launch.touch("store", ptrs.data, mask.data, size, value.data)
    return _original[BUILDER, "create_masked_store"](self, ptrs, value, mask, *how)


def _atomic_rmw(self: Any, operation: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
    _launch.touch("atomic", ptr.data, mask.data, val.data.itemsize, None)
    return _original[BUILDER, "create_atomic_rmw"](self, operation, ptr, val, mask, sem, scope)


def _atomic_cas(self: Any, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
    _launch.touch("atomic", ptr.data, np.ones_like(ptr.data, dtype=bool), val.data.itemsize, None)
    return _original[BUILDER, "create_atomic_cas"](self, ptr, cmp, val, sem, scope)


def _set_attr(self: Any, key: str, value: Any) -> None:
    if key == "tt.divisibility" and self.data.size == 1 and int(self.data.ravel()[0]) % int(value[0]):
        raise Misaligned(f"multiple_of: {int(self.data.ravel()[0])} is no multiple of {int(value[0])}")
    _original[interpreter.TensorHandle, "set_attr"](self, key, value)


def _assert(self: Any, condition: Any, message: str) -> None:
    if not np.all(condition.data if hasattr(condition, "data") else condition):
        raise DeviceAssert(f"device_assert: {message}")


def _set_grid_dim(self: Any, nx: int, ny: int, nz: int) -> None:
    if nx >= 1 << 31 or max(ny, nz) > 65_535:
        raise GridTooLarge(f"CUDA has no grid of {nx} x {ny} x {nz}")
    _launch.grid, _launch.sequence = (nx, ny, nz), list(range(nx * ny * nz))
    _order.shuffle(_launch.sequence)
    _original[BUILDER, "set_grid_dim"](self, nx, ny, nz)


def _set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
    _, ny, nz = _launch.grid
    flat = _launch.sequence[(x * ny + y) * nz + z]
    _launch.program = flat + 1
    _original[BUILDER, "set_grid_idx"](self, flat // (ny * nz), flat // nz % ny, flat % nz)


def _device_call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that a kernel calls: its module is patched once a launch; once a call took a third of all time."""
    module = id(self.fn.__globals__)
    if module not in _launch.patched:
        interpreter._patch_lang(self.fn)
        _launch.patched.add(module)
    return self.rewrite()(*args, **kwargs)


def _init_args(self: Any, args: Any, kwargs: Any) -> Any:
    on_host = _original[interpreter.GridExecutor, "_init_args_hst"](self, args, kwargs)
    tensors = [x for x in (*on_host[0], *on_host[1].values()) if isinstance(x, torch.Tensor)]
    for x in (*args, *kwargs.values()):  # a table of addresses names the tensors that they lie in
        tensors += getattr(x, "points_to", ())
    _launch.begin(tensors)
    return on_host


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    before = _launch.grid
    try:
        return _original[interpreter.GridExecutor, "__call__"](self, *args, **kwargs)
    finally:
        _launch.grid = before
        _launch.begin([])


_REPLACEMENTS: dict[Any, Any] = {
    "binary_op": _binary_op, "unary_op": _unary_op, "cast_impl": _cast, "create_fp_to_fp": _fp_to_fp,
    "create_fma": _fma, "create_dot": _dot, "create_masked_load": _masked_load, "create_masked_store": _masked_store,
    "create_atomic_rmw": _atomic_rmw, "create_atomic_cas": _atomic_cas, "create_assert": _assert,
    "set_grid_idx": _set_grid_idx, "set_grid_dim": _set_grid_dim, "sum": _reduce("sum"), "min_max": _reduce("min_max"),
    "set_attr": _set_attr,
    "_init_args_hst": _init_args, (interpreter.GridExecutor, "__call__"): _call,
    (interpreter.InterpretedFunction, "__call__"): _device_call,
}  # fmt: skip


def replacement(owner: type, name: str) -> Any:
    return _REPLACEMENTS.get((owner, name)) or _REPLACEMENTS[name]


def install() -> None:
    """Patch the interpreter, once. Raises RuntimeError if Triton's internals have moved."""
    if _original:
        return
    lost = moved()
    if lost:
        raise RuntimeError(f"Triton's interpreter has changed; the checks do not know {', '.join(lost)}")
    for owner, names in PATCHED.items():
        for name in names:
            _original[owner, name] = getattr(owner, name)
            setattr(owner, name, replacement(owner, name))
    # device_assert is compiled out, and the overflow check with it, unless debugging is on.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=True)
