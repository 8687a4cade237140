"""norm_linear_attention against the released formulation, SDPA and, for the causal form, chunked torch.

Two heads of one sequence, float32. Bidirectional as in NaLaFormer's stages: RoPE of an image in the numerator. Causal
without RoPE. The result is sum(o t); leaves are q, k and v.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import pyelastic
from benchmarks.harness import Variant, compiled

OP = "norm_linear_attention"
OURS = ("pyelastic cuda", "pyelastic triton", "pyelastic cpu", "pyelastic eager")
HEADS, CHUNK, EPS = 2, 64, 1e-6
# Relative RMS error admitted. float32, measured: 1e-6 bidirectional; causal, where the first denominators are small,
# 1.8e-5 of dq at 8,192 tokens (chunked torch: 1.2e-5). bfloat16: results and gradients are rounded to it; eager code
# that computes in it is off by 8e-3.
FLOAT32, CAUSAL, BFLOAT16 = 1e-5, 5e-5, 5e-3
Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """``full`` or ``causal``."""

    leaves: ClassVar[int] = 3
    kind: str
    tokens: int
    dim: int

    @property
    def id(self) -> str:
        return f"{self.kind}-N{self.tokens}-d{self.dim}"

    @property
    def side(self) -> int:
        return math.isqrt(self.tokens)

    def flops(self) -> float:
        """8 d dv a token forward, 16 backward; of the causal form without what a chunk's tokens do to each other."""
        return 24.0 * HEADS * self.tokens * self.dim**2

    def bytes(self) -> float:
        """q, k, v read in each direction, o written, its gradient read, three gradients written."""
        return 4.0 * HEADS * self.tokens * self.dim * (6 + 2 + 3)

    def tiny(self) -> Case:
        return Case(self.kind, 16, self.dim)

    def inputs(self, seed: int, device: str) -> tuple[Any, ...]:
        """q, k, v, t, sin and cos [N, d], and as we keep them [N, d / 2], or None: each formulation has its own tables.

        q and k are of a linear layer's size at PyTorch's initialisation.
        """
        generator = torch.Generator(device).manual_seed(seed)
        make = partial(torch.randn, 1, HEADS, self.tokens, self.dim, generator=generator, device=device)
        q, k, v, t = 0.577 * make(), 0.577 * make(), make() + 1, make().abs()
        if self.kind == "causal":
            return q, k, v, t, None, None, None, None
        tables = pyelastic.rope_tables((self.side, self.side), self.dim, device=device)
        return q, k, v, t, *(x.repeat_interleave(2, 1) for x in tables), *tables


def case(case_id: str) -> Case:
    """The case of an id such as ``full-N3136-d64``."""
    kind, tokens, dim = re.fullmatch(r"(full|causal)-N(\d+)-d(\d+)", case_id).groups()  # type: ignore[union-attr]
    return Case(kind, int(tokens), int(dim))


def cases(full: bool, device: str) -> list[Case]:
    if not full:
        return [Case("full", 3136, 64), Case("causal", 2048, 64)]
    found = [Case("full", n, d) for n in (196, 256, 784, 3136, 12_544) for d in (32, 64, 96)]
    return found + [Case("causal", n, 64) for n in (512, 2048, 8192)]


def memory_only(full: bool) -> list[Case]:
    return []


# --- formulations ----------------------------------------------------------------------------------------------


