"""Launcher of norm_linear_attention's CPU kernels: parts, scratch, and the order of the passes.

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
Pair = tuple[Tensor, Tensor]


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
        self.suffix = "_f64" if x.dtype == torch.float64 else "_f32"
        self.extension = _extension.load()
        work = (x.q.numel() + x.k.numel()) * 2 * x.v.shape[3]
        self.threads = max(1, min(torch.get_num_threads(), work // WORTH_A_THREAD))
        # One walk over each sequence, whose state goes from tile to tile: no sums of parts in memory.
        longest = max(x.q.shape[1], x.k.shape[1], 1)
        self.serial = x.causal and (x.sequences * x.k.shape[2] >= SERIAL_HEADS or longest <= SERIAL_TOKENS)
        self.part = -(-longest // TILE) * TILE if self.serial else PART
        self.first_q, self.first_k = (self._first(t.shape[1]) for t in (x.q, x.k))
        self.parts = (self.part, self.first_q.data_ptr(), self.first_k.data_ptr())

    def _first(self, tokens: int) -> Tensor:
        """Place of each sequence's first part, and how many there are."""
        offsets = self.x.cu_seqlens
        if self.serial or offsets is None:
            return _multiples(self.x.sequences, 1 if self.serial else -(-tokens // self.part))
        counts = (offsets.diff() + self.part - 1) // self.part
        return torch.cat((counts.new_zeros(1), counts.cumsum(0)))

    def call(self, name: str, *arguments: Any) -> None:
        getattr(self.extension, f"norm_linear_attention_{name}{self.suffix}")(*arguments, self.threads)

    def slots(self, first: Tensor) -> Pair:
        """Room for a state per part."""
        (_, heads, rows, v_dim), (_, _, features) = self.x.state_shapes()
        count = int(first[-1])
        made = (torch.empty(count, heads, n, dtype=self.x.dtype) for n in (rows * v_dim, features))
        return next(made), next(made)

    def scan(self, first: Tensor, parts: Pair, initial: tuple[Tensor | None, Tensor | None], reverse: bool) -> Pair:
        """The sums of all parts; causal: each part becomes the sum before it."""
        shapes = self.x.state_shapes()
        alone = not self.x.causal and len(parts[0]) == self.x.sequences and self.x.cu_seqlens is None
        if alone and initial[0] is None and initial[1] is None:
            return parts[0].view(shapes[0]), parts[1].view(shapes[1])
        found = []
        for part, start, shape in zip(parts, initial, shapes, strict=True):
            total = torch.empty(shape, dtype=self.x.dtype)
            start = None if start is None else start.contiguous()
            self.call(
                "scan",
                first.data_ptr(),
                shape[0],
                shape[1],
                part.shape[2],
                pointer(start),
                self.x.causal,
                reverse,
                part.data_ptr(),
                total.data_ptr(),
            )
            found.append(total)
        return found[0], found[1]

    def initial(self) -> Pair:
        """s0 and z0, or zeros: a copy that may be written."""
        given = zip((self.x.s0, self.x.z0), self.x.state_shapes(), strict=True)
        made = (torch.zeros(shape, dtype=self.x.dtype) if t is None else t.detach().clone() for t, shape in given)
        return next(made), next(made)

    def states(self, problem: Any) -> tuple[Pair, Pair]:
        """What ``forward`` reads, and the state after all tokens (serial: before any)."""
        if self.serial:
            start = self.initial()
            return start, start
        parts = self.slots(self.first_k)
        self.call("states", problem, self.parts, *map(pointer, parts))
        whole = self.scan(self.first_k, parts, (self.x.s0, self.x.z0), False)
        return (parts if self.x.causal else whole), whole

    def forward(self, serial_state: Pair | None = None) -> tuple[Tensor, Pair]:
        """o, and the state after all tokens; serial_state: that before them, which a serial walk changes in place."""
        o = self.x.empty_output()
        problem = self.x.problem(o)
        read, whole = self.states(problem) if serial_state is None else (serial_state, serial_state)
        ends = tuple(map(pointer, whole)) if self.serial else (0, 0)
        self.call("forward", problem, self.parts, *map(pointer, read), *ends)
        return o, whole

    def backward(
        self, s: Tensor, z: Tensor, grad: Tensor, after: tuple[Tensor | None, Tensor | None], params: bool
    ) -> list[Any]:
        """The gradients, in their order; ``params``: whether theirs is wanted."""
        x = self.x
        dq, dk, dv, dgate = (None if t is None else empty_like(t, t.shape[3]) for t in (x.q, x.k, x.v, x.gate))
        grad = last_contiguous(grad)
        problem = x.problem(grad, (dq, dk, dv, dgate))
        if quadratic(x):
            width = x.q.shape[3] if x.pola else 3
            dparams = torch.empty(x.sequences, x.q.shape[2], width, dtype=torch.float64)
            dpowers = torch.empty(x.sequences if x.pola else 0, x.k.shape[2], width, dtype=torch.float64)
            self.call("short_backward", problem, *map(pointer, (dparams, dpowers)))
            none = torch.empty(0, dtype=x.dtype)
            return [dq, dk, dv, self.total(dparams, dpowers) if params else None, dgate, none, none]
        read = self.states(problem)[0] if x.causal else (s.contiguous(), z.contiguous())
        d, dd = (torch.empty(x.q.shape[:3], dtype=x.dtype) for _ in range(2))
        width = x.q.shape[3] if x.pola else 3
        dparams = torch.empty(int(self.first_q[-1]), x.q.shape[2], width, dtype=torch.float64)
        parts = None if self.serial else self.slots(self.first_q)
        at = (0, 0) if parts is None else tuple(map(pointer, parts))
        self.call("queries", problem, self.parts, *map(pointer, (*read, d, dd)), *at, pointer(dparams))
        if parts is None:
            ends = zip(after, x.state_shapes(), strict=True)
            made = (torch.zeros(n, dtype=x.dtype) if t is None else t.contiguous().clone() for t, n in ends)
            first = total = next(made), next(made)
        else:
            total = self.scan(self.first_q, parts, after, True)
            first = parts if x.causal else total
        dpowers = torch.empty(int(self.first_k[-1]) if x.pola else 0, x.k.shape[2], width, dtype=torch.float64)
        self.call("keys", problem, self.parts, *map(pointer, (d, dd, *first, dpowers)))
        return [dq, dk, dv, self.total(dparams, dpowers) if params else None, dgate, *total]

    def total(self, dparams: Tensor, dpowers: Tensor) -> Tensor:
        """Gradients of all parts, added in their order whatever the number of threads, as ``params``."""
        sums = dparams.cumsum(0)[-1:].sum(0)
        sums = sums + dpowers.cumsum(0)[-1:].sum(0) if self.x.pola else sums.mT.contiguous()
        return sums.to(self.x.dtype)


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The raw op ``norm_linear_attention_fwd.cpu``: o, and the state after all tokens (quadratic: nothing)."""
    problem = _Problem(Inputs(*arguments))
    if quadratic(problem.x):
        o = problem.x.empty_output()
        problem.call("short_forward", problem.x.problem(o))
        return o, torch.empty(0, dtype=problem.x.dtype), torch.empty(0, dtype=problem.x.dtype)
    o, whole = problem.forward()
    return o, *whole


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The raw op ``norm_linear_attention_bwd.cpu``: gradients in the order of ``needs``."""
    *inputs, s, z, grad, grad_s, grad_z, needs = arguments
    made = _Problem(Inputs(*inputs)).backward(s, z, grad, (grad_s, grad_z), needs[3])
    return tuple(x if need else inputs[0].new_empty(0) for x, need in zip(made, needs, strict=True))


def advance(inputs: Inputs) -> Tensor:
    """A causal forward that leaves the state after its tokens in s0 and z0."""
    assert inputs.s0 is not None and inputs.z0 is not None
    problem = _Problem(inputs)
    if problem.serial:
        return problem.forward((inputs.s0, inputs.z0))[0]
    o, whole = problem.forward()
    inputs.s0.copy_(whole[0])
    inputs.z0.copy_(whole[1])
    return o
