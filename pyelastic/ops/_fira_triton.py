"""Launcher of fira's Triton kernels (triton_kernels/fira.py): groups of matrices, their tables, scratch and grids.

Matrices of one side and one alignment are stepped together, up to GROUP in four launches, or six where the limiter's
norm may have to be formed directly. Nothing here synchronises, and a group whose addresses, sizes and seeds have been
seen before finds its table on the device (_device_tables.py): it copies nothing and can be captured in a CUDA graph.
What changes from step to step is in device tensors (lr, step, factor) and arguments (betas, alpha, the scratch).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pyelastic.eager.fira import Flags
from pyelastic.ops import _device_tables
from pyelastic.ops._fira_cuda import may_cancel

NEVER = 1 << 62  # the first program of a matrix that is not there


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
    from pyelastic.triton_kernels import fira as kernels

    groups: dict[tuple[bool, bool, bool], list[_Matrix]] = {}
    for i, w in enumerate(params):
        if w.numel() == 0:
            steps[i].add_(1 if found_inf is None else (found_inf.view(()) <= 0).to(steps[i].dtype))
            continue
        gram = grams[i] if grams and grams[i].numel() and a_r != 0 else None
        seed = seeds[i] if flags & Flags.STOCHASTIC else 0
        state = [exp_avgs[i], exp_avg_sqs[i], *moment_scales[2 * i : 2 * i + 2], *remainders[i : i + 1]]
        matrix = _Matrix(w, grads[i], projectors[i], state, gram, limiter_norms[i], steps[i], left[i], seed)
        groups.setdefault((matrix.left, matrix.aligned, gram is not None), []).append(matrix)
    if not groups:
        return
    device = params[0].device
    factor, inf = (None if x is None else x.to(torch.float32) for x in (grad_factor, found_inf))
    numbers = (beta1, beta2, eps, weight_decay, gamma, a_r, a_n, a_s)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for (side, aligned, has_gram), matrices in groups.items():
            for first in range(0, len(matrices), kernels.GROUP):
                part = matrices[first : first + kernels.GROUP]
                options = {
                    "LEFT": side, "ALIGNED": aligned, "HAS_GRAM": has_gram, "HAS_REST": bool(remainders),
                    "EIGHT": bool(moment_scales), "HAS_FACTOR": factor is not None, "HAS_INF": inf is not None,
                }  # fmt: skip
                exact = may_cancel(a_r, a_s, grams)
                _launch(part, options, (lr if factor is None else factor, lr if inf is None else inf, lr), numbers,
                        Flags(flags), exact)  # fmt: skip
                for matrix in part:
                    matrix.finish()


class _Matrix:
    """Pointers and sizes of one matrix; what is not laid out for the kernels is stepped in a copy.

    ``state``: both moments, their scales if they are 8-bit, the remainder if there is one.
    """

    def __init__(
        self, w: Tensor, g: Tensor, p: Tensor, state: list[Tensor], gram: Tensor | None, norm: Tensor, step: Tensor,
        left: bool, seed: int,
    ) -> None:  # fmt: skip
        self.originals = [w, *state]
        self.work = [x if x.is_contiguous() else x.contiguous() for x in self.originals]
        if w.stride(1) == 1:
            self.work[0] = w
        self.g = g if g.stride(1) == 1 else g.contiguous()
        self.p = p.to(w.dtype).contiguous()
        self.gram = None if gram is None else gram.float().contiguous()
        self.norm, self.step, self.left, self.seed = norm, step, left, seed
        self.rank = p.shape[1] if left else p.shape[0]
        self.vectors, self.dim = (w.shape[1], w.shape[0]) if left else w.shape
        self.strides = (self.work[0].stride(0), self.g.stride(0))
        read = [*self.work, self.g, self.p, *([] if self.gram is None else [self.gram])]
        sizes = (self.vectors, self.dim, self.rank, *self.strides)
        self.aligned = all(n % 16 == 0 for n in sizes) and all(x.data_ptr() % 16 == 0 for x in read)

    def scratch(self) -> tuple[int, ...]:
        """Floats of R, stats, f and the scalars, each a multiple of 16."""
        return tuple(-(-n // 16) * 16 for n in (self.vectors * self.rank, 4 * self.vectors, self.vectors, 8))

    def tensors(self) -> list[Tensor]:
        return [*self.work, self.g, self.p, self.norm, self.step, *([] if self.gram is None else [self.gram])]

    def row(self, first: int, eight: bool) -> list[int]:
        """The matrix in its group's table; ``first``: where in the group's scratch its own begins."""
        at = [first]
        for n in self.scratch():
            at.append(at[-1] + n)
        w, m, v, *rest = (x.data_ptr() for x in self.work)
        m_scale, v_scale = (rest.pop(0), rest.pop(0)) if eight else (0, 0)
        return [
            w, self.g.data_ptr(), self.p.data_ptr(), at[0], m, v, m_scale, v_scale,
            0 if self.gram is None else self.gram.data_ptr(), rest[0] if rest else 0, at[1], at[2], at[3],
            self.norm.data_ptr(), self.step.data_ptr(), self.vectors, self.dim, self.rank, *self.strides,
            self.seed & 0xFFFFFFFF, (self.seed >> 32) & 0xFFFFFFFF, 0, 0,
        ]  # fmt: skip

    def finish(self) -> None:
        for original, copy in zip(self.originals, self.work, strict=True):
            if copy is not original:
                original.copy_(copy)


def _table(part: list[_Matrix], eight: bool, grids: list[list[int]], group: int) -> tuple[list[Tensor], list[int]]:
    """The group's rows, for each kernel the first program of each matrix, and the scratch; each kernel's programs.

    ``grids``: for each kernel the programs of each matrix.
    """
    device = part[0].g.device
    numbers, size = [], 0
    for x in part:
        numbers += x.row(size, eight)
        size += sum(x.scratch())
    rows, totals = len(numbers), []
    for programs in grids:
        total = 0
        for count in programs:
            numbers.append(total)
            total += count
        numbers += [NEVER] * (group - len(programs))
        totals.append(total)
    table = _device_tables.get(numbers, device, "fira", "triton")
    views = [table[:rows], *table[rows:].split(group), torch.empty(size, device=device)]
    # For the checked interpreter (tests/interpreted.py): kernels may touch these and no more. The view is this call's.
    views[0].points_to = [y for x in part for y in x.tensors()]
    return views, totals


def _launch(
    part: list[_Matrix], options: dict[str, bool], shared: tuple[Tensor, Tensor, Tensor], numbers: tuple[float, ...],
    flags: Flags, exact: bool,
) -> None:  # fmt: skip
    """``shared``: gradient factor, found_inf (anything where options say there is none) and lr."""
    import triton.language as tl
    from triton import cdiv

    from pyelastic.triton_kernels import fira as kernels

    beta1, beta2, eps, weight_decay, gamma, a_r, a_n, a_s = numbers
    w, m = part[0].work[:2]
    eight, gram, half = options["EIGHT"], options["HAS_GRAM"], w.itemsize == 2
    tile, narrow = (kernels.FIRA_CONFIGS[bits, options["ALIGNED"]] for bits in (8 * w.itemsize, 32))
    moment = kernels.MOMENTS_CONFIGS[eight, gram]
    grids = [
        [cdiv(x.vectors, tile[0]) * cdiv(x.rank, tile[1]) for x in part],
        [cdiv(x.vectors, moment[0]) for x in part],
        [cdiv(x.vectors, narrow[0]) for x in part],
        [cdiv(x.vectors, tile[0]) * cdiv(x.dim, tile[1]) for x in part],
    ]
    (table, *first, scratch), programs = _table(part, eight, grids, kernels.GROUP)
    p_factor, p_inf, lr = shared
    none = not flags & Flags.CORRECT_BIAS  # then both powers are 0 and the correction 1
    logs = [-math.inf if none or beta == 0 else math.log(beta) for beta in (beta1, beta2)]
    options = options | {
        "MAXIMIZE": bool(flags & Flags.MAXIMIZE), "PAPER": bool(flags & Flags.PAPER), "HAS_S": a_s != 0,
        "PER_MATRIX": bool(flags & Flags.PER_MATRIX), "COLLAPSE": bool(flags & Flags.COLLAPSE),
        "STOCHASTIC": bool(flags & Flags.STOCHASTIC), "BACK": a_n != 0 or (a_r != 0 and a_s != 0),
    }  # fmt: skip
    types = {"OPERAND": getattr(tl, str(w.dtype)[6:]), "MOMENT": getattr(tl, str(m.dtype)[6:])}

    def launch(kernel: Any, grid: int, *arguments: Any, blocks: Sequence[int], **how: int) -> None:
        known = options | types | dict(zip(("BLOCK_L", "BLOCK_N", "BLOCK_K"), blocks, strict=False))
        kernel[(grid,)](*arguments, **{k: v for k, v in known.items() if k in kernel.arg_names}, **how)

    def warps(config: Sequence[int]) -> dict[str, int]:
        return {"num_warps": config[3], "num_stages": config[4]}

    limits = (gamma, a_r, a_s, kernels.KAPPA[not gram and half] if a_r != 0 else math.inf)
    one = {"blocks": [kernels.LIMITER_BLOCK], "num_warps": kernels.LIMITER_WARPS}
    launch(kernels.project, programs[0], table, first[0], scratch, blocks=tile[:3], **warps(tile))
    launch(kernels.moments, programs[1], table, first[1], scratch, p_factor, p_inf, beta1, 1.0 - beta1, beta2,
           1.0 - beta2, eps, *logs, blocks=moment[:3], num_warps=moment[3])  # fmt: skip
    launch(kernels.limiter, len(part), table, scratch, p_factor, p_inf, lr, *logs, weight_decay, *limits, **one)
    if exact:
        launch(kernels.residual, programs[2], table, first[2], scratch, a_r, blocks=narrow[:3], **warps(narrow))
        launch(kernels.limiter_exact, len(part), table, scratch, p_factor, *limits, **one)
    how = warps(tile)
    if options["STOCHASTIC"] or (eight and half):
        how["num_warps"] = kernels.WIDE_WARPS
    launch(kernels.apply, programs[3], table, first[3], scratch, p_factor, p_inf, eps, a_n, a_r, blocks=tile[:3], **how)
