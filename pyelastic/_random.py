"""Counter-based random numbers: the value of a row depends on (seed, row) alone.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in int64 tensor arithmetic: the
same bits on every device, backend and sharding, and traceable by torch.compile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyelastic import _library

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of factor * words; the factor is split so that no int64 overflows."""
    low = words * (factor & 0xFFFF)
    high = words * (factor >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def _philox(seed: Tensor, counters: Tensor) -> Tensor:
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = counters & _MASK, (counters >> 32) & _MASK
    c2 = c3 = torch.zeros_like(counters)
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3))


# An op of its own: inductor would inline ten rounds, each reading the last twice, and never finish compiling.
_op = _library.define(
    "philox", "eager", "(Tensor seed, Tensor counters) -> Tensor", _philox,
    lambda seed, counters: counters.new_empty(4, *counters.shape),
)  # fmt: skip


def philox(seed: int | Tensor, counters: Tensor) -> tuple[Tensor, ...]:
    """Four 32-bit words (as int64 tensors, the shape of ``counters``) per 64-bit counter.

    ``seed``: a non-negative integer below 2^63, or a 0-d int64 tensor of one (no synchronisation).
    """
    seed = torch.as_tensor(seed, dtype=torch.int64)
    words: Tensor = _op(seed, counters)
    return words.unbind(0)


def normal(seed: int | Tensor, counters: Tensor) -> Tensor:
    """Standard normal float64 per counter, by Box-Muller on 53- and 32-bit uniforms."""
    a, b, c, _ = philox(seed, counters)
    # (0, 1]: the logarithm of 0 never arises.
    uniform = (((a << 21) | (b >> 11)) + 1).to(torch.float64) * 2.0**-53
    turn = c.to(torch.float64) * (2.0 * math.pi * 2.0**-32)
    return torch.sqrt(-2.0 * torch.log(uniform)) * torch.cos(turn)


def fresh_seed() -> Tensor:
    """A seed from torch's default CPU generator (so torch.manual_seed governs it), 0-d int64."""
    return torch.randint(0, 2**62, (), dtype=torch.int64)
