"""What norm_linear_attention's launchers for GPUs share: pieces of sequences, scratch, and the order of the passes.

A backend is a subclass with a method per kernel. Nothing here synchronises: where sequences are packed, which program
works on which of them is computed on the device. Algorithm: triton_kernels/norm_linear_attention*.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyelastic.eager.norm_linear_attention import MALA
from pyelastic.ops._norm_linear_attention import Inputs, empty_like, last_contiguous

WIDEST = 128  # of d and dv
CHUNK = 128  # tokens of a part in the causal form
SPLITS = 16  # parts a long bidirectional sequence is summed in at most: an estimate, not measured
Pair = tuple[Tensor, Tensor]
Read = tuple[Tensor | None, Tensor | None]


class Pieces(NamedTuple):
    """Tiles or parts: how many of all sequences, of each, and of packed ones each piece's sequence and place in it."""

    total: int
    each: int
    sequence: Tensor | None
    place: Tensor | None


def why_not(dim: int, v_dim: int, map: int) -> str | None:
    """What the kernels lack."""
    if max(dim, v_dim) > WIDEST:
        return f"heads are {dim} wide and values {v_dim}; the kernels take up to {WIDEST}"
    return None


def quadratic(x: Inputs) -> bool:
    """Whether a call runs in quadratic order, without states: at most one part, and, bidirectional, fewer products.

    Forward is then one launch, not four, and backward two, not five or eight.
    """
    n, m, d, dv = x.q.shape[1], x.k.shape[1], x.q.shape[3], x.v.shape[3]
    if x.final_state or x.s0 is not None or x.cu_seqlens is not None or x.map == MALA:
        return False
    if not 0 < min(n, m) <= max(n, m) <= CHUNK:
        return False
    return x.causal or n * m * (2 * d + dv) <= 2 * d * dv * (n + m)


