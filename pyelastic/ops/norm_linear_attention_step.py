"""Decoding with norm-aware linear attention: a few tokens against a state that is changed in place.

Formulas: ops/norm_linear_attention.py; a step is its causal form from ``state``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyelastic import _dispatch, _errors
from pyelastic.ops import _norm_linear_attention_checks as checks
from pyelastic.ops import norm_linear_attention as op
from pyelastic.ops._norm_linear_attention import Inputs, LinearAttentionState

OP = checks.OP


def norm_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearAttentionState,
    *,
    mode: str = "split",
    lam: float | Tensor = 3.0,
    tau: float | Tensor = 0.5,
    norm_scale: float | Tensor = 1.0,
    key_power: float = 3.0,
    alpha: float = 20.0,
    eps: float = 1e-6,
    eps_mode: str = "mean",
    norm_eps: float = 1e-6,
    rope: str | None = None,
    rope_tables: tuple[Tensor, Tensor] | None = None,
    gate: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The outputs of the next T tokens of each sequence; ``state`` then includes them. No gradients.

    Reads nothing back from a GPU, so it can be captured in a CUDA graph and replayed: positions are state.tokens.

    Args:
        q: [B, T, Hq, d]. k: [B, T, Hk, d]. v: [B, T, Hk, dv]. gate: [B, T, Hq, dv] or None.
        state: of the tokens so far, changed in place: s [B, Hk, 2 d, dv], z [B, Hk, 2 d], tokens [B], contiguous.
            ``empty_state`` makes one of no tokens.
        rope_tables: needed with ``rope``, for all positions that will occur.
        The others: as ``norm_linear_attention``.

    Returns:
        o [B, T, Hq, dv] in q's dtype.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what was got.
        BackendError: the backend asked for cannot run the call.
    """
    _errors.check_choice(OP, "mode", mode, tuple(op.MODES))
    _errors.check_choice(OP, "eps_mode", eps_mode, ("mean", "sum"))
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        _errors.check_rank(OP, name, tensor, 4, "[B, T, H, d]")
    checks.check_tensors(q, k, v, gate, True, None)
    checks.check_numbers(key_power=key_power, alpha=alpha, eps=eps, norm_eps=norm_eps)
    if rope is not None and rope_tables is None:
        raise ValueError(f"{OP}: rope is {rope!r} and rope_tables is None; pass pyelastic.rope_tables(positions, d)")
    params = checks.head_parameters(q, lam=lam, tau=tau, norm_scale=norm_scale)
    sin, cos = checks.make_rope(q, k, rope, rope_tables, None)
    flags = (op.MODES[mode], rope == "both", True, eps_mode == "mean")
    scalars = (float(key_power), float(alpha), float(eps), float(norm_eps))
    inputs = Inputs(q, k, v, params, gate, sin, cos, None, None, None, None, None, *flags, *scalars)
    inputs = checks.with_state(inputs, state, None)
    for name, tensor in zip(("s", "z"), state[:2], strict=True):
        if not tensor.is_contiguous():
            raise ValueError(f"{OP}: state.{name} has strides {tensor.stride()}; expected a contiguous tensor")
    chosen = _dispatch.resolve(OP, op.call_of(inputs), backend)
    with torch.no_grad():
        o: Tensor = chosen.run.step(  # type: ignore[union-attr]
            q, k, v, params, gate, sin, cos, state.tokens, state.s, state.z, flags[0], flags[1], flags[3], *scalars
        )
    return o


def empty_state(
    batch: int, kv_heads: int, dim: int, v_dim: int, *, device: torch.device | str | None = None, double: bool = False
) -> LinearAttentionState:
    """The state before the first token: zeros, for heads of ``dim`` and values of ``v_dim``; float64 if ``double``."""
    dtype = torch.float64 if double else torch.float32
    return LinearAttentionState(
        torch.zeros(batch, kv_heads, 2 * dim, v_dim, dtype=dtype, device=device),
        torch.zeros(batch, kv_heads, 2 * dim, dtype=dtype, device=device),
        torch.zeros(batch, dtype=torch.int64, device=device),
    )
