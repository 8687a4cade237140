"""Launcher of fira's Triton kernels (triton_kernels/fira.py): strides, scratch and grids.

Nothing here synchronises. Matrices of a call are stepped one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from pyelastic.eager.fira import Flags
from pyelastic.ops._fira_cuda import may_cancel


def _vectors(x: Tensor, left: bool) -> tuple[int, int]:
    """Strides of x along vectors and along coordinates."""
    return (x.stride(1), x.stride(0)) if left else (x.stride(0), x.stride(1))


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
    """The raw op ``fira_step.triton``."""
    if not params:
        return
    import triton

    from pyelastic.triton_kernels import fira as kernels

    device = params[0].device
    paper = bool(flags & Flags.PAPER)
    skip = torch.zeros((), dtype=torch.bool, device=device) if found_inf is None else found_inf.view(()) > 0
    factor = torch.ones((), device=device) if grad_factor is None else grad_factor.view(())
    factor = factor.double()
    factor = -factor if flags & Flags.MAXIMIZE else factor
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for i, w in enumerate(params):
            taken = steps[i] + 1
            if w.numel() == 0:
                steps[i].copy_(torch.where(skip, steps[i], taken))
                continue
            t, correction = taken.double(), torch.ones((), dtype=torch.float64, device=device)
            if flags & Flags.CORRECT_BIAS:
                correction = torch.sqrt(1.0 - beta2**t) / (1.0 - beta1**t)
            one = torch.ones_like(correction)
            scalars = torch.stack([
                factor, correction if paper else one, skip.double(), lr if paper else lr * correction,
                1.0 - lr * weight_decay, t, torch.zeros_like(t), torch.zeros_like(t),
            ]).float()  # fmt: skip
            side, m, v = left[i], exp_avgs[i], exp_avg_sqs[i]
            p = projectors[i].to(w.dtype)
            rank = p.shape[1] if side else p.shape[0]
            vectors, dim = (w.shape[1], w.shape[0]) if side else w.shape
            p_strides = (p.stride(0), p.stride(1)) if side else (p.stride(1), p.stride(0))
            originals = [m, v, *moment_scales[2 * i : 2 * i + 2]]
            m, v, *scales = work = [x if x.is_contiguous() else x.contiguous() for x in originals]
            eight = bool(scales)
            m_scale, v_scale = scales or (m, v)
            r = torch.empty_like(m, dtype=torch.float32)
            r_strides = _vectors(r, side)
            stats = torch.empty(4, vectors, device=device)
            x_strides = _vectors(grads[i], side)
            block_l, block_n, block_k, warps, stages = kernels.FIRA_CONFIGS[8 * w.itemsize]
            options = {"num_warps": warps, "num_stages": stages}
            blocks = {"BLOCK_L": block_l, "BLOCK_N": block_n, "BLOCK_K": block_k}
            kernels.project[(triton.cdiv(vectors, block_l), triton.cdiv(rank, block_n))](
                grads[i], p, r, stats, vectors, dim, rank, *x_strides, *p_strides, *r_strides, **blocks, **options
            )
            gram = grams[i].float().contiguous() if grams and grams[i].numel() and a_r != 0 else None
            moments_l, moments_n, moments_k, moments_warps = kernels.MOMENTS_CONFIGS[eight, gram is not None]
            kernels.moments[(triton.cdiv(vectors, moments_l),)](
                r, m, v, m_scale, v_scale, r if gram is None else gram, stats, scalars, vectors, rank, *r_strides,
                beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, HAS_GRAM=gram is not None, EIGHT=eight,
                BLOCK_L=moments_l, BLOCK_N=moments_n, BLOCK_K=moments_k, num_warps=moments_warps,
            )  # fmt: skip
            f = torch.zeros(vectors, device=device)
            if a_s != 0:
                most = kernels.KAPPA[gram is None and w.dtype != torch.float32] if a_r != 0 else math.inf
                numbers = (gamma, a_r, a_s, most)
                choices: dict[str, int] = {"BLOCK": kernels.LIMITER_BLOCK, "num_warps": kernels.LIMITER_WARPS}
                choices |= {"PER_MATRIX": bool(flags & Flags.PER_MATRIX), "COLLAPSE": bool(flags & Flags.COLLAPSE)}
                kernels.limiter[(1,)](
                    stats, f, scalars, limiter_norms[i], vectors, *numbers, EXACT=False, **choices
                )  # fmt: skip
                if may_cancel(a_r, a_s, grams):
                    exact_l, exact_n, exact_k, exact_warps, exact_stages = kernels.FIRA_CONFIGS[32]
                    kernels.residual[(triton.cdiv(vectors, exact_l),)](
                        grads[i], p, r, stats, scalars, vectors, dim, rank, *x_strides, *p_strides, *r_strides, a_r,
                        BLOCK_L=exact_l, BLOCK_N=exact_n, BLOCK_K=exact_k, num_warps=exact_warps,
                        num_stages=exact_stages,
                    )  # fmt: skip
                    kernels.limiter[(1,)](
                        stats, f, scalars, limiter_norms[i], vectors, *numbers, EXACT=True, **choices
                    )  # fmt: skip
            stochastic = bool(flags & Flags.STOCHASTIC)
            if stochastic or (eight and w.itemsize == 2):
                options["num_warps"] = kernels.WIDE_WARPS
            rest = remainders[i] if remainders else None
            # Where an element lies in W counts for the noise, and is the layout of the remainder.
            rest_strides = (1, w.shape[1]) if side else (w.shape[1], 1)
            kernels.apply[(triton.cdiv(vectors, block_l), triton.cdiv(dim, block_n))](
                w, grads[i], w if rest is None else rest, p, r, m, v, m_scale, v_scale, f, scalars, vectors, dim, rank,
                *_vectors(w, side), *x_strides, *rest_strides, *p_strides, *r_strides, eps, a_n, a_r,
                seeds[i] & 0xFFFFFFFF, (seeds[i] >> 32) & 0xFFFFFFFF, BACK=a_n != 0 or (a_r != 0 and a_s != 0),
                EIGHT=eight, HAS_REST=rest is not None, STOCHASTIC=stochastic, **blocks, **options,
            )  # fmt: skip
            for original, copy in zip(originals, work, strict=True):
                if copy is not original:
                    original.copy_(copy)
            steps[i].copy_(torch.where(skip, steps[i], taken))
