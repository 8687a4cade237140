"""Launcher of norm_linear_attention's Triton kernels (triton_kernels/norm_linear_attention*.py)."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pyelastic.ops import _norm_linear_attention_gpu as gpu
from pyelastic.ops._norm_linear_attention import Inputs
from pyelastic.ops._norm_linear_attention_gpu import Pair, Pieces, Read


def _kernels() -> tuple[ModuleType, ModuleType]:
    from pyelastic.triton_kernels import norm_linear_attention, norm_linear_attention_backward

    return norm_linear_attention, norm_linear_attention_backward


class _Forward(gpu.GpuProblem):
    """With the tiles of the forward pass."""

    column = 0  # of the table of configurations

    def __init__(self, inputs: Inputs) -> None:
        import triton

        super().__init__(inputs)
        x = self.x
        self.forward_kernels, self.backward_kernels = _kernels()
        self.none = torch.empty(1, dtype=torch.int64, device=self.device)
        self.gate = x.q if x.gate is None else x.gate
        bits = 16 if x.q.dtype == torch.bfloat16 else 32
        table = self.forward_kernels.NORM_LINEAR_ATTENTION_CONFIGS
        width = min(w for b, w in table if b == bits and self.d <= w)
        self.tile, block_v = table[bits, width][self.column]
        rope = 0 if x.sin is None else 2 if x.rope_both else 1
        # Cubes of float16 keys leave its range, and one tf32 product cuts operands off at 10 bits.
        precision = "bf16" if x.q.dtype == torch.bfloat16 else "tf32x3"
        self.common = {
            "D": self.d, "DV": self.dv, "HD": max(16, triton.next_power_of_2((self.d + 1) // 2)),
            "BV": max(16, min(block_v, triton.next_power_of_2(self.dv))), "BT": self.tile, "PART": self.part,
            "MAP": x.map, "ROPE": rope, "PACKED": x.cu_seqlens is not None, "HAS_START": x.start is not None,
            "PRECISION": precision, "num_warps": self.forward_kernels.WARPS, "num_stages": 1,
        }  # fmt: skip
        # Where ptxas might else settle for 128 registers, and spill.
        nvidia = self.device.type == "cuda" and torch.version.hip is None
        most = {"maxnreg": self.forward_kernels.REGISTERS} if nvidia else {}
        self.most = most if precision != "bf16" else {}
        self.most_keys = most if x.causal else {}
        self.cube = {"CUBE": x.key_power == 3.0}
        self.gated = {"HAS_GATE": x.gate is not None}
        self.meet = {"CAUSAL": x.causal, "ALONE": self.alone}
        self.flags = {"HAS_COUNT": x.count0 is not None, "MEAN": x.mean} | self.meet
        self.columns = triton.cdiv(self.dv, self.common["BV"])

    def tensor(self, x: Tensor | None) -> Tensor:
        return self.none if x is None else x

    def places(self, pieces: Pieces) -> tuple[Tensor, ...]:
        return tuple(map(self.tensor, (self.x.cu_seqlens, pieces.sequence, pieces.place)))

    @property
    def tables(self) -> tuple[Tensor, ...]:
        x = self.x
        return tuple(map(self.tensor, (x.params, x.sin, x.cos, x.start)))

    def strides(self, *tensors: Tensor | None) -> list[int]:
        return [s for t in tensors for s in ((0, 0, 0) if t is None else t.stride()[:3])]

    def run_state(self, pieces: Pieces, parts: Pair) -> None:
        x = self.x
        self.forward_kernels.state[(pieces.total, self.kv_heads, self.columns)](
            x.k, x.v, *self.tables, *self.places(pieces), *parts, *self.strides(x.k, x.v), self.m, pieces.each,
            self.kv_heads, x.key_power, x.alpha, x.norm_eps, **self.common, **self.cube,
        )  # fmt: skip

    def run_scan(
        self, tokens: int, each: int, width: int, initial: Tensor | None, reverse: bool, parts: Tensor, total: Tensor
    ) -> None:
        block = self.forward_kernels.SCAN_BLOCK
        self.forward_kernels.scan[(self.x.sequences, self.kv_heads, -(-width // block))](
            parts, self.tensor(initial), total, self.tensor(self.x.cu_seqlens), tokens, each, self.kv_heads, width,
            PART=self.part, EXCLUSIVE=self.x.causal, REVERSE=reverse, HAS_INITIAL=initial is not None,
            PACKED=self.x.cu_seqlens is not None, BLOCK=block,
        )  # fmt: skip

    def run_forward(self, pieces: Pieces, read: Read, o: Tensor) -> None:
        x = self.x
        self.forward_kernels.forward[(pieces.total, self.heads, self.columns)](
            x.q, x.k, x.v, self.gate, o, *self.tables, self.tensor(x.count0), *self.places(pieces),
            *map(self.tensor, read), *self.strides(x.q, x.k, x.v, self.gate, o), self.n, self.m, pieces.each,
            self.parts_of(self.m), self.heads, self.heads // self.kv_heads, x.key_power, x.alpha, x.eps, x.norm_eps,
            **self.common, **self.cube, **self.gated, **self.flags, **self.most,
        )  # fmt: skip

    def run_queries(self, pieces: Pieces, read: Read, *tensors: Tensor | None) -> None:
        x = self.x
        strides = self.strides(x.q, x.k, x.v, self.gate, *tensors[:3])  # of grad, dq and dgate
        self.backward_kernels.grad_queries[(pieces.total, self.heads)](
            x.q, x.k, x.v, self.gate, *map(self.tensor, tensors), *self.tables, self.tensor(x.count0),
            *self.places(pieces), *map(self.tensor, read), *strides, self.n, self.m,
            pieces.each, self.parts_of(self.m), self.heads, self.heads // self.kv_heads, x.key_power, x.alpha, x.eps,
            x.norm_eps, **self.common, **self.cube, **self.gated, **self.flags, **self.most,
        )  # fmt: skip

    def run_grad_state(self, pieces: Pieces, grad: Tensor, d: Tensor, dd: Tensor, last: Tensor, parts: Pair) -> None:
        x = self.x
        self.backward_kernels.grad_state[(pieces.total, self.heads, self.columns)](
            x.q, self.gate, grad, d, dd, last, *parts, *self.tables, *self.places(pieces),
            *self.strides(x.q, self.gate, grad), self.n, pieces.each, self.heads, x.alpha, x.norm_eps, **self.common,
            **self.gated,
        )  # fmt: skip

    def run_keys(self, pieces: Pieces, *tensors: Tensor | None) -> None:
        x = self.x
        strides = self.strides(x.q, x.k, x.v, self.gate, tensors[0], *tensors[5:7])  # of grad, dk and dv
        self.backward_kernels.grad_keys[(pieces.total, self.kv_heads)](
            x.q, x.k, x.v, self.gate, *map(self.tensor, tensors), *self.tables, *self.places(pieces),
            *strides, self.m, self.n, pieces.each, self.parts_of(self.n), self.heads,
            self.heads // self.kv_heads, x.key_power, x.alpha, x.norm_eps, **self.common, **self.cube, **self.gated,
            **self.meet, **self.most_keys,
        )  # fmt: skip


class _Backward(_Forward):
    """With those of the backward pass."""

    column = 1


# The raw ops' implementations.
forward: Any = partial(gpu.forward, _Forward)
backward: Any = partial(gpu.backward, _Backward)
advance: Any = partial(gpu.advance, _Forward)
quadratic = gpu.quadratic
why_not = gpu.why_not
