"""Launcher of fira's CPU kernels. Contract: csrc/fira.h.

With AVX2 or AVX-512 the two products are ours, with all other passes inside (``_Products``): the bits of a step depend
on no thread count, and of R only what C is made of is rounded for bfloat16 weights. Elsewhere and in float64 they are
two GEMMs of torch (``_Gemms``), whose operands are bfloat16 for bfloat16 weights (R and C are then rounded to it, as
the published package rounds R) and the compute type for all others. Scratch: R, and a packed P or C, or C P^T for a
block of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyelastic import _extension
from pyelastic.eager.fira import Flags, compute_dtype
from pyelastic.ops._binding import DTYPES, pointer

# Bytes of C P^T for a block of rows: 1.5 MB of a core's 2 MB L2 at most; docs/ops/fira.md.
BLOCK_BYTES = 1 << 20
# |S|^2 = q keeps 1/kappa of its terms' digits. Beyond this the residual is formed, block by block. Measured relative
# errors of s below it: float32 3e-6, bfloat16 operands 1e-4, where gamma acts at 1e-2.
KAPPA = {torch.float64: 1e6, torch.float32: 1e3, torch.float16: 1e3, torch.bfloat16: 16.0}


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
    """The raw op ``fira_step.cpu``."""
    if found_inf is not None and float(found_inf) > 0:
        return
    factor = 1.0 if grad_factor is None else float(grad_factor)
    factor = -factor if flags & Flags.MAXIMIZE else factor
    rate = float(lr)
    paper, correct_bias = bool(flags & Flags.PAPER), bool(flags & Flags.CORRECT_BIAS)
    limiter = (gamma, bool(flags & Flags.COLLAPSE), bool(flags & Flags.PER_MATRIX))
    stochastic = bool(flags & Flags.STOCHASTIC)
    for i, param in enumerate(params):
        if param.numel() == 0:
            steps[i].add_(1)
            continue
        taken = int(steps[i]) + 1
        correction = 1.0
        if correct_bias:
            correction = (1.0 - beta2**taken) ** 0.5 / (1.0 - beta1**taken)
        scalars = (beta1, beta2, eps, factor, correction if paper else 1.0, a_r, a_n, a_s)
        work = [param, exp_avgs[i], exp_avg_sqs[i], *moment_scales[2 * i : 2 * i + 2]]
        work += [remainders[i]] if remainders else []
        # A row of W may be strided; what is laid out otherwise is stepped in a copy.
        copies = [x if x.is_contiguous() else x.contiguous() for x in work]
        if param.stride(1) == 1:
            copies[0] = param
        grad = grads[i] if grads[i].stride(1) == 1 else grads[i].contiguous()
        _step_one(
            copies, grad, projectors[i], grams[i] if grams and grams[i].numel() else None, limiter_norms[i],
            bool(remainders), left[i], scalars, limiter,
            rate if paper else rate * correction, 1.0 - rate * weight_decay, stochastic, seeds[i], taken,
        )  # fmt: skip
        for original, copy in zip(work, copies, strict=True):
            if copy is not original:
                original.copy_(copy)
        steps[i].add_(1)


def _step_one(
    work: list[Tensor], grad: Tensor, projector: Tensor, gram: Tensor | None, limiter_norm: Tensor,
    compensated: bool, left: bool, scalars: tuple[float, ...], limiter: tuple[float, bool, bool], size: float,
    keep: float, stochastic: bool, seed: int, taken: int,
) -> None:  # fmt: skip
    extension = _extension.load()
    w, m, v, *rest = work
    remainder = rest.pop() if compensated else None
    dtype = compute_dtype(w)
    suffix = "f64" if dtype == torch.float64 else "f32"

    def call(name: str, *arguments: Any) -> Any:
        return getattr(extension, f"fira_{name}_{suffix}")(*arguments)

    rank = projector.shape[1] if left else projector.shape[0]
    rows, columns = w.shape
    vectors, dim = (columns, rows) if left else (rows, columns)
    factor, a_r, a_n, a_s = scalars[3], *scalars[5:]
    threads = torch.get_num_threads()
    problem = (vectors, dim, rank, left, *scalars)
    scales = [x.data_ptr() for x in rest] or [0, 0]
    moments = (m.data_ptr(), v.data_ptr(), DTYPES.get(m.dtype, 0), *scales)  # 8-bit: the dtype is not looked at
    room = -1 if dtype == torch.float64 else extension.fira_room(problem, DTYPES[w.dtype])
    products: _Products | _Gemms
    if room < 0:
        products = _Gemms(w, grad, projector, left, problem, moments)
    else:
        products = _Products(w, grad, projector, problem, moments, room)
    r = torch.empty_like(m, dtype=products.operand)
    squares = torch.empty(3, vectors, dtype=torch.float64)
    products.project(r, squares)
    f = torch.zeros(vectors, dtype=dtype)
    if a_s != 0:
        quadratic = None if gram is None or a_r == 0 else _quadratic(r, gram.to(dtype), left) * factor**2
        before = float(limiter_norm)

        def scale(exact: Tensor | None) -> tuple[float, float, float, float]:
            out: tuple[float, float, float, float] = call(
                "scales", problem, squares.data_ptr(), pointer(quadratic), pointer(exact), before, *limiter,
                f.data_ptr(),
            )  # fmt: skip
            return out

        _, kept, _, kappa = scale(None)
        if kappa > KAPPA[w.dtype] and a_r != 0:
            _, kept, _, _ = scale(_residual_squares(grad, r, products.p, left, a_r, dtype) * factor**2)
        limiter_norm.fill_(kept)
    rounding = (stochastic, seed, taken & 0xFFFFFFFF, pointer(remainder))
    if a_n != 0 or (a_r != 0 and a_s != 0):
        products.back(r, f, size, keep, rounding)
        return
    call("apply", problem, 0, DTYPES[r.dtype], f.data_ptr(), grad.data_ptr(), grad.stride(0), w.data_ptr(), w.stride(0),
         DTYPES[w.dtype], 0, rows, size, keep, rounding, threads)  # fmt: skip


class _Products:
    """R, its moments and squares, and W from them, by our own kernels."""

    def __init__(
        self, w: Tensor, grad: Tensor, projector: Tensor, problem: tuple[Any, ...], moments: tuple[int, ...], room: int
    ) -> None:
        self.operand = torch.bfloat16 if w.dtype == torch.bfloat16 else torch.float32
        self.w, self.grad, self.p, self.problem, self.moments = w, grad, projector.contiguous(), problem, moments
        self.room = torch.empty(room + 64, dtype=torch.uint8)
        self.address = (self.room.data_ptr() + 63) // 64 * 64

    def project(self, r: Tensor, squares: Tensor) -> None:
        _extension.load().fira_project(
            self.problem, self.grad.data_ptr(), DTYPES[self.grad.dtype], self.grad.stride(0), self.p.data_ptr(),
            DTYPES[self.p.dtype], self.moments, r.data_ptr(), DTYPES[r.dtype], squares.data_ptr(), self.address,
            torch.get_num_threads(),
        )  # fmt: skip

    def back(self, r: Tensor, f: Tensor, size: float, keep: float, rounding: tuple[Any, ...]) -> None:
        w, g = self.w, self.grad
        _extension.load().fira_apply(
            self.problem, r.data_ptr(), DTYPES[r.dtype], self.moments, self.p.data_ptr(), DTYPES[self.p.dtype],
            f.data_ptr(), g.data_ptr(), g.stride(0), w.data_ptr(), w.stride(0), DTYPES[w.dtype], size, keep, rounding,
            self.address, torch.get_num_threads(),
        )  # fmt: skip


class _Gemms:
    """The same by torch's GEMMs, and our kernels around them."""

    def __init__(
        self, w: Tensor, grad: Tensor, projector: Tensor, left: bool, problem: tuple[Any, ...], moments: tuple[int, ...]
    ) -> None:
        self.operand = torch.bfloat16 if w.dtype == torch.bfloat16 else compute_dtype(w)
        self.w, self.grad, self.p, self.left = w, grad, projector.to(self.operand), left
        self.problem, self.moments, self.suffix = problem, moments, "f64" if w.dtype == torch.float64 else "f32"

    def _call(self, name: str, *arguments: Any) -> None:
        getattr(_extension.load(), f"fira_{name}_{self.suffix}")(self.problem, *arguments, torch.get_num_threads())

    def project(self, r: Tensor, squares: Tensor) -> None:
        g = self.grad
        _project(g, self.p, self.left, r)
        self._call("moments", r.data_ptr(), DTYPES[r.dtype], g.data_ptr(), DTYPES[g.dtype], g.stride(0), self.moments,
                   squares.data_ptr())  # fmt: skip

    def back(self, r: Tensor, f: Tensor, size: float, keep: float, rounding: tuple[Any, ...]) -> None:
        w, g = self.w, self.grad
        self._call("coefficients", self.moments, f.data_ptr(), r.data_ptr(), DTYPES[r.dtype])
        rows, columns = w.shape
        block = max(16, BLOCK_BYTES // (columns * r.element_size()))
        t = torch.empty(min(block, rows), columns, dtype=self.operand)
        for first in range(0, rows, block):
            count = min(block, rows - first)
            _back(self.p, r, self.left, first, count, t[:count])
            self._call("apply", t.data_ptr(), DTYPES[self.operand], f.data_ptr(), g.data_ptr(), g.stride(0),
                       w.data_ptr(), w.stride(0), DTYPES[w.dtype], first, count, size, keep, rounding)  # fmt: skip


def _project(grad: Tensor, p: Tensor, left: bool, r: Tensor) -> None:
    """R, in blocks of rows of G where G has to be converted first."""
    if grad.dtype == p.dtype:
        torch.mm(p.t(), grad, out=r) if left else torch.mm(grad, p.t(), out=r)
        return
    block = max(16, BLOCK_BYTES // (grad.shape[1] * p.itemsize))
    if left:
        r.zero_()
    for first in range(0, grad.shape[0], block):
        rows = grad[first : first + block].to(p.dtype)
        if left:
            r.addmm_(p[first : first + block].t(), rows)
        else:
            torch.mm(rows, p.t(), out=r[first : first + block])


def _back(p: Tensor, c: Tensor, left: bool, first: int, count: int, out: Tensor) -> None:
    """Rows of C P^T, in the layout of W."""
    torch.mm(p[first : first + count], c, out=out) if left else torch.mm(c[first : first + count], p, out=out)


def _quadratic(r: Tensor, gram: Tensor, left: bool, block: int = 2048) -> Tensor:
    """r_j^T M r_j [L] float64, over blocks of vectors."""
    out = torch.empty(r.shape[1] if left else r.shape[0], dtype=torch.float64)
    for first in range(0, out.shape[0], block):
        rows = (r[:, first : first + block].t() if left else r[first : first + block]).to(gram.dtype)
        out[first : first + block] = torch.linalg.vecdot(rows @ gram, rows)
    return out


def _residual_squares(grad: Tensor, r: Tensor, p: Tensor, left: bool, a_r: float, dtype: torch.dtype) -> Tensor:
    """|x_j - a_r P r_j|^2 [L] float64, formed over blocks of rows of G: what cancellation cannot reach."""
    rows, columns = grad.shape
    out = torch.zeros(columns if left else rows, dtype=torch.float64)
    block = max(16, BLOCK_BYTES // (columns * dtype.itemsize))
    p = p.to(dtype)
    if r.dtype != dtype:  # the rounding of R would be the residual
        r = torch.empty_like(r, dtype=dtype)
        _project(grad, p, left, r)
    for first in range(0, rows, block):
        count = min(block, rows - first)
        t = torch.empty(count, columns, dtype=dtype)
        _back(p, r, left, first, count, t)
        t = grad[first : first + count].to(dtype) - a_r * t
        if left:
            out += torch.linalg.vector_norm(t, dim=0, dtype=torch.float64).square()
        else:
            out[first : first + count] = torch.linalg.vector_norm(t, dim=1, dtype=torch.float64).square()
    return out
