"""Fira's step in plain torch, matrix by matrix: the specification, and a backend that runs anywhere.

Vector view: a matrix is L vectors of length d. With the projector on the right (``left`` False) the vectors are the
rows of G [m, n], so L = m, d = n; on the left they are its columns, so L = n, d = m. X [L, d], P [d, r], R = X P::

    m <- b1 m + (1 - b1) R,  v <- b2 v + (1 - b2) R^2,  N = m / (sqrt(v) + eps)       (moments of the shape of R)
    phi_j = |N_j| / (|R_j| + 1e-8)                      one factor a vector, or one for the matrix (PER_MATRIX)
    S = phi (X - a_r R P^T);  s = |S|_F
    lim = max(s / (s_prev + 1e-8), gamma) / gamma, or 1 where there is no s_prev;  s_prev <- s / lim
    W <- (1 - lr wd) (W - step (a_n N P^T + a_s S / lim))

With c = sqrt(1 - b2^t) / (1 - b1^t): ``step = lr c``; under PAPER N is multiplied by c and ``step = lr``. The three
scalars make the forms: (alpha, alpha, 1) the published package, (1, alpha, alpha) the paper's Algorithm 1,
(0, alpha, 0) GaLore, (0, 0, sqrt(alpha)) an APOLLO-like form without a way back from the subspace.

N is computed from the moments as they are stored, so with 16- and 8-bit moments too the state says all.
Source: Chen et al. 2024, arXiv 2410.01623, Algorithm 1, and the published package fira 1.0.2 (behaviour).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntFlag

import torch
from torch import Tensor

NORM_EPS = 1e-8  # beside |R_j| and beside s_prev
BLOCK = 128  # subspace coordinates of one vector that share a scale of 8-bit moments


class Flags(IntFlag):
    """Options of a step, as one integer for the raw ops."""

    PAPER = 1  # bias correction inside N, hence inside phi and the limiter
    CORRECT_BIAS = 2
    MAXIMIZE = 4
    COLLAPSE = 8  # official limiter: a zero gradient leaves s_prev = 0, and the residual with it
    PER_MATRIX = 16
    STOCHASTIC = 32  # round bfloat16 weights stochastically


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a step on ``x`` computes in: float32, for float64 float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- 8-bit moments ---------------------------------------------------------------------------------------------


def _blocks(x: Tensor) -> tuple[Tensor, int]:
    """[L, r] padded with zeros to [L, blocks, BLOCK]."""
    count = -(-x.shape[1] // BLOCK)
    return torch.nn.functional.pad(x, (0, count * BLOCK - x.shape[1])).view(x.shape[0], count, BLOCK), count


def quantize(x: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes [L, r] and scales [L, ceil(r / 128)] of moments [L, r] in the vector view.

    Signed: int8 ``127 sign(x) sqrt(|x| / a)``, a the largest |x| of the block. Unsigned: uint8 ``255 (x / a)^(1/4)``,
    at least 1 where x > 0, so that no second moment becomes zero under a first one that did not.
    """
    blocks, _ = _blocks(x)
    scale = blocks.abs().amax(2)
    safe = torch.where(scale > 0, scale, 1.0)[..., None]
    if signed:
        code = torch.round(127.0 * torch.sign(blocks) * torch.sqrt(blocks.abs() / safe))
    else:
        code = torch.round(255.0 * torch.sqrt(torch.sqrt(blocks / safe)))
        code = torch.where((blocks > 0) & (code < 1), 1.0, code)
    code = torch.nan_to_num(code)  # a block that is not finite says so by its scale
    return code.flatten(1)[:, : x.shape[1]].to(torch.int8 if signed else torch.uint8), scale


def dequantize(code: Tensor, scale: Tensor) -> Tensor:
    """The moments [L, r] that codes and scales stand for, in the scales' dtype."""
    signed = code.dtype == torch.int8
    y = code.to(scale.dtype) / (127.0 if signed else 255.0)
    y = y * y.abs() if signed else y.square().square()
    return y * scale.repeat_interleave(BLOCK, 1)[:, : code.shape[1]]