def guard(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class GpuProblem:
    """A call's tensors as the kernels take them."""

    tile: int  # tokens, set by the backend
    whole = False  # whether a pass is one launch, a block per sequence and kv head, as the backend decides

    def __init__(self, inputs: Inputs) -> None:
        self.x = x = inputs.detached().readable()
        self.device = x.q.device
        self.batch, self.n, self.heads, self.d = x.q.shape
        self.m, self.kv_heads, self.dv = x.k.shape[1], x.k.shape[2], x.v.shape[3]
        self.part, self.alone = CHUNK, quadratic(x)
        if not x.causal:  # few parts, but several where a sequence is long
            longest = max(self.n, self.m, 1)
            self.part = max(self.part, 1 << (-(-longest // SPLITS) - 1).bit_length())

    # Kernels; contract: csrc/norm_linear_attention.h.
    def run_state(self, pieces: Pieces, parts: Pair) -> None:
        raise NotImplementedError

    def run_scan(
        self, tokens: int, each: int, width: int, initial: Tensor | None, reverse: bool, parts: Tensor, total: Tensor
    ) -> None:
        raise NotImplementedError

    def run_forward(self, pieces: Pieces, read: Read, o: Tensor) -> None:
        raise NotImplementedError

    def run_queries(self, pieces: Pieces, read: Read, *tensors: Tensor | None) -> None:
        raise NotImplementedError

    def run_grad_state(self, pieces: Pieces, grad: Tensor, d: Tensor, dd: Tensor, last: Tensor, parts: Pair) -> None:
        raise NotImplementedError

    def run_keys(self, pieces: Pieces, *tensors: Tensor | None) -> None:
        raise NotImplementedError

    def run_whole_forward(self, o: Tensor, whole: Pair) -> None:
        raise NotImplementedError

    def run_whole_backward(self, grad: Tensor, made: Sequence[Tensor | None], *tensors: Tensor | None) -> None:
        raise NotImplementedError

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def parts_of(self, tokens: int) -> int:
        """Parts of a sequence that is not packed."""
        return -(-tokens // self.part)

    def count(self, tokens: int, size: int) -> int:
        """Pieces of all sequences. Packed, each's begin at offset // size + its number."""
        return self.x.sequences * -(-tokens // size) if self.x.cu_seqlens is None else tokens // size + self.x.sequences

    def pieces(self, tokens: int, size: int) -> Pieces:
        count, each, offsets = self.count(tokens, size), -(-tokens // size), self.x.cu_seqlens
        if offsets is None:
            return Pieces(count, each, None, None)
        slots = torch.arange(count, device=self.device)
        firsts = offsets[:-1] // size + torch.arange(self.x.sequences, device=self.device)
        sequence = torch.searchsorted(firsts, slots, right=True) - 1
        return Pieces(count, each, sequence, slots - firsts[sequence])

    def scan(self, parts: Pair, initial: tuple[Tensor | None, Tensor | None], tokens: int, reverse: bool) -> Pair:
        """The sums of all parts; causal: each part's place is left with the sum before it."""
        alone = len(parts[0]) == self.x.sequences and self.x.cu_seqlens is None and not self.x.causal
        if alone and initial[0] is None and initial[1] is None:
            return parts
        found = []
        for part, start in zip(parts, self.widened(initial), strict=True):
            out = self.empty(self.x.sequences, self.kv_heads, *part.shape[2:])
            if out.numel():
                start = None if start is None else start.contiguous()
                self.run_scan(tokens, self.parts_of(tokens), out[0, 0].numel(), start, reverse, part, out)
            found.append(out)
        return found[0], found[1]

    def slots(self, count: int, heads: int) -> Pair:
        """Room for the states of parts."""
        return self.empty(count, heads, 2 * self.d, self.dv), self.empty(count, heads, 2 * self.d)

    def widened(self, state: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
        """A state as the kernels take it: 2 d rows also for MALA, whose row d sums the values."""
        if self.x.map != MALA:
            return state
        s, z = state
        rows = self.d - 1
        return (
            None if s is None else torch.nn.functional.pad(s, (0, 0, 0, rows)),
            None if z is None else torch.nn.functional.pad(z, (0, self.d)),
        )

    def narrowed(self, state: Pair) -> Pair:
        """The reverse."""
        if self.x.map != MALA:
            return state
        rows, features = self.x.rows, self.x.features
        return state[0][:, :, :rows].contiguous(), state[1][:, :, :features].contiguous()

    def states(self) -> tuple[Pair, Pair]:
        """((before each part, or for the bidirectional form the whole), (s, z) of the whole)."""
        pieces = self.pieces(self.m, self.part)
        parts = self.slots(pieces.total, self.kv_heads)
        if pieces.total:
            self.run_state(pieces, parts)
        whole = self.scan(parts, (self.x.s0, self.x.z0), self.m, False)
        return (parts if self.x.causal else whole), whole

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.whole:
            o, whole = self.x.empty_output(), self.slots(self.x.sequences, self.kv_heads)
            self.run_whole_forward(o, whole)
            return o, *whole
        read: Read
        read, whole = ((None, None), (self.empty(0), self.empty(0))) if self.alone else self.states()
        o = self.x.empty_output()
        if o.numel():
            self.run_forward(self.pieces(self.n, self.tile), read, o)
        return o, *self.narrowed(whole)

    def grad_states(self, grad: Tensor, d: Tensor, dd: Tensor, last: Tensor, given: Read) -> tuple[Pair, Pair]:
        """((of the states after each part, or for the bidirectional form of the whole), of the initial state)."""
        pieces, group = self.pieces(self.n, self.part), self.heads // self.kv_heads
        parts = self.slots(pieces.total, self.heads)
        if pieces.total and self.heads:
            self.run_grad_state(pieces, grad, d, dd, last, parts)
        if group > 1:
            made = [t.unflatten(1, (self.kv_heads, group)).sum(2) for t in parts]
            parts = made[0], made[1]
        whole = self.scan(parts, given, self.n, True)
        return (parts if self.x.causal else whole), whole

    def backward_of_parts(
        self,
        s: Tensor,
        z: Tensor,
        grad: Tensor,
        given: Read,
        of_queries: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor],
        of_keys: tuple[Tensor, Tensor, Tensor],
    ) -> Pair:
        """Fill (dq, dgate, d, dd, dparams) and (dk, dv, dpowers); return the gradients of the initial state."""
        read: Read = (None, None)
        if not self.alone:
            read = self.states()[0] if self.x.causal else self.widened((s.contiguous(), z.contiguous()))
        dq, _, d, dd, dparams = of_queries
        if dq.numel():
            self.run_queries(self.pieces(self.n, self.tile), read, grad, *of_queries)
        after: Read = (None, None)
        whole = self.empty(0), self.empty(0)
        if not self.alone:
            after, whole = self.grad_states(grad, d, dd, dparams, given)
        dk, dv, dpowers = of_keys
        if dk.numel():
            self.run_keys(self.pieces(self.m, self.tile), grad, d, dd, *after, dk, dv, dpowers)
        return whole

    def backward(
        self, s: Tensor, z: Tensor, grad: Tensor, grad_s: Tensor | None, grad_z: Tensor | None
    ) -> list[Tensor]:
        x = self.x
        dtype = x.q.dtype
        grad = last_contiguous(grad)
        dq, dk, dv = (empty_like(t, t.shape[3]) for t in (x.q, x.k, x.v))
        dgate = empty_like(x.gate, self.dv) if x.gate is not None else None
        rows = self.batch * self.n
        d, dd = self.empty(rows, self.heads), self.empty(rows, self.heads)
        count = self.count(self.n, self.tile)
        # Tiles of packed sequences that have no tokens write nothing.
        shape = (rows, self.heads, 1) if x.map == MALA else (count, self.heads, self.d if x.pola else 3)
        dparams = torch.zeros(shape, device=self.device)
        dpowers = torch.zeros(self.count(self.m, self.tile) if x.pola else 0, self.kv_heads, self.d, device=self.device)
        if self.whole:
            whole = self.slots(x.sequences, self.kv_heads)
            read = [t if t is None else t.contiguous() for t in (s, z, grad_s, grad_z)]
            self.run_whole_backward(grad, (dq, dk, dv, dgate), *read, d, dd, dparams, dpowers, *whole)
        else:
            whole = self.backward_of_parts(s, z, grad, (grad_s, grad_z), (dq, dgate, d, dd, dparams), (dk, dv, dpowers))
        total = dparams.sum(0) + dpowers.sum(0) if x.pola else dparams.sum(0).mT.contiguous()
        none = self.empty(0, dtype=dtype)
        return [dq, dk, dv, total, none if dgate is None else dgate, *self.narrowed(whole)]


def forward(problem: type[GpuProblem], *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    with guard(arguments[0].device):
        return problem(Inputs(*arguments)).forward()


def backward(problem: type[GpuProblem], *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients in the order of the raw op's ``needs``."""
    *inputs, s, z, grad, grad_s, grad_z, needs = arguments
    with guard(grad.device):
        made = problem(Inputs(*inputs)).backward(s, z, grad, grad_s, grad_z)
    return tuple(x if need else x.new_empty(0, dtype=inputs[0].dtype) for x, need in zip(made, needs, strict=True))


def advance(problem: type[GpuProblem], inputs: Inputs) -> Tensor:
    """A causal forward that leaves the state after its tokens in s0 and z0."""
    assert inputs.s0 is not None and inputs.z0 is not None
    with guard(inputs.q.device):
        o, s, z = problem(inputs).forward()
    inputs.s0.copy_(s)
    inputs.z0.copy_(z)
    return o
