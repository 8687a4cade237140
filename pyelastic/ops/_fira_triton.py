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
from pyelastic.ops._fira_matrix import Matrix, matrices, parts

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

    groups: dict[tuple[bool, bool, bool], list[Matrix]] = {}
    for x in matrices(
        params, grads, exp_avgs, exp_avg_sqs, moment_scales, projectors, grams if a_r != 0 else (), limiter_norms,
        steps, remainders, found_inf, left, seeds if flags & Flags.STOCHASTIC else [0] * len(params),
    ):  # fmt: skip
        groups.setdefault((x.left, _is_aligned(x), x.gram is not None), []).append(x)
    if not groups:
        return
    device = params[0].device
    factor, inf = (None if x is None else x.to(torch.float32) for x in (grad_factor, found_inf))
    numbers = (beta1, beta2, eps, weight_decay, gamma, a_r, a_n, a_s)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for (side, aligned, has_gram), alike in groups.items():
            for part, size in parts(alike, [sum(_scratch(x)) for x in alike], kernels.GROUP):
                options = {
                    "LEFT": side, "ALIGNED": aligned, "HAS_GRAM": has_gram, "HAS_REST": bool(remainders),
                    "EIGHT": bool(moment_scales), "HAS_FACTOR": factor is not None, "HAS_INF": inf is not None,
                }  # fmt: skip
                exact = may_cancel(a_r, a_s, grams)
                _launch(part, options, (lr if factor is None else factor, lr if inf is None else inf, lr), numbers,
                        Flags(flags), exact, size)  # fmt: skip
                for matrix in part:
                    matrix.finish()


def _is_aligned(x: Matrix) -> bool:
    sizes = (x.vectors, x.dim, x.rank, *x.strides)
    read = [*x.work, x.g, x.p, *([] if x.gram is None else [x.gram])]
    return all(n % 16 == 0 for n in sizes) and all(tensor.data_ptr() % 16 == 0 for tensor in read)


def _scratch(x: Matrix) -> tuple[int, ...]:
    """Floats of R, stats, f and the scalars, each a multiple of 16."""
    return tuple(-(-n // 16) * 16 for n in (x.vectors * x.rank, 4 * x.vectors, x.vectors, 8))


def _row(x: Matrix, first: int, eight: bool) -> list[int]:
    """The matrix in its group's table; ``first``: where in the group's scratch its own begins."""
    at = [first]
    for n in _scratch(x):
        at.append(at[-1] + n)
    w, m, v, *rest = (tensor.data_ptr() for tensor in x.work)
    m_scale, v_scale = (rest.pop(0), rest.pop(0)) if eight else (0, 0)
    return [
        w, x.g.data_ptr(), x.p.data_ptr(), at[0], m, v, m_scale, v_scale, 0 if x.gram is None else x.gram.data_ptr(),
        rest[0] if rest else 0, at[1], at[2], at[3], x.norm.data_ptr(), x.step.data_ptr(), x.vectors, x.dim, x.rank,
        *x.strides, x.seed & 0xFFFFFFFF, (x.seed >> 32) & 0xFFFFFFFF, 0, 0,
    ]  # fmt: skip


def _table(part: list[Matrix], eight: bool, grids: list[list[int]], group: int) -> tuple[list[Tensor], list[int]]:
    """The group's rows, and for each kernel the first program of each matrix; each kernel's programs.

    ``grids``: for each kernel the programs of each matrix.
    """
    device = part[0].g.device
    numbers, size = [], 0
    for x in part:
        numbers += _row(x, size, eight)
        size += sum(_scratch(x))
    rows, totals = len(numbers), []
    for programs in grids:
        total = 0
        for count in programs:
            numbers.append(total)
            total += count
        numbers += [NEVER] * (group - len(programs))
        totals.append(total)
    table = _device_tables.get(numbers, device, "fira", "triton")
    views = [table[:rows], *table[rows:].split(group)]
    # For the checked interpreter (tests/interpreted.py): kernels may touch these and no more. The view is this call's.
    views[0].points_to = [y for x in part for y in x.tensors()]
    return views, totals


def _launch(
    part: list[Matrix], options: dict[str, bool], shared: tuple[Tensor, Tensor, Tensor], numbers: tuple[float, ...],
    flags: Flags, exact: bool, size: int,
) -> None:  # fmt: skip
    """``shared``: gradient factor, found_inf (anything where options say there is none) and lr.

    ``size``: of the scratch, in floats.
    """
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
    (table, *first), programs = _table(part, eight, grids, kernels.GROUP)
    scratch = torch.empty(size, device=w.device)
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
