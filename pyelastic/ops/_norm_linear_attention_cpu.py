"""Launcher of norm_linear_attention's CPU kernels: parts of sequences, and room for what passes between kernels.

Contract of the kernels: csrc/norm_linear_attention.h.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pyelastic import _extension
from pyelastic.eager.norm_linear_attention import MALA
from pyelastic.ops._binding import pointer
from pyelastic.ops._norm_linear_attention import Inputs, empty_like, last_contiguous

TILE = 64
# Tokens of a part; a causal sequence is one part up to SERIAL_TOKENS, and from SERIAL_HEADS heads of all sequences on:
# fixed, so that no bit depends on the number of threads.
PART, SERIAL_TOKENS, SERIAL_HEADS = 256, 512, 16
# Multiplications below which a thread more costs more than it brings: an estimate, from 10 microseconds to wake it.
WORTH_A_THREAD = 1 << 19


def quadratic(x: Inputs) -> bool:
    """Whether a call runs in quadratic order: one tile of tokens, no state, and fewer products that way."""
    n, m, d, dv = x.q.shape[1], x.k.shape[1], x.q.shape[3], x.v.shape[3]
    if x.final_state or x.s0 is not None or x.cu_seqlens is not None or x.map == MALA or n > TILE or m > TILE:
        return False
    pairs = n * m // 2 if x.causal else n * m
    return pairs * (8 * d + 3 * dv) < 6 * d * dv * (n + m)


@lru_cache(maxsize=64)
def _multiples(count: int, each: int) -> Tensor:
    """[0, each, .., count each]. Kernels only read it."""
    return torch.arange(count + 1) * each


class _Problem:
    """A call's tensors as the kernels take them."""

    def __init__(self, inputs: Inputs) -> None:
        self.x = x = inputs.readable()
        self.dtype = x.dtype
        self.quadratic = quadratic(x)
        self.suffix = "_f64" if self.dtype == torch.float64 else "_f32"
        self.extension = _extension.load()
        n, m = x.q.shape[1], x.k.shape[1]
        work = (x.q.numel() + x.k.numel()) * 2 * x.v.shape[3]
        self.threads = max(1, min(torch.get_num_threads(), work // WORTH_A_THREAD))
        # One walk over each sequence, whose state goes from tile to tile: no sums of parts in memory.
        longest = max(n, m, 1)
        self.walk = x.causal and (x.sequences * x.k.shape[2] >= SERIAL_HEADS or longest <= SERIAL_TOKENS)
        self.part = -(-longest // TILE) * TILE if self.walk else PART
        self.first_q, self.parts_q = self._first(n)
        self.first_k, self.parts_k = (self.first_q, self.parts_q) if m == n else self._first(m)
        self.parts = (self.part, self.walk, self.first_q.data_ptr(), self.first_k.data_ptr())

    def _first(self, tokens: int) -> tuple[Tensor, int]:
        """Place of each sequence's first part, and how many there are."""
        offsets, sequences = self.x.cu_seqlens, self.x.sequences
        if self.walk or offsets is None:
            each = 1 if self.walk else -(-tokens // self.part)
            return _multiples(sequences, each), sequences * each
        counts = (offsets.diff() + self.part - 1) // self.part
        first = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return first, int(first[-1])

    def call(self, name: str, problem: Any, numbers: int, *arguments: Any) -> None:
        """``numbers``: of the compute type, what passes between kernels."""
        room = torch.empty(numbers, dtype=self.dtype)
        size = (room.data_ptr(), numbers * self.dtype.itemsize)
        run = getattr(self.extension, f"norm_linear_attention_{name}{self.suffix}")
        run(problem, self.parts, size, *map(pointer, arguments), self.threads)

    def _room(self, *pieces: int) -> int:
        """Numbers for arrays of so many, each of which begins a line of 64 bytes."""
        return sum(pieces) + 16 * len(pieces)

    def forward(self, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """o, and the state after all tokens (quadratic: nothing). state: x.s0 and x.z0, where to leave it."""
        x = self.x
        o = x.empty_output()
        if self.quadratic:
            none = torch.empty(0, dtype=self.dtype)
            self.call("forward", x.problem(o), 0, None, None)
            return o, none, none.clone()
        s_shape, z_shape = x.state_shapes()
        s, z = state or (torch.empty(s_shape, dtype=self.dtype), torch.empty(z_shape, dtype=self.dtype))
        alone = not x.causal and self.parts_k == x.sequences and x.s0 is None and x.cu_seqlens is None
        numbers = 0 if self.walk or alone else self._room(*self._slots(self.parts_k))
        self.call("forward", x.problem(o), numbers, s, z)
        return o, s, z

    def _slots(self, count: int) -> tuple[int, int]:
        """Numbers of the states of ``count`` parts."""
        (_, heads, rows, v_dim), (_, _, features) = self.x.state_shapes()
        return count * heads * rows * v_dim, count * heads * features

    def backward(
        self, s: Tensor, z: Tensor, grad: Tensor, after: tuple[Tensor | None, Tensor | None], params: bool
    ) -> list[Tensor | None]:
        """The gradients, in their order; ``params``: whether theirs is wanted."""
        x = self.x
        dq, dk, dv, dgate = (None if t is None else empty_like(t, t.shape[3]) for t in (x.q, x.k, x.v, x.gate))
        grad = last_contiguous(grad)
        dparams = torch.empty(x.params.shape, dtype=self.dtype) if params and x.params is not None else None
        problem = x.problem(grad, (dq, dk, dv, dgate))
        width = x.q.shape[3] if x.pola else 3
        parts_q, parts_k = (x.sequences, x.sequences) if self.quadratic else (self.parts_q, self.parts_k)
        # Doubles, counted as the compute type's numbers.
        doubles = [2 * parts_q * x.q.shape[2] * width, 2 * parts_k * x.k.shape[2] * width if x.pola else 0]
        if self.quadratic:
            ds, dz = (torch.empty(0, dtype=self.dtype) for _ in range(2))
            self.call("backward", problem, self._room(*doubles), *(None,) * 4, dparams, None, None)
            return [dq, dk, dv, dparams, dgate, ds, dz]
        ds, dz = (torch.empty(shape, dtype=self.dtype) for shape in x.state_shapes())
        rows = x.q.numel() // x.q.shape[3]
        pieces = [*doubles, rows, rows, *self._slots(self.parts_q)]
        if x.causal:
            pieces += (*self._slots(x.sequences), *self._slots(self.parts_k))
        given = tuple(None if t is None else t.contiguous() for t in (s, z, *after))
        self.call("backward", problem, self._room(*pieces), *given, dparams, ds, dz)
        return [dq, dk, dv, dparams, dgate, ds, dz]


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The raw op ``norm_linear_attention_fwd.cpu``: o, and the state after all tokens (quadratic: nothing)."""
    return _Problem(Inputs(*arguments)).forward()


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The raw op ``norm_linear_attention_bwd.cpu``: gradients in the order of ``needs``."""
    *inputs, s, z, grad, grad_s, grad_z, needs = arguments
    made = _Problem(Inputs(*inputs)).backward(s, z, grad, (grad_s, grad_z), needs[3])
    return tuple(
        x if need and x is not None else inputs[0].new_empty(0) for x, need in zip(made, needs, strict=True)
    )


def advance(inputs: Inputs) -> Tensor:
    """A causal forward that leaves the state after its tokens in s0 and z0, which are contiguous."""
    assert inputs.s0 is not None and inputs.z0 is not None
    return _Problem(inputs).forward((inputs.s0, inputs.z0))[0]
