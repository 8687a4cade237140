"""Other feature maps on norm_linear_attention's kernels: PolaFormer and MALA.

A map is a few lines of features and their gradient in each kernel (csrc/norm_linear_attention.h: FeatureMap); state,
RoPE, tiles and passes are those of ops/norm_linear_attention.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyelastic import _errors
from pyelastic.eager.norm_linear_attention import MALA, POLA, POLA_OPPOSITE, statistics_dtype
from pyelastic.ops import _norm_linear_attention_checks as checks
from pyelastic.ops._norm_linear_attention import Inputs
from pyelastic.ops.norm_linear_attention import attend


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, params: Tensor | None, rope: Any, map: int, eps: float, causal: bool
) -> Inputs:
    sin, cos = rope
    return Inputs(
        q, k, v, params, None, sin, cos, None, None, None, None, None, map, False, causal, True, 1.0, 0.0, eps, 0.0
    )


def polaformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    power: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    causal: bool = False,
    backend: str = "auto",
) -> Tensor:
    """PolaFormer's polarity-aware linear attention (Meng et al., arXiv 2501.15061).

    With x+ = relu(x / scale)^power and x- = relu(-x / scale)^power, the first half of the values is attended with the
    weights q+ . k+ + q- . k-, the second with q+ . k- + q- . k+, each normalised.

    Args:
        q, k: [B, N, H, d]. v: [B, N, H, dv], dv even. power, scale: [H, d], positive; both get gradients.
        eps: added to the denominators, means over the keys. causal: token i attends to tokens up to i.

    Returns:
        [B, N, H, dv] in q's dtype.

    Raises:
        ValueError, TypeError: an argument is wrong. BackendError: the backend asked for cannot run the call.
    """
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        _errors.check_rank(checks.OP, name, tensor, 4, "[B, N, H, d]")
    checks.check_tensors(q, k, v, None, causal, None)
    heads, dim = q.shape[2:]
    if k.shape[2] != heads or v.shape[3] % 2:
        got = f"q is {list(q.shape)}, k is {list(k.shape)} and v is {list(v.shape)}"
        raise ValueError(f"{checks.OP}: {got}; PolaFormer needs as many key heads, and an even dv")
    given = {"power": power} if scale is None else {"power": power, "scale": scale}
    for name, tensor in given.items():
        if tensor.shape != (heads, dim):
            raise ValueError(f"{checks.OP}: {name} is {list(tensor.shape)}; expected {[heads, dim]}")
    if scale is not None:
        q, k = q / scale.to(q.dtype), k / scale.to(k.dtype)
    powers = power.to(statistics_dtype(q))
    halves = []
    for map, part in zip((POLA, POLA_OPPOSITE), v.chunk(2, -1), strict=True):
        inputs = _inputs(q, k, part, powers, (None, None), map, eps, causal)
        halves.append(attend(inputs, False, "bnhd", backend))
    return torch.cat(halves, -1)


def mala_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rope_tables: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """MALA, magnitude-aware linear attention (Fan et al., arXiv 2507.00698), bidirectional.

    With phi = elu + 1, means over the tokens and x_i = phi(q_i) . mean phi(k) / sqrt(d)::

        o_i = (1 + 1 / (x_i + eps)) (R phi(q_i)) . mean(R phi(k) v^T) / sqrt(d) - x_i mean(v)

    Args:
        q, k: [B, N, H, d]. v: [B, N, H, dv]. rope_tables: sin, cos [N, d / 2] or [N, d], for the numerator.

    Returns:
        [B, N, H, dv] in q's dtype.

    Raises:
        ValueError, TypeError: an argument is wrong. BackendError: the backend asked for cannot run the call.
    """
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        _errors.check_rank(checks.OP, name, tensor, 4, "[B, N, H, d]")
    checks.check_tensors(q, k, v, None, False, None)
    rope = checks.make_rope(q, k, None if rope_tables is None else "num", rope_tables, None)
    made: Tensor = attend(_inputs(q, k, v, None, rope, MALA, eps, False), False, "bnhd", backend)
    return made
