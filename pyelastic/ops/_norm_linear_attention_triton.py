"""Launcher of norm_linear_attention's Triton kernels: grids, scratch, and the order of the passes.

Contract: csrc/norm_linear_attention.h; algorithm: triton_kernels/norm_linear_attention*.py. Nothing here synchronises:
where sequences are packed, which program works on which of them is computed on the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pyelastic.eager.norm_linear_attention import MALA
from pyelastic.ops._norm_linear_attention import Inputs

WIDEST = 128  # of d and dv
SPLITS = 16  # parts a long bidirectional sequence is summed in at most: an estimate, not measured
Pair = tuple[Tensor, Tensor]


def _kernels() -> tuple[ModuleType, ModuleType]:
    from pyelastic.triton_kernels import norm_linear_attention, norm_linear_attention_backward

    return norm_linear_attention, norm_linear_attention_backward


def why_not(dim: int, v_dim: int, map: int) -> str | None:
    """What the kernels lack."""
    if map == MALA:
        return "MALA's readout is not implemented in triton"
    if max(dim, v_dim) > WIDEST:
        return f"heads are {dim} wide and values {v_dim}; the kernels take up to {WIDEST}"
    return None


def _guard(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Problem:
    """A call's tensors as the kernels take them, and their configurations."""

    def __init__(self, inputs: Inputs, backward: bool = False) -> None:
        import triton

        self.x = x = inputs.detached().readable()
        self.forward_kernels, self.backward_kernels = _kernels()
        self.device, self.none = x.q.device, torch.empty(1, dtype=torch.int64, device=x.q.device)
        self.batch, self.n, self.heads, self.d = x.q.shape
        self.m, self.kv_heads, self.dv = x.k.shape[1], x.k.shape[2], x.v.shape[3]
        self.packed = x.cu_seqlens is not None
        self.gate = x.q if x.gate is None else x.gate
        bits = 16 if x.q.dtype == torch.bfloat16 else 32
        table = self.forward_kernels.NORM_LINEAR_ATTENTION_CONFIGS
        width = min(w for b, w in table if b == bits and self.d <= w)
        self.tile, block_v = table[bits, width][1 if backward else 0]
        # One part of all tokens where there are few of them, or many heads to keep a GPU busy.
        longest = max(self.n, self.m, 1)
        self.part = self.forward_kernels.CHUNK
        if not x.causal:
            self.part = max(self.part, triton.next_power_of_2(triton.cdiv(longest, SPLITS)))
        rope = 0 if x.sin is None else 2 if x.rope_both else 1
        # Cubes of float16 keys leave its range, and one tf32 product cuts operands off at 10 bits.
        precision = "bf16" if x.q.dtype == torch.bfloat16 else "tf32x3"
        self.common = {
            "D": self.d, "DV": self.dv, "HD": max(16, triton.next_power_of_2((self.d + 1) // 2)),
            "BV": max(16, min(block_v, triton.next_power_of_2(self.dv))), "BT": self.tile,
            "PART": self.part, "MAP": x.map, "ROPE": rope, "PACKED": self.packed, "HAS_START": x.start is not None,
            "PRECISION": precision, "num_warps": self.forward_kernels.WARPS, "num_stages": 1,
        }  # fmt: skip
        self.cube = {"CUBE": x.key_power == 3.0}
        self.cdiv = triton.cdiv
        self.columns = triton.cdiv(self.dv, self.common["BV"])

    def tensor(self, x: Tensor | None) -> Tensor:
        return self.none if x is None else x

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def programs(self, tokens: int, block: int) -> tuple[int, int, Tensor, Tensor]:
        """(how many blocks of all sequences, of each, and of packed ones each block's sequence and place in it)."""
        each = self.cdiv(tokens, block)
        offsets = self.x.cu_seqlens
        if offsets is None:
            return self.x.sequences * each, each, self.none, self.none
        count = tokens // block + self.x.sequences
        slots = torch.arange(count, device=self.device)
        firsts = offsets[:-1] // block + torch.arange(self.x.sequences, device=self.device)
        sequence = torch.searchsorted(firsts, slots, right=True) - 1
        return count, each, sequence, slots - firsts[sequence]

    def tables(self) -> tuple[Tensor, ...]:
        x = self.x
        return tuple(map(self.tensor, (x.params, x.sin, x.cos, x.start)))

    def strides(self, *tensors: Tensor) -> list[int]:
        return [s for t in tensors for s in t.stride()[:3]]

    def scan(self, parts: Pair, initial: tuple[Tensor | None, Tensor | None], tokens: int, reverse: bool) -> Pair:
        """The sums of all parts; causal: each part's place is left with the sum before it."""
        found = []
        each = self.cdiv(tokens, self.part)
        for part, start, shape in zip(parts, initial, self.x.state_shapes(), strict=True):
            out = self.empty(*shape)
            block = self.forward_kernels.SCAN_BLOCK
            start = None if start is None else start.contiguous()
            if out.numel():
                width = out[0, 0].numel()
                self.forward_kernels.scan[(shape[0], shape[1], self.cdiv(width, block))](
                    part, self.tensor(start), out, self.tensor(self.x.cu_seqlens), tokens, each, shape[1], width,
                    PART=self.part, EXCLUSIVE=self.x.causal, REVERSE=reverse, HAS_INITIAL=start is not None,
                    PACKED=self.packed, BLOCK=block,
                )  # fmt: skip
            found.append(out)
        return found[0], found[1]

    def states(self) -> tuple[Pair, Pair]:
        """((per part, or for the bidirectional form the whole), (s, z) of the whole)."""
        x = self.x
        count, each, sequence, place = self.programs(self.m, self.part)
        parts = self.empty(count, self.kv_heads, 2 * self.d, self.dv), self.empty(count, self.kv_heads, 2 * self.d)
        if count and self.kv_heads:
            self.forward_kernels.state[(count, self.kv_heads, self.columns)](
                x.k, x.v, *self.tables(), self.tensor(x.cu_seqlens), sequence, place, *parts,
                *self.strides(x.k, x.v), self.m, each, self.kv_heads if not x.pola else self.heads,
                x.key_power, x.alpha, x.norm_eps, **self.common, **self.cube,
            )  # fmt: skip
        whole = self.scan(parts, (x.s0, x.z0), self.m, False)
        return (parts if x.causal else whole), whole

    def flags(self) -> dict[str, Any]:
        x = self.x
        return self.cube | {
            "HAS_COUNT": x.count0 is not None, "HAS_GATE": x.gate is not None, "CAUSAL": x.causal, "MEAN": x.mean,
        }  # fmt: skip

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        x = self.x
        read, whole = self.states()
        o = self.empty(*x.output_shape(), dtype=x.q.dtype)
        count, tiles, sequence, place = self.programs(self.n, self.tile)
        if o.numel():
            self.forward_kernels.forward[(count, self.heads, self.columns)](
                x.q, x.k, x.v, self.gate, o, *self.tables(), self.tensor(x.count0), self.tensor(x.cu_seqlens),
                sequence, place, *read, *self.strides(x.q, x.k, x.v, self.gate), self.n, self.m, tiles,
                self.cdiv(self.m, self.part), self.heads, self.heads // self.kv_heads, x.key_power, x.alpha, x.eps,
                x.norm_eps, **self.common, **self.flags(),
            )  # fmt: skip
        return o, *whole

    def backward(
        self, s: Tensor, z: Tensor, grad: Tensor, grad_s: Tensor | None, grad_z: Tensor | None
    ) -> list[Tensor]:
        x, kernels = self.x, self.backward_kernels
        read = self.states()[0] if x.causal else (s, z)
        dtype, group = x.q.dtype, self.heads // self.kv_heads
        grad = grad.contiguous()
        offsets, count0 = self.tensor(x.cu_seqlens), self.tensor(x.count0)
        dq, dk, dv = (self.empty(*t.shape, dtype=dtype) for t in (x.q, x.k, x.v))
        dgate = self.empty(*x.output_shape(), dtype=dtype) if x.gate is not None else self.empty(0, dtype=dtype)
        rows = self.batch * self.n
        d, dd = self.empty(rows, self.heads), self.empty(rows, self.heads)
        count, tiles, sequence, place = self.programs(self.n, self.tile)
        # Tiles of packed sequences that have no tokens write nothing.
        dparams = torch.zeros(count, self.heads, self.d if x.pola else 3, device=self.device)
        if dq.numel():
            kernels.grad_queries[(count, self.heads)](
                x.q, x.k, x.v, self.gate, grad, dq, dgate, d, dd, dparams, *self.tables(), count0, offsets, sequence,
                place, *read, *self.strides(x.q, x.k, x.v, self.gate), self.n, self.m, tiles,
                self.cdiv(self.m, self.part), self.heads, group, x.key_power, x.alpha, x.eps, x.norm_eps,
                **self.common, **self.flags(),
            )  # fmt: skip
        slots, each, sequence, place = self.programs(self.n, self.part)
        parts = self.empty(slots, self.heads, 2 * self.d, self.dv), self.empty(slots, self.heads, 2 * self.d)
        if parts[1].numel():
            kernels.grad_state[(slots, self.heads, self.columns)](
                x.q, self.gate, grad, d, dd, *parts, *self.tables(), offsets, sequence, place,
                *self.strides(x.q, self.gate), self.n, each, self.heads, x.alpha, x.norm_eps, **self.common,
                HAS_GATE=x.gate is not None,
            )  # fmt: skip
        if group > 1:
            parts = tuple(t.unflatten(1, (self.kv_heads, group)).sum(2) for t in parts)
        ds, dz = self.scan(parts, (grad_s, grad_z), self.n, True)
        after = parts if x.causal else (ds, dz)
        count, tiles, sequence, place = self.programs(self.m, self.tile)
        dpowers = torch.zeros(count if x.pola else 0, self.kv_heads, self.d, device=self.device)
        if dk.numel():
            kernels.grad_keys[(count, self.kv_heads)](
                x.q, x.k, x.v, self.gate, grad, d, dd, *after, dk, dv, dpowers, *self.tables(), offsets, sequence,
                place, *self.strides(x.q, x.k, x.v, self.gate), self.m, tiles, self.cdiv(self.n, self.part),
                self.heads, group, x.key_power, x.alpha, x.norm_eps, **self.common, **self.cube,
                HAS_GATE=x.gate is not None, CAUSAL=x.causal,
            )  # fmt: skip
        total = dparams.sum(0) + dpowers.sum(0) if x.pola else dparams.sum(0).mT.contiguous()
        return [dq, dk, dv, total, dgate, ds, dz]


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The raw op ``norm_linear_attention_fwd.triton``."""
    with _guard(arguments[0].device):
        return _Problem(Inputs(*arguments)).forward()


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The raw op ``norm_linear_attention_bwd.triton``."""
    *inputs, s, z, grad, grad_s, grad_z, needs = arguments
    with _guard(grad.device):
        made = _Problem(Inputs(*inputs), True).backward(s, z, grad, grad_s, grad_z)
    # The order of `needs` is that of the raw op's results.
    return tuple(x if need else x.new_empty(0, dtype=inputs[0].dtype) for x, need in zip(made, needs, strict=True))


def advance(inputs: Inputs) -> Tensor:
    """A causal forward that leaves the state after its tokens in s0 and z0."""
    assert inputs.s0 is not None and inputs.z0 is not None
    with _guard(inputs.q.device):
        o, s, z = _Problem(inputs).forward()
    inputs.s0.copy_(s)
    inputs.z0.copy_(z)
    return o