# --- stochastic rounding ----------------------------------------------------------------------------------------


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash (Wellons' lowbias32), on int64 tensors that hold 32-bit words."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def noise(seed: int, step: Tensor, count: int, first: int = 0) -> Tensor:
    """16 random bits (int64) for each of ``count`` elements from ``first`` on: of (seed, step, index) alone."""
    key = _mix(step.to(torch.int64) & 0xFFFFFFFF)
    key = _mix(((seed >> 32) & 0xFFFFFFFF) ^ key)
    key = _mix((seed & 0xFFFFFFFF) ^ key)
    index = torch.arange(first, first + count, device=step.device)
    return _mix((index & 0xFFFFFFFF) ^ _mix((index >> 32) ^ key)) & 0xFFFF


def round_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """float32 ``x`` to bfloat16, up with the probability of what is cut off; not finite stays as it is."""
    words = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    raised = ((words + bits.view(x.shape)) & 0xFFFF0000).to(torch.uint32).view(torch.float32)
    return torch.where(x.isfinite(), raised, x).to(torch.bfloat16)


# --- the step ---------------------------------------------------------------------------------------------------


def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    moment_scales: Sequence[Tensor],
    projectors: Sequence[Tensor],
    grams: Sequence[Tensor],
    limiter_norms: Sequence[Tensor],
    steps: Sequence[Tensor],
    remainders: Sequence[Tensor],
    lr: Tensor,
    grad_factor: Tensor | None,
    found_inf: Tensor | None,
    left: Sequence[bool],
    seeds: Sequence[int],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    gamma: float,
    a_r: float,
    a_n: float,
    a_s: float,
    flags: int,
) -> None:
    """One step, in place, of every matrix; the arguments of the raw op ``fira_step`` (pyelastic.ops.fira)."""
    for i, w in enumerate(params):
        dtype = compute_dtype(w)

        def vectors(x: Tensor, i: int = i) -> Tensor:
            return x.mT if left[i] else x

        x = vectors(grads[i]).to(dtype)
        if grad_factor is not None:
            x = x * grad_factor.to(dtype)
        if flags & Flags.MAXIMIZE:
            x = -x
        p = (projectors[i] if left[i] else projectors[i].mT).to(dtype)
        taken = steps[i] + 1
        correction = bias_correction(taken, beta1, beta2, flags)
        size = (lr if flags & Flags.PAPER else lr * correction).to(dtype)

        r = x @ p
        scales = moment_scales[2 * i : 2 * i + 2]
        n, stored = advance(r, exp_avgs[i], exp_avg_sqs[i], scales, left[i], beta1, beta2, eps)
        if flags & Flags.PAPER:
            n = n * correction.to(dtype)

        update = a_n * (n @ p.mT)
        if a_s != 0:
            dim = None if flags & Flags.PER_MATRIX else 1
            length = torch.linalg.vector_norm
            phi = length(n, dim=dim, keepdim=True) / (length(r, dim=dim, keepdim=True) + NORM_EPS)
            residual = phi * (x - a_r * (r @ p.mT))
            # float64: a sum over a whole matrix
            s = torch.linalg.vector_norm(residual, dtype=torch.float64)
            lim, kept = limit(s, limiter_norms[i].to(torch.float64), gamma, flags)
            update = update + a_s * residual / lim.to(dtype)
            stored.append((limiter_norms[i], kept))
        # wd after the step and on the stepped weight, as the published package does
        keep = 1.0 - lr.to(dtype) * weight_decay
        base = w.to(dtype) + remainders[i].to(dtype) if remainders else w.to(dtype)
        new = keep * (base - size * vectors(update))
        stored += rounded(new, w, remainders[i] if remainders else None, flags, seeds[i], taken)
        stored.append((steps[i], taken))
        store(stored, found_inf)


Stored = list[tuple[Tensor, Tensor]]  # what is to be written, and what into it


def bias_correction(taken: Tensor, beta1: float, beta2: float, flags: int) -> Tensor:
    """c of step number ``taken``, float64, or 1."""
    t = taken.to(torch.float64)
    return torch.sqrt(1.0 - beta2**t) / (1.0 - beta1**t) if flags & Flags.CORRECT_BIAS else torch.ones_like(t)


def advance(
    r: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scales: Sequence[Tensor], left: bool, beta1: float, beta2: float,
    eps: float,
) -> tuple[Tensor, Stored]:  # fmt: skip
    """N [L, r] of the moments after R [L, r], as they are stored, and what to store. ``scales``: of 8-bit moments."""
    dtype = r.dtype

    def vectors(x: Tensor) -> Tensor:
        return x.mT if left else x

    m, v = vectors(exp_avg), vectors(exp_avg_sq)
    m, v = (dequantize(m, scales[0]), dequantize(v, scales[1])) if scales else (m.to(dtype), v.to(dtype))
    m = beta1 * m + (1.0 - beta1) * r
    v = beta2 * v + (1.0 - beta2) * r.square()
    if scales:
        (m_code, m_scale), (v_code, v_scale) = quantize(m, signed=True), quantize(v, signed=False)
        m, v = dequantize(m_code, m_scale), dequantize(v_code, v_scale)
        stored = [(exp_avg, vectors(m_code)), (exp_avg_sq, vectors(v_code)), (scales[0], m_scale), (scales[1], v_scale)]
    else:
        m, v = m.to(exp_avg.dtype), v.to(exp_avg_sq.dtype)
        stored = [(exp_avg, vectors(m)), (exp_avg_sq, vectors(v))]
        m, v = m.to(dtype), v.to(dtype)
    return m / (torch.sqrt(v) + eps), stored


def rounded(
    new: Tensor, w: Tensor, remainder: Tensor | None, flags: int, seed: int, taken: Tensor, first: int = 0
) -> Stored:
    """``new`` in w's dtype. ``first``: the number of w's first element in its matrix, of stochastic bits."""
    if remainder is not None:
        return [(w, new.to(w.dtype)), (remainder, new - new.to(w.dtype).to(new.dtype))]
    if flags & Flags.STOCHASTIC:
        return [(w, round_stochastic(new, noise(seed, taken, w.numel(), first)))]
    return [(w, new)]


def store(stored: Stored, found_inf: Tensor | None) -> None:
    """Write, but where ``found_inf`` > 0: nothing is multiplied by it, as inf times 0 is NaN."""
    for target, value in stored:
        value = value.to(target.dtype)
        target.copy_(value if found_inf is None else torch.where(found_inf > 0, target, value))


def limit(s: Tensor, before: Tensor, gamma: float, flags: int) -> tuple[Tensor, Tensor]:
    """The norm-growth limiter: (lim, the norm to keep). ``before``: NaN where there is no history."""
    first = before.isnan()
    if not flags & Flags.COLLAPSE:
        first = first | (before == 0)
    lim = torch.ones_like(s)
    if gamma > 0:
        lim = torch.where(first, lim, torch.clamp(s / (before + NORM_EPS), min=gamma) / gamma)
    kept = s / lim
    if not flags & Flags.COLLAPSE:
        kept = torch.where(s == 0, before, kept)
    return lim, kept
