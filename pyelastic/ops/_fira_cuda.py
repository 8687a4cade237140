"""Launcher of fira's CUDA kernels: scratch on the current stream, and four launches for each group of matrices (five
where the limiter's norm may have to be formed directly).

Matrices go to the matrix units where all their sizes, strides and addresses allow 16-byte copies; the others, and
float32, to float32 tiles. Nothing here synchronises or copies to the device, so a step can be captured in a CUDA graph.
Contract of the kernels: csrc/fira.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pyelastic import _extension
from pyelastic.ops._binding import pointer

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
        for i in range(len(params)):
            if params[i].numel() == 0:
                steps[i].add_(1 if found_inf is None else (found_inf <= 0).to(steps[i].dtype))
        entries = [i for i, p in enumerate(params) if p.numel()]
        prepared = {
            i: _Matrix(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], moment_scales[2 * i : 2 * i + 2],
                       projectors[i], grams, limiter_norms[i], steps[i], remainders, left[i], seeds[i], i)
            for i in entries
        }  # fmt: skip
        for mma in (True, False):
            chosen = [x for x in prepared.values() if x.mma == mma]
            for first in range(0, len(chosen), GROUP):
                part = chosen[first : first + GROUP]
                kinds = (DTYPES[params[0].dtype], DTYPES.get(exp_avgs[0].dtype, 0))  # 8-bit: told by the scales
                head = (*kinds, lr.data_ptr(), *map(pointer, numbers))
                group = [x.descriptor() for x in part]
                for kernel in kernels:
                    getattr(module, f"cuda_fira_{kernel}")(group, (head, scalars, flags, mma), stream)
                for x in part:
                    x.finish()


class _Matrix:
    """Pointers, sizes and scratch of one matrix; what is not laid out for the kernels is stepped in a copy."""

    def __init__(
        self, w: Tensor, g: Tensor, m: Tensor, v: Tensor, scales: Sequence[Tensor], p: Tensor, grams: Sequence[Tensor],
        norm: Tensor, step: Tensor, remainders: Sequence[Tensor], left: bool, seed: int, i: int,
    ) -> None:  # fmt: skip
        self.originals = [w, m, v, *scales] + ([remainders[i]] if remainders else [])
        self.scaled = bool(scales)
        self.work = [x if x.is_contiguous() else x.contiguous() for x in self.originals]
        if w.stride(1) == 1:
            self.work[0] = w
        self.g = g if g.stride(1) == 1 else g.contiguous()
        self.p = p.to(w.dtype).contiguous()
        self.gram = grams[i].float().contiguous() if grams and grams[i].numel() else None
        self.norm, self.step, self.left, self.seed = norm, step, left, seed
        self.rows, self.columns = w.shape
        self.rank = p.shape[1] if left else p.shape[0]
        vectors = self.columns if left else self.rows
        w = self.work[0]
        sizes = (self.columns, self.rank, w.stride(0), self.g.stride(0))
        addresses = [x.data_ptr() for x in (w, self.g, self.p)]
        self.mma = (
            w.dtype != torch.float32 and all(n % 8 == 0 for n in sizes) and all(a % 16 == 0 for a in addresses)
        )  # fmt: skip
        empty: Any = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=w.device)  # noqa: E731
        self.r = empty(*m.shape)
        self.c = empty(*m.shape, dtype=w.dtype) if self.mma else self.r
        self.stats, self.f, self.scalars = empty(4, vectors), empty(vectors), empty(6)

    def descriptor(self) -> tuple[list[int], list[int], int, bool]:
        w, m, v, *rest = self.work
        m_scale, v_scale = (rest.pop(0), rest.pop(0)) if self.scaled else (None, None)
        tensors = (w, self.g, self.p, self.r, self.c, m, v, m_scale, v_scale, self.gram, rest[0] if rest else None,
                   self.stats, self.f, self.scalars, self.norm, self.step)  # fmt: skip
        sizes = [self.rows, self.columns, self.rank, self.g.stride(0), w.stride(0)]
        return [pointer(x) for x in tensors], sizes, self.seed, self.left

    def finish(self) -> None:
        for original, copy in zip(self.originals, self.work, strict=True):
            if copy is not original:
                original.copy_(copy)
