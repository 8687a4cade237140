"""What norm_linear_attention's launchers share: the raw ops' arguments, their sizes, and the problem as C++ takes it.

Contract of the kernels: csrc/norm_linear_attention.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyelastic.eager.norm_linear_attention import MALA, POLA, POLA_OPPOSITE, statistics_dtype
from pyelastic.ops._binding import DTYPES, pointer


class LinearAttentionState(NamedTuple):
    """What a prefix of the tokens leaves behind: all that later tokens read.

    s: [sequences, Hk, 2 d, dv], the sum of (rotated) key features times values, float32 (float64 for float64 inputs).
    z: [sequences, Hk, 2 d], the sum of key features, likewise. tokens: [sequences] int64, how many were summed.
    """

    s: Tensor
    z: Tensor
    tokens: Tensor


class Inputs(NamedTuple):
    """Arguments of the raw ops, in their schema's order.

    q [B, N, Hq, d], k [B, M, Hk, d], v [B, M, Hk, dv], gate [B, N, Hq, dv] or None, all of one dtype T and any strides.
    params: [3, Hq] (lam, tau, norm_scale), of a PolaFormer map [Hq, d] (powers), of MALA's None. sin, cos
    [positions, d / 2]. start, count0 [sequences] int64: position of each sequence's first token, and tokens in s0, z0.
    cu_seqlens [sequences + 1] int64, with B = 1 and N = M. s0 [sequences, Hk, rows, dv], z0 [sequences, Hk, features].
    params, sin, cos, s0 and z0 in the compute type. final_state: whether the state after the tokens is asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    params: Tensor | None
    gate: Tensor | None
    sin: Tensor | None
    cos: Tensor | None
    start: Tensor | None
    cu_seqlens: Tensor | None
    s0: Tensor | None
    z0: Tensor | None
    count0: Tensor | None
    map: int
    rope_both: bool
    causal: bool
    mean: bool
    key_power: float
    alpha: float
    eps: float
    norm_eps: float
    final_state: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """The compute type."""
        return statistics_dtype(self.q)

    @property
    def sequences(self) -> int:
        return sequences_of(self)

    @property
    def features(self) -> int:
        return features_of(self)

    @property
    def rows(self) -> int:
        """Rows of the state: one per feature, and for MALA the sum of the values."""
        return self.features + int(self.map == MALA)  # torch 2.11 adds no bool to a symbolic size

    @property
    def pola(self) -> bool:
        return self.map in (POLA, POLA_OPPOSITE)

    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        lead, features = (sequences_of(self), self.k.shape[2]), features_of(self)
        return (*lead, features + int(self.map == MALA), self.v.shape[-1]), (*lead, features)

    def output_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], self.v.shape[-1])

    def empty_output(self) -> Tensor:
        return empty_like(self.q, self.v.shape[-1])

    def detached(self) -> Inputs:
        """The same without gradients."""
        plain: list[Any] = [t.detach() if isinstance(t, Tensor) and t.requires_grad else t for t in self]
        return Inputs(*plain)

    def readable(self) -> Inputs:
        """The same with the last dimension of each tensor contiguous and small tensors contiguous: kernels' terms."""
        rows = map(last_contiguous, (self.q, self.k, self.v))
        small: list[Any] = [None if t is None else t.contiguous() for t in (self.params, *self[5:12])]
        gate = None if self.gate is None else last_contiguous(self.gate)
        plain: list[Any] = [*rows, small[0], gate, *small[1:], *self[12:]]
        return Inputs(*plain)

    def problem(self, o: Tensor | None = None, gradients: Sequence[Tensor | None] = (None,) * 4) -> tuple[Any, ...]:
        """What every binding takes first (csrc/bindings_norm_linear_attention.h), of ``readable`` inputs.

        o: the output or, backward, its gradient; gradients: dq, dk, dv, dgate. Last dimensions have stride 1.
        """
        sizes = (self.sequences, self.q.shape[1], self.k.shape[1], self.q.shape[2], self.k.shape[2], self.q.shape[3])
        scalars = (self.map, self.rope_both, self.causal, self.mean)
        optional = (self.params, self.sin, self.cos, self.start, self.cu_seqlens, self.s0, self.z0, self.count0)
        return (
            DTYPES[self.q.dtype],
            (*sizes, self.v.shape[3]),
            tuple(map(view, (self.q, self.k, self.v, self.gate, o, *gradients))),
            tuple(map(pointer, optional)),
            scalars,
            (self.key_power, self.alpha, self.eps, self.norm_eps),
        )


# Functions, as torch.compile of torch 2.6 reads no property of a NamedTuple.
def sequences_of(x: Inputs) -> int:
    return x.q.shape[0] if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1


def features_of(x: Inputs) -> int:
    return x.q.shape[-1] * (1 if x.map == MALA else 2)


def empty_like(x: Tensor, width: int) -> Tensor:
    """Room for [B, N, H, width], dense and in x's order of tokens and heads: a caller's layout needs no copy."""
    batch, tokens, heads, _ = x.shape
    row = tokens * heads * width
    if x.stride(2) > x.stride(1) and readable_as_it_is(x):
        return x.new_empty_strided((batch, tokens, heads, width), (row, width, tokens * width, 1))
    return x.new_empty_strided((batch, tokens, heads, width), (row, heads * width, width, 1))


def readable_as_it_is(x: Tensor) -> bool:
    """Whether its last dimension has stride 1, which the kernels expect."""
    return x.stride(-1) == 1 or x.shape[-1] <= 1


def last_contiguous(x: Tensor) -> Tensor:
    """x itself if the kernels can read it, else a copy."""
    return x if readable_as_it_is(x) else x.contiguous()


def view(x: Tensor | None) -> tuple[int, int, int, int]:
    """(pointer, strides of batch, token and head in elements) of x [B, N, H, .]."""
    return (0, 0, 0, 0) if x is None else (pointer(x), x.stride(0), x.stride(1), x.stride(2))
