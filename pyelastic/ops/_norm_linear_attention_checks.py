"""Checks of norm_linear_attention's arguments, and what they become in the kernels' terms."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pyelastic import _dispatch, _errors
from pyelastic.eager.norm_linear_attention import statistics_dtype
from pyelastic.ops._binding import changed
from pyelastic.ops._norm_linear_attention import Inputs, LinearAttentionState, sequences_of
from pyelastic.rope import rope_tables as make_tables

OP = "norm_linear_attention"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, causal: bool, cu_seqlens: Tensor | None
) -> None:
    """Shapes, dtypes and devices of the operands, as [B, N, H, .]."""
    tensors = {"q": q, "k": k, "v": v, **({} if gate is None else {"gate": gate})}
    _errors.refuse_dtensor(OP, **tensors)
    for name, tensor in tensors.items():
        _errors.check_floating(OP, name, tensor, DTYPES)
        if tensor.dtype != q.dtype:
            raise TypeError(f"{OP}: q is {q.dtype} and {name} is {tensor.dtype}; expected one dtype")
    _errors.check_same_device(OP, **tensors)
    got = f"q is {list(q.shape)}, k is {list(k.shape)} and v is {list(v.shape)} (as [B, N, H, d])"
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[3] == 0:
        raise ValueError(f"{OP}: {got}; expected q [B, N, Hq, d], k [B, M, Hk, d] and v [B, M, Hk, dv]")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] or q.shape[2] == 0 or v.shape[3] == 0:
        raise ValueError(f"{OP}: {got}; expected Hq to be a multiple of Hk, and no width of 0")
    if (causal or cu_seqlens is not None) and q.shape[1] != k.shape[1]:
        raise ValueError(f"{OP}: {got}; causal and packed sequences need as many keys as queries")
    if gate is not None and gate.shape != (*q.shape[:3], v.shape[3]):
        raise ValueError(
            f"{OP}: gate is {list(gate.shape)}; expected {[*q.shape[:3], v.shape[3]]} (as [B, N, H, dv])"
        )


def check_numbers(**numbers: float) -> None:
    for name, number in numbers.items():
        lowest = "above 0" if name == "key_power" else "of 0 or more"
        if not 0 <= number < float("inf") or (name == "key_power" and number == 0):
            raise ValueError(f"{OP}: {name} is {number}; expected a finite number {lowest}")


@lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], heads: int, dtype: torch.dtype) -> Tensor:
    """[values, heads] on the CPU. Nobody writes it, and autograd may save it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype)[:, None].expand(-1, heads).contiguous()


def head_parameters(q: Tensor, **values: float | Tensor) -> Tensor:
    """[3, Hq] of numbers or tensors [] or [Hq]."""
    heads, rows = q.shape[2], []
    plain = not any(isinstance(value, Tensor) for value in values.values())
    if plain and type(q) is Tensor and q.device.type == "cpu" and not torch.compiler.is_compiling():
        return _constants(tuple(map(float, values.values())), heads, statistics_dtype(q))
    for name, value in values.items():
        if not isinstance(value, Tensor):
            rows.append(q.new_full((heads,), float(value), dtype=statistics_dtype(q)))
            continue
        if value.shape not in ((), (heads,)):
            raise ValueError(f"{OP}: {name} is {list(value.shape)}; expected a number, [] or [{heads}]")
        _errors.check_floating(OP, name, value, DTYPES)
        _errors.check_same_device(OP, q=q, **{name: value})
        rows.append(value.to(statistics_dtype(q)).expand(heads))
    return torch.stack(rows)


