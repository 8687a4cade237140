"""norm_linear_attention in plain PyTorch: the specification, a backend, and the oracle of the kernels' gradients.

Per sequence; the causal form walks over chunks of tokens with the state carried. Formulas:
ops/norm_linear_attention.py; arguments: ops/_norm_linear_attention.py.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

# Tokens whose mutual weights exist at once in the causal form.
CHUNK = 64
SPLIT, COSINE, POLA, POLA_OPPOSITE, MALA = range(5)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """What features, sums and gradients are computed in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def power(base: Tensor, exponent: Tensor | float) -> Tensor:
    """base^exponent for base >= 0 and exponent > 0, with a gradient of 0, not NaN or infinity, where base is 0."""
    zero = base == 0  # and not base > 0, which would drop a NaN
    return torch.where(zero, 0.0, torch.where(zero, 1.0, base) ** exponent)


def _by_sign(x: Tensor, magnitude: Tensor) -> Tensor:
    """[magnitude where x > 0; magnitude where x < 0] along the last dimension, zeros elsewhere; a NaN in both."""
    return torch.cat((torch.where(x <= 0, 0.0, magnitude), torch.where(x >= 0, 0.0, magnitude)), -1)


def _by_angle(direction: Tensor, magnitude: Tensor, alpha: float) -> Tensor:
    angle = math.pi / 4 * torch.tanh(alpha * direction)
    return torch.cat((magnitude * angle.cos(), magnitude * angle.sin()), -1)


def _norm(x: Tensor, norm_eps: float) -> Tensor:
    """sqrt(|x|^2 + norm_eps^2) [..., 1]; without norm_eps, 1 for a zero row, whose direction is 0 either way."""
    square = x.square().sum(-1, keepdim=True) + norm_eps**2
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 1.0)


def query_features(q: Tensor, params: Tensor | None, map: int, alpha: float, norm_eps: float) -> Tensor:
    """phi_q [N, H, F] of q [N, H, d]."""
    if map == MALA:
        return torch.nn.functional.elu(q) + 1
    assert params is not None  # checked by the door
    if map in (POLA, POLA_OPPOSITE):
        return _by_sign(q if map == POLA else -q, power(q.abs(), params))
    lam, tau, norm_scale = params[:, :, None]  # [H, 1] each
    r = _norm(q, norm_eps)
    u = q / r
    w = power(u.abs(), lam * (tau + torch.tanh(norm_scale * r)))
    return _by_sign(q, w) if map == SPLIT else _by_angle(u, w, alpha)


def key_features(k: Tensor, params: Tensor | None, map: int, key_power: float, alpha: float, norm_eps: float) -> Tensor:
    """phi_k [N, H, F] of k [N, H, d]."""
    if map == MALA:
        return torch.nn.functional.elu(k) + 1
    if map in (POLA, POLA_OPPOSITE):
        assert params is not None
        return _by_sign(k, power(k.abs(), params))
    m = power(k.abs(), key_power)
    return _by_sign(k, m) if map == SPLIT else _by_angle(k / _norm(k, norm_eps), m, alpha)


def rotate(features: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """RoPE on each d-wide half of features [N, H, F]: pairs (2j, 2j + 1) by the angles of sin, cos [N, d / 2]."""
    pairs = features.unflatten(-1, (-1, sin.shape[-1], 2))
    a, b = pairs[..., 0], pairs[..., 1]
    s, c = sin[:, None, None, :], cos[:, None, None, :]
    return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-3)


