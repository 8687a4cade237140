"""Launcher of fira's CUDA kernels: scratch on the current stream, and four launches for each group of matrices (five
where the limiter's norm may have to be formed directly). A group's scratch is the next one's.

Matrices go to the matrix units where all their sizes, strides and addresses allow 16-byte copies; the others, and
float32, to float32 tiles. Nothing here synchronises or copies to the device, so a step can be captured in a CUDA graph.
Contract of the kernels: csrc/fira.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from pyelastic import _extension
from pyelastic.ops._binding import pointer
from pyelastic.ops._fira_matrix import Matrix, matrices, parts

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
GROUP = 16  # kFiraGroup
KERNELS = ("project", "moments", "residual", "coefficients", "apply")


def may_cancel(a_r: float, a_s: float, grams: Sequence[Tensor]) -> bool:
    """Whether |S|^2 can lose digits: with orthonormal bases kappa is at most 1 / (1 - a_r)^2, 16 at these bounds."""
    return a_s != 0 and a_r != 0 and (bool(grams) or 0.75 < a_r < 1.25)


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
    """The raw op ``fira_step.cuda``."""
    if not params:
        return
    module, emulated = _extension.load_cuda()
    device = params[0].device
    stream = 0 if emulated else torch.cuda.current_stream(device).cuda_stream
    kernels = [name for name in KERNELS if name != "residual" or may_cancel(a_r, a_s, grams)]
    with nullcontext() if emulated else torch.cuda.device(device):
        numbers = [None if x is None else x.to(torch.float32) for x in (grad_factor, found_inf)]
        scalars = [beta1, beta2, eps, weight_decay, gamma, a_r, a_n, a_s]
        kinds = (DTYPES[params[0].dtype], DTYPES.get(exp_avgs[0].dtype, 0))  # 8-bit: told by the scales
        head = (*kinds, lr.data_ptr(), *map(pointer, numbers))
        chosen: dict[bool, list[tuple[Matrix, tuple[int, ...]]]] = {True: [], False: []}
        for x in matrices(
            params, grads, exp_avgs, exp_avg_sqs, moment_scales, projectors, grams, limiter_norms, steps, remainders,
            found_inf, left, seeds,
        ):  # fmt: skip
            mma = _takes_mma(x)
            chosen[mma].append((x, _offsets(x, mma)))
        for mma, items in chosen.items():
            for part, size in parts(items, [offsets[-1] for _, offsets in items], GROUP):
                scratch = torch.empty(size, device=device)
                address, rows = scratch.data_ptr(), []
                for x, offsets in part:
                    rows.append(_descriptor(x, address, offsets, bool(moment_scales)))
                    address += 4 * offsets[-1]
                group = module.cuda_fira_group(rows, (head, scalars, flags, mma))
                for kernel in kernels:
                    getattr(module, f"cuda_fira_{kernel}")(group, stream)
                for x, _ in part:
                    x.finish()


def _takes_mma(x: Matrix) -> bool:
    """16-bit operands whose sizes, strides and addresses allow 16-byte copies."""
    w = x.work[0]
    if w.itemsize != 2 or (x.vectors if x.left else x.dim) % 8 or x.rank % 8 or x.strides[0] % 8 or x.strides[1] % 8:
        return False
    return not (w.data_ptr() | x.g.data_ptr() | x.p.data_ptr()) % 16


def _offsets(x: Matrix, mma: bool) -> tuple[int, ...]:
    """Where in a matrix's scratch stats, f, scalars, C (16-bit; else it is R) and R begin, and its size, in floats."""
    r = x.vectors * x.rank
    at = [0]
    for n in (4 * x.vectors, x.vectors, 6, (r + 1) // 2 if mma else 0, r):
        at.append(at[-1] + (n + 31) // 32 * 32)
    return tuple(at)


def _descriptor(
    x: Matrix, scratch: int, offsets: tuple[int, ...], scaled: bool
) -> tuple[list[int], tuple[int, ...], int, bool]:
    stats, f, scalars, c, r = (scratch + 4 * n for n in offsets[:5])
    w, m, v, *rest = (tensor.data_ptr() for tensor in x.work)
    m_scale, v_scale = rest[:2] if scaled else (0, 0)
    remainder = rest[-1] if len(rest) % 2 else 0
    gram = 0 if x.gram is None else x.gram.data_ptr()
    pointers = [w, x.g.data_ptr(), x.p.data_ptr(), r, c if offsets[3] < offsets[4] else r, m, v, m_scale, v_scale, gram,
                remainder, stats, f, scalars, x.norm.data_ptr(), x.step.data_ptr()]  # fmt: skip
    rows, columns = (x.dim, x.vectors) if x.left else (x.vectors, x.dim)
    return pointers, (rows, columns, x.rank, x.strides[1], x.strides[0]), x.seed, x.left
