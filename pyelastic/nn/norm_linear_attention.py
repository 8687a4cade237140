"""Layers of norm-aware linear attention: NaLaFormer's block attention, and a causal one for language models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyelastic.eager.norm_linear_attention import statistics_dtype
from pyelastic.ops.norm_linear_attention import LinearAttentionState, norm_linear_attention
from pyelastic.ops.norm_linear_attention_step import empty_state, norm_linear_attention_step
from pyelastic.rope import rope_tables


class NormAwareLinearAttention(nn.Module):
    """NaLaFormer's attention on images: one projection to q, k, v and a gate, LEPE, layer norm, SiLU gate, projection.

    Loads the released code's weights (``qkvg``, ``lepe``, ``ln``, ``out_proj``); the attention itself has none.

    Args:
        dim: channels. num_heads: divides dim.
        options: further keyword arguments of ``norm_linear_attention`` for every call, such as ``norm_scale``.

    Source: Meng et al., NaLaFormer (arXiv 2506.21137) and its released code.
    """

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"NormAwareLinearAttention: dim is {dim} and num_heads {num_heads}; expected a multiple")
        self.num_heads, self.options = num_heads, options
        self.qkvg = nn.Linear(dim, 4 * dim)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.out_proj = nn.Linear(dim, dim)
        self.ln = nn.LayerNorm(dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """[B, N, H, d] each -> [B, N, H, d]."""
        o = norm_linear_attention(q, k, v, rope="num", rope_tables=tables, **self.options)
        assert isinstance(o, Tensor)
        return o

    def forward(self, x: Tensor, sin: Tensor | None = None, cos: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]; sin, cos [H W, d] or [H W, d / 2], by default those of the grid."""
        height, width = x.shape[2:]
        tokens = x.flatten(2).mT
        q, k, v, gate = self.qkvg(tokens).unflatten(-1, (4, self.num_heads, -1)).unbind(2)
        if sin is None or cos is None:
            sin, cos = rope_tables((height, width), q.shape[-1], device=x.device, dtype=statistics_dtype(x))
        image = v.flatten(2).mT.unflatten(-1, (height, width))
        lepe = self.lepe(image).flatten(2).mT
        o = self.attend(q, k, v, (sin, cos)).flatten(2)
        y = self.ln(o + lepe) * F.silu(gate.flatten(2))
        return self.out_proj(y).mT.unflatten(-1, (height, width))


class SoftmaxAttention(NormAwareLinearAttention):
    """The same block with softmax attention, RoPE on q and k: NaLaFormer's stages 3 and 4."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        q, k = (rotate(x.transpose(1, 2), *tables) for x in (q, k))
        return F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2)


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """RoPE: x [B, H, N, d] by the angles of sin, cos [N, d] or [N, d / 2]; pairs are (2j, 2j + 1)."""
    step = 2 * sin.shape[-1] // x.shape[-1]
    s, c = (t[:, ::step].to(x.dtype) for t in (sin, cos))
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)


class CausalNormAwareLinearAttention(nn.Module):
    """Causal norm-aware linear attention for language models, with RoPE and a state in place of a key-value cache.

    Args:
        dim: channels. num_heads: query heads, divides dim. num_kv_heads: key heads, divides num_heads; default all.
        max_positions: length of the RoPE tables; a longer text is an error on the CPU.
        gate: multiply by silu of a fourth projection.
        learned_power: lam, tau and norm_scale of each head are parameters, at first 3, 1/2 and 1 / sqrt(d).
        options: further keyword arguments of ``norm_linear_attention``.

    The authors' language model is not released: this is the op's causal form (ops/norm_linear_attention.py).
    """

    sin: Tensor
    cos: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        max_positions: int = 4096,
        gate: bool = True,
        learned_power: bool = True,
        bias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        kv = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or dim % num_heads or kv < 1 or num_heads % kv or dim // num_heads % 2:
            raise ValueError(
                f"CausalNormAwareLinearAttention: dim is {dim}, num_heads {num_heads} and num_kv_heads {kv}; expected "
                "dim a multiple of 2 num_heads, and num_heads one of num_kv_heads"
            )
        self.head_dim = dim // num_heads
        self.widths = [num_heads * self.head_dim, kv * self.head_dim, kv * self.head_dim]
        self.widths += [num_heads * self.head_dim] if gate else []
        self.num_heads, self.num_kv_heads, self.gated, self.options = num_heads, kv, gate, options
        self.qkvg = nn.Linear(dim, sum(self.widths), bias=bias)
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.out_proj = nn.Linear(dim, dim, bias=bias)
        if learned_power:
            self.lam = nn.Parameter(torch.full((num_heads,), 3.0))
            self.tau = nn.Parameter(torch.full((num_heads,), 0.5))
            self.norm_scale = nn.Parameter(torch.full((num_heads,), self.head_dim**-0.5))
        sin, cos = rope_tables(max_positions, self.head_dim)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("cos", cos, persistent=False)

    def _arguments(self, x: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
        parts = self.qkvg(x).split(self.widths, -1)
        heads = [p.unflatten(-1, (-1, self.head_dim)) for p in parts]
        powers = {n: getattr(self, n) for n in ("lam", "tau", "norm_scale") if hasattr(self, n)}
        return heads, {"rope": "num", "rope_tables": (self.sin, self.cos), **powers, **self.options}

    def _finish(self, o: Tensor, heads: list[Tensor]) -> Tensor:
        # Normalised first, so that the size of the values does not matter; then gated.
        o = self.norm(o)
        return self.out_proj((o * F.silu(heads[3]) if self.gated else o).flatten(-2))

    def forward(
        self, x: Tensor, state: LinearAttentionState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LinearAttentionState]:
        """x [B, N, dim] after the tokens of ``state`` -> ([B, N, dim], the state after them)."""
        heads, options = self._arguments(x)
        o, after = norm_linear_attention(
            *heads[:3], causal=True, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, **options
        )
        return self._finish(o, heads), after

    def empty_state(self, batch: int) -> LinearAttentionState:
        """The state before the first token."""
        weight = self.qkvg.weight
        double = weight.dtype == torch.float64
        return empty_state(
            batch, self.num_kv_heads, self.head_dim, self.head_dim, device=weight.device, double=double
        )

    @torch.no_grad()
    def step(self, x: Tensor, state: LinearAttentionState) -> Tensor:
        """The next tokens x [B, T, dim] -> [B, T, dim]; ``state`` is changed in place."""
        heads, options = self._arguments(x)
        q, k, v = heads[:3]
        return self._finish(norm_linear_attention_step(q, k, v, state, **options), heads)