def _heads(x: Tensor, count: int) -> Tensor:
    """[N, Hk, .] repeated to the query heads [N, count, .]."""
    return x.repeat_interleave(count // x.shape[1], 1)


def _sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: Tensor | None,
    sin: Tensor | None,
    cos: Tensor | None,
    start: Tensor | int,
    count: Tensor | int,
    s: Tensor,
    z: Tensor,
    map: int,
    rope_both: bool,
    causal: bool,
    mean: bool,
    key_power: float,
    alpha: float,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence: q [N, H, d], k [M, Hk, d], v [M, Hk, dv], s [Hk, R, dv], z [Hk, F] -> o, s, z after it."""
    pola = map in (POLA, POLA_OPPOSITE)
    fq = query_features(q, params, map, alpha, norm_eps)
    fk = key_features(k, params if pola else None, map, key_power, alpha, norm_eps)
    gq, gk = fq, fk  # of the numerator
    if sin is not None and cos is not None:
        at = start + torch.arange(max(len(q), len(k)), device=q.device)
        sin, cos = sin[at], cos[at]
        gq, gk = rotate(fq, sin[: len(q)], cos[: len(q)]), rotate(fk, sin[: len(k)], cos[: len(k)])
        if rope_both:
            fq, fk = gq, gk
    heads = q.shape[1]
    if map == MALA:
        s = s + torch.cat((torch.einsum("mhf,mhd->hfd", gk, v), v.sum(0)[:, None]), 1)
        z = z + fk.sum(0)
        return _mala(gq, fq, s, z, count + len(k), eps), s, z
    if not causal:
        s, z = s + torch.einsum("mhf,mhd->hfd", gk, v), z + fk.sum(0)
        full_s, full_z = (x.repeat_interleave(heads // x.shape[0], 0) for x in (s, z))
        total = (count + len(k)) if mean else 1
        denominator = torch.einsum("nhf,hf->nh", fq, full_z) + eps * total
        return torch.einsum("nhf,hfd->nhd", gq, full_s) / denominator[..., None], s, z
    outputs = []
    for first in range(0, len(q), CHUNK):
        at_ = slice(first, first + CHUNK)
        made, s, z = _chunk(gq[at_], gk[at_], fq[at_], fk[at_], v[at_], s, z)
        numerator, denominator = made
        tokens = count + first + 1 + torch.arange(len(denominator), device=q.device, dtype=q.dtype) if mean else None
        denominator = denominator + (eps if tokens is None else eps * tokens[:, None])
        outputs.append(numerator / denominator[..., None])
    return torch.cat(outputs) if outputs else q.new_zeros(0, heads, v.shape[-1]), s, z


def _chunk(
    gq: Tensor, gk: Tensor, fq: Tensor, fk: Tensor, v: Tensor, s: Tensor, z: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Numerators and denominators of a chunk of tokens, and the state after it."""
    heads = gq.shape[1]
    weights = torch.einsum("nhf,mhf->hnm", gq, _heads(gk, heads)).tril()
    repeated = [x.repeat_interleave(heads // x.shape[0], 0) for x in (s, z)]
    numerator = torch.einsum("hnm,mhd->nhd", weights, _heads(v, heads))
    numerator = numerator + torch.einsum("nhf,hfd->nhd", gq, repeated[0])
    sums = _heads(fk.cumsum(0), heads) + repeated[1]
    denominator = (fq * sums).sum(-1)
    return (numerator, denominator), s + torch.einsum("mhf,mhd->hfd", gk, v), z + fk.sum(0)


def _mala(gq: Tensor, fq: Tensor, s: Tensor, z: Tensor, count: Tensor | int, eps: float) -> Tensor:
    """MALA's readout of s [Hk, d + 1, dv], whose last row is the sum of the values, for ``count`` tokens."""
    heads, d = gq.shape[1:]
    s, z = (x.repeat_interleave(heads // x.shape[0], 0) for x in (s, z))
    scale = d**-0.5 / count
    weight = torch.einsum("nhf,hf->nh", fq, z)[..., None] * scale
    numerator = torch.einsum("nhf,hfd->nhd", gq, s[:, :-1]) * scale
    return (1 + 1 / (weight + eps)) * numerator - weight * s[:, -1] / count


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: Tensor | None,
    gate: Tensor | None,
    sin: Tensor | None,
    cos: Tensor | None,
    start: Tensor | None,
    cu_seqlens: Tensor | None,
    s0: Tensor | None,
    z0: Tensor | None,
    count0: Tensor | None,
    map: int,
    rope_both: bool,
    causal: bool,
    mean: bool,
    key_power: float,
    alpha: float,
    eps: float,
    norm_eps: float,
    final_state: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, N, H, dv] in q's dtype, and the states s [sequences, Hk, R, dv], z [sequences, Hk, F] at the end."""
    dtype = statistics_dtype(q)
    features = k.shape[-1] * (1 if map == MALA else 2)
    rows = features + (map == MALA)
    if cu_seqlens is None:
        parts: list[Any] = [(q[i], k[i], v[i]) for i in range(len(q))]
    else:
        bounds = cu_seqlens.tolist()
        spans = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        parts = [(q[0, span], k[0, span], v[0, span]) for span in spans]
    outputs, states, sums = [], [], []
    options = (map, rope_both, causal, mean, key_power, alpha, eps, norm_eps)
    params = None if params is None else params.to(dtype)
    tables = [None if t is None else t.to(dtype) for t in (sin, cos)]
    for i, part in enumerate(parts):
        s = k.new_zeros(k.shape[-2], rows, v.shape[-1], dtype=dtype) if s0 is None else s0[i]
        z = k.new_zeros(k.shape[-2], features, dtype=dtype) if z0 is None else z0[i]
        begin = 0 if start is None else start[i]
        count = 0 if count0 is None else count0[i].to(dtype)  # an int64 tensor times a float is float32
        qkv = (x.to(dtype) for x in part)
        o, s, z = _sequence(*(*qkv, params, *tables, begin, count, s, z, *options))
        outputs.append(o)
        states.append(s)
        sums.append(z)
    if cu_seqlens is None:
        o = torch.stack(outputs) if outputs else q.new_zeros(0, q.shape[1], q.shape[2], v.shape[-1], dtype=dtype)
    else:
        o = torch.cat(outputs)[None] if outputs else q.new_zeros(1, 0, q.shape[2], v.shape[-1], dtype=dtype)
    if gate is not None:
        o = o * torch.nn.functional.silu(gate.to(dtype))
    empty = [(0, k.shape[-2], rows, v.shape[-1]), (0, k.shape[-2], features)]
    ends = [torch.stack(x) if x else k.new_zeros(e, dtype=dtype) for x, e in zip((states, sums), empty, strict=True)]
    return o.to(q.dtype), ends[0], ends[1]