def check_offsets(q: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """cu_seqlens as int64; its values are checked where that reads no GPU."""
    if cu_seqlens is None:
        return None
    _errors.check_rank(OP, "cu_seqlens", cu_seqlens, 1, "[sequences + 1]")
    _errors.check_same_device(OP, q=q, cu_seqlens=cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.shape[0] == 0:
        got = f"{list(cu_seqlens.shape)} of {cu_seqlens.dtype}"
        raise ValueError(f"{OP}: cu_seqlens is {got}; expected [sequences + 1] of int32 or int64")
    if q.shape[0] != 1:
        raise ValueError(f"{OP}: q is {list(q.shape)}; packed sequences need a batch of 1")
    if _dispatch.may_read(q.device):
        found = cu_seqlens.tolist()
        if found[0] != 0 or found[-1] != q.shape[1] or found != sorted(found):
            raise ValueError(f"{OP}: cu_seqlens is {found[:8]}...; expected to rise from 0 to {q.shape[1]}")
    return cu_seqlens.long()


def make_rope(
    q: Tensor,
    k: Tensor,
    rope: str | None,
    tables: tuple[Tensor, Tensor] | None,
    grid: tuple[int, int] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """sin, cos [positions, d / 2] in the compute type, or None twice."""
    if rope is None:
        if tables is not None or grid is not None:
            raise ValueError(f"{OP}: rope is None and tables or a grid are given; choose from num, both")
        return None, None
    _errors.check_choice(OP, "rope", rope, ("num", "both"))
    dim, tokens = q.shape[3], max(q.shape[1], k.shape[1])
    if dim % 2:
        raise ValueError(f"{OP}: q is {list(q.shape)}; rope needs an even d")
    if tables is None:
        if grid is not None and grid[0] * grid[1] != tokens:
            raise ValueError(f"{OP}: rope_grid is {grid}; expected height * width = {tokens} tokens")
        return make_tables(grid or tokens, dim, device=q.device, dtype=statistics_dtype(q))
    if grid is not None:
        raise ValueError(f"{OP}: both rope_tables and rope_grid are given; only one of them can be used")
    for name, table in zip(("sin", "cos"), tables, strict=True):
        _errors.check_rank(OP, f"rope_tables' {name}", table, 2, "[positions, d / 2] or [positions, d]")
        _errors.check_floating(OP, f"rope_tables' {name}", table, DTYPES)
        _errors.check_same_device(OP, q=q, rope_tables=table)
        if table.shape[1] not in (dim // 2, dim) or table.shape[0] < tokens or table.shape != tables[0].shape:
            raise ValueError(
                f"{OP}: rope_tables' {name} is {list(table.shape)}; expected [at least {tokens}, {dim // 2} or {dim}]"
            )
    sin, cos = (t.detach() if t.requires_grad else t for t in tables)
    if sin.shape[1] == dim:
        sin, cos = sin[:, ::2], cos[:, ::2]
    return sin.to(statistics_dtype(q)), cos.to(statistics_dtype(q))


def with_state(inputs: Inputs, state: LinearAttentionState | None, position: int | Tensor | None) -> Inputs:
    """The inputs with start, s0, z0 and count0."""
    q, n, dtype = inputs.q, sequences_of(inputs), statistics_dtype(inputs.q)
    if state is not None:
        for name, tensor, shape in zip(("s", "z"), (state.s, state.z), inputs.state_shapes(), strict=True):
            _errors.check_same_device(OP, q=q, **{f"initial_state.{name}": tensor})
            if tensor.shape != shape or tensor.dtype != dtype:
                got = f"{list(tensor.shape)} of {tensor.dtype}"
                raise ValueError(f"{OP}: initial_state.{name} is {got}; expected {list(shape)} of {dtype}")
        _check_count("initial_state.tokens", state.tokens, q, n)
        inputs = changed(inputs, s0=state.s, z0=state.z, count0=state.tokens)
        if position is None and inputs.causal:
            position = state.tokens
    if inputs.sin is None:
        return inputs
    if isinstance(position, Tensor):
        _check_count("position", position, q, n)
    elif position:
        position = q.new_full((n,), position, dtype=torch.int64)
    else:
        return inputs
    if _dispatch.may_read(q.device) and n:
        last = int(position.max()) + max(q.shape[1], inputs.k.shape[1])
        if int(position.min()) < 0 or (inputs.cu_seqlens is None and last > inputs.sin.shape[0]):
            raise ValueError(
                f"{OP}: the tokens' positions end at {last}, and rope_tables have {inputs.sin.shape[0]}; pass "
                "rope_tables=pyelastic.rope_tables(positions, d) for the longest sequence"
            )
    return changed(inputs, start=position)


def _check_count(name: str, tensor: Tensor, q: Tensor, n: int) -> None:
    _errors.check_same_device(OP, q=q, **{name: tensor})
    if tensor.shape != (n,) or tensor.dtype != torch.int64:
        raise ValueError(f"{OP}: {name} is {list(tensor.shape)} of {tensor.dtype}; expected [{n}] of torch.int64")