def _features(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    norm = q.norm(dim=-1, keepdim=True)
    power = 3 * (0.5 + torch.tanh(norm))
    cube = k**3
    return (
        torch.cat([(F.relu(q) / norm) ** power, (F.relu(-q) / norm) ** power], -1),
        torch.cat([F.relu(cube), F.relu(-cube)], -1),
    )


def _rotated(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    halves = x.unflatten(-1, (2, -1))
    turned = torch.stack((-halves[..., 1::2], halves[..., ::2]), -1).flatten(-2)
    return (halves * cos[:, None] + turned * sin[:, None]).flatten(-2)


def official(q: Tensor, k: Tensor, v: Tensor, sin: Tensor, cos: Tensor, *_: Any) -> Tensor:
    """The released code's order of operations."""
    n = q.shape[-2]
    fq, fk = _features(q, k)
    z = 1 / (fq @ fk.mean(-2, keepdim=True).mT + EPS)
    kv = (_rotated(fk, sin, cos).mT * n**-0.5) @ (v * n**-0.5)
    return _rotated(fq, sin, cos) @ kv * z


def chunked(q: Tensor, k: Tensor, v: Tensor, *_: None) -> Tensor:
    """Causal: chunks of 64 tokens, states before each by a cumulative sum, no loop."""
    n = q.shape[-2]
    size = min(CHUNK, n)
    fq, fk = (f.unflatten(-2, (-1, size)) for f in _features(q, k))
    v = v.unflatten(-2, (-1, size))
    states, sums = fk.mT @ v, fk.sum(-2)
    before, before_z = states.cumsum(-3) - states, sums.cumsum(-2) - sums
    weights = (fq @ fk.mT).tril()
    tokens = torch.arange(1, n + 1, device=q.device).unflatten(0, (-1, size))
    d = (fq @ before_z[..., None])[..., 0] + weights.sum(-1) + EPS * tokens
    return ((fq @ before + weights @ v) / d[..., None]).flatten(-3, -2)


def softmax(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _ours(backend: str, q: Tensor, k: Tensor, v: Tensor, *tables: Tensor | None) -> Tensor:
    causal = tables[0] is None
    rope: dict[str, Any] = {} if causal else {"rope": "num", "rope_tables": tables[2:]}
    o = pyelastic.norm_linear_attention(q, k, v, causal=causal, layout="bhnd", backend=backend, **rope)
    assert isinstance(o, Tensor)
    return o


def _fla(q: Tensor, k: Tensor, v: Tensor, *_: None) -> Tensor:
    from fla.ops.linear_attn import chunk_linear_attn

    fq, fk = (f.transpose(1, 2) for f in _features(q, k))
    return chunk_linear_attn(fq, fk, v.transpose(1, 2), scale=1.0, normalize=True)[0].transpose(1, 2)


def loss(attention: Attention, q: Tensor, k: Tensor, v: Tensor, t: Tensor, *tables: Any) -> Tensor:
    return (attention(q, k, v, *tables).float() * t.float()).sum()


def softmax_loss(causal: bool, q: Tensor, k: Tensor, v: Tensor, t: Tensor, *tables: Any) -> Tensor:
    return (softmax(q, k, v, causal=causal) * t).sum()


# --- what the harness asks for ---------------------------------------------------------------------------------


def bfloat16(*inputs: Any) -> tuple[Any, ...]:
    return (*(x.bfloat16() for x in inputs[:4]), *inputs[4:])


def variants(case: Case, device: str) -> dict[str, Variant]:
    """Ours first; peers only where they are installed."""
    found = {}
    causal = case.kind == "causal"
    exact = CAUSAL if causal else FLOAT32
    for backend in ("cuda", "triton", "eager") if device == "cuda" else ("cpu", "eager"):
        found[f"pyelastic {backend}"] = Variant(partial(loss, partial(_ours, backend)), exact)
        if backend != "eager":
            found[f"pyelastic {backend}, bf16"] = Variant(partial(loss, partial(_ours, backend)), BFLOAT16, bfloat16)
    formulation, name = (chunked, "chunked torch") if causal else (official, "official")
    found[name] = Variant(partial(loss, formulation), exact)
    found[f"{name}, compiled"] = Variant(partial(loss, compiled(formulation)), exact)
    found["SDPA"] = Variant(partial(softmax_loss, causal), FLOAT32, truth=partial(_softmax_truth, causal))
    if causal and device == "cuda" and importlib.util.find_spec("fla"):
        found["flash-linear-attention"] = Variant(partial(loss, _fla), 1e-3)
    return found


def floor(q: Tensor, k: Tensor, v: Tensor, t: Tensor, *tables: Any) -> None:
    """The six products of a step, on features of some kind."""
    f = torch.cat((q, k), -1)
    s = f.mT @ v
    _ = f @ s
    _ = t @ s.mT
    ds = f.mT @ t
    _ = v @ ds.mT
    _ = f @ ds


def truth(*inputs: Any) -> tuple[Tensor, ...]:
    """The loss and its gradients by autograd in float64."""
    q, k, v, t, *tables = (None if x is None else x.double() for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = (chunked if tables[0] is None else official)(*leaves, *tables)
    value = (o * t).sum()
    return value.detach(), *torch.autograd.grad(value, leaves)


def _softmax_truth(causal: bool, *inputs: Any) -> tuple[Tensor, ...]:
    """The same of softmax attention, over pieces of the queries: all weights at once would be gigabytes."""
    q, k, v, t = (x.double() for x in inputs[:4])
    k, v = k.requires_grad_(), v.requires_grad_()
    value, grads_q, grads = torch.zeros((), dtype=torch.float64, device=q.device), [], [0 * k, 0 * v]
    for first in range(0, q.shape[-2], 1024):
        part = q[:, :, first : first + 1024].detach().requires_grad_()
        s = part @ k.mT * q.shape[-1] ** -0.5
        if causal:
            rows = first + torch.arange(part.shape[-2], device=q.device)
            s = s.masked_fill(torch.arange(k.shape[-2], device=q.device) > rows[:, None], -torch.inf)
        piece = (s.softmax(-1) @ v * t[:, :, first : first + 1024]).sum()
        made = torch.autograd.grad(piece, (part, k, v))
        value = value + piece.detach()
        grads_q.append(made[0])
        grads = [a + b for a, b in zip(grads, made[1:], strict=True)]
    return value, torch.cat(grads_q, -2), *(g.detach() for g in grads)
