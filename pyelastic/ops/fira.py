"""Fira: one low-rank optimizer step for many matrices, in place.

With vectors x_j of length d (rows of G, or columns where the projector is on the left), P [d, r], R = X P, Adam's
moments m, v of R, N = m / (sqrt(v) + eps) and phi_j = |N_j| / (|R_j| + 1e-8), one step is::

    S = phi (X - a_r R P^T),  lim = max(|S| / (s_prev + 1e-8), gamma) / gamma,  s_prev <- |S| / lim
    W <- (1 - lr wd) (W - step (a_n N P^T + a_s S / lim))

The kernels never form S. Since <x_j, P r_j> = |r_j|^2, with M = P^T P::

    |S|^2 = sum_j phi_j^2 max(0, |x_j|^2 - 2 a_r |r_j|^2 + a_r^2 r_j^T M r_j)
    W <- k W - k step (C P^T + f X),   f_j = a_s phi_j / lim,  C_j = a_n N_j - a_r f_j R_j,  k = 1 - lr wd

so G is read twice and W read and written once: 4 passes over full-size data where the published package makes 21.
There is nothing to cancel for a_r away from 1; near 1, M is given as ``gram``, and where |S|^2 keeps few digits of
its terms the kernels form the residual's norm directly in a pass of its own (on a GPU decided on the device).

Cost: 4 m n r operations; scratch of L r floats. The forms that the three scalars make: ``MODES``. Reference:
pyelastic.eager.fira. Source: Chen et al. 2024, arXiv 2410.01623, and the behaviour of the package fira 1.0.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyelastic import _dispatch, _errors, _extension, _library
from pyelastic.eager import fira as eager
from pyelastic.eager.fira import Flags
from pyelastic.ops import _fira_cpu as cpu
from pyelastic.ops import _fira_cuda as cuda
from pyelastic.ops import _fira_triton as triton
from pyelastic.ops import _triton

OP = "fira"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# mode -> (a_r, a_n, a_s) of alpha
MODES: dict[str, Callable[[float], tuple[float, float, float]]] = {
    "official": lambda alpha: (alpha, alpha, 1.0),
    "paper": lambda alpha: (1.0, alpha, alpha),
    "galore": lambda alpha: (0.0, alpha, 0.0),
    "apollo": lambda alpha: (0.0, 0.0, math.sqrt(alpha)),
}


class FiraState(NamedTuple):
    """What a step of one matrix [m, n] keeps, all updated in place but ``projector`` and ``gram``.

    ``projector``: [r, n] on the right, [m, r] on the left; its vectors orthonormal, or ``gram`` given.
    ``exp_avg``, ``exp_avg_sq``: [m, r] on the right, [r, n] on the left; float32 (float64), bfloat16, or int8, uint8.
    ``limiter_norm``: 0-d, NaN before the first step. ``step``: 0-d, the steps taken.
    ``moment_scales``: of 8-bit moments, two of [L, ceil(r / 128)], L = m on the right, n on the left.
    ``gram``: projector's M = P^T P [r, r]. ``remainder``: [m, n], what rounding W to its dtype cut off.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    projector: Tensor
    limiter_norm: Tensor
    step: Tensor
    moment_scales: tuple[Tensor, Tensor] | None = None
    gram: Tensor | None = None
    remainder: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """What a backend needs to know to say whether it can run a call."""

    op: str
    device: torch.device
    dtype: torch.dtype
    dtype_argument: str
    state_dtype: torch.dtype
    rank: int


def fira(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[FiraState],
    *,
    left: Sequence[bool],
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    alpha: float = 1.0,
    mode: str = "official",
    gamma: float | None = 1.01,
    correct_bias: bool = True,
    maximize: bool = False,
    per_matrix: bool = False,
    collapse: bool = False,
    stochastic: bool = False,
    seeds: Sequence[int] | None = None,
    grad_factor: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of ``params`` along ``grads``, in place; ``pyelastic.optim.Fira`` is the optimizer around it.

    Args:
        params, grads: matrices [m, n], of one dtype and on one device, any sizes and strides.
        states: one ``FiraState`` a matrix; ``fira_state`` makes a fresh one.
        left: per matrix, whether its projector multiplies from the left (its vectors are the columns).
        lr: learning rate; a 0-d tensor keeps a captured graph's rate adjustable.
        eps: beside sqrt(v). weight_decay: decoupled, after the step.
        alpha, mode: ``official`` alpha P N + phi (G - alpha P R); ``paper`` alpha (P N + phi (G - P R)), bias-corrected
            N; ``galore`` alpha P N; ``apollo`` sqrt(alpha) phi G.
        gamma: the largest growth of |S| in a step; None: no limiter.
        correct_bias: Adam's bias correction. maximize: step along the gradient.
        per_matrix: one phi for the matrix instead of one a vector.
        collapse: as in the published package, a zero gradient sets the limiter's norm to 0, from where it grows
            by gamma a step. Without it the norm is kept.
        stochastic: round bfloat16 weights stochastically; bits are a function of (seed, step, element). ``seeds``:
            one int a matrix, default 0, 1, ...
        grad_factor: 0-d; gradients are multiplied by it first (clipping, unscaling).
        found_inf: 0-d; where it is > 0 nothing changes (``torch.amp.GradScaler``).
        backend: ``auto``, ``cuda``, ``triton``, ``cpu`` or ``eager``.

    Returns:
        None; params, moments, limiter norms and step counts are updated.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what was got.
        BackendError: the backend asked for cannot run the call.
    """
    _check(params, grads, states, left, lr, betas, mode, stochastic)
    if not params:
        return
    call = _make_call(params, grads, states)
    chosen = _dispatch.resolve(OP, call, backend)
    assert chosen.run is not None  # resolve returns only backends that can run
    a_r, a_n, a_s = MODES[mode](alpha)
    flags = Flags.PAPER * (mode == "paper") | Flags.CORRECT_BIAS * correct_bias | Flags.MAXIMIZE * maximize
    flags |= Flags.PER_MATRIX * per_matrix | Flags.COLLAPSE * collapse | Flags.STOCHASTIC * stochastic
    device = call.device
    if not isinstance(lr, Tensor):
        lr = torch.full((), lr, dtype=torch.float64, device=device)
    elif lr.device != device:
        lr = lr.to(device, non_blocking=True)
    none = params[0].new_empty(0)
    grams = [none if s.gram is None else s.gram for s in states] if any(s.gram is not None for s in states) else []
    with torch.no_grad():
        chosen.run(
            list(params), list(grads), [s.exp_avg for s in states], [s.exp_avg_sq for s in states],
            [scale for s in states for scale in s.moment_scales or ()], [s.projector for s in states], grams,
            [s.limiter_norm for s in states], [s.step for s in states],
            [s.remainder for s in states if s.remainder is not None], lr.detach().to(torch.float64), grad_factor,
            found_inf, [bool(side) for side in left], list(range(len(params)) if seeds is None else seeds),
            *betas, eps, weight_decay, gamma or 0.0, a_r, a_n, a_s, int(flags),
        )  # fmt: skip


def fira_state(
    param: Tensor,
    projector: Tensor,
    *,
    left: bool,
    state_dtype: torch.dtype = torch.float32,
    gram: Tensor | None = None,
    compensated: bool = False,
) -> FiraState:
    """A fresh ``FiraState`` for ``param`` [m, n] and ``projector`` ([m, r] on the left, else [r, n]).

    ``state_dtype``: float32, bfloat16, or int8 for 8-bit block-wise moments; float64 params have float64 moments.
    ``compensated``: keep the remainder of 16-bit weights.
    """
    rank = projector.shape[1] if left else projector.shape[0]
    shape = (rank, param.shape[1]) if left else (param.shape[0], rank)
    scales = None
    kinds = (state_dtype, state_dtype)
    if param.dtype == torch.float64:
        kinds = (torch.float64, torch.float64)
    elif state_dtype in (torch.int8, torch.uint8):
        kinds = (torch.int8, torch.uint8)
        vectors = param.shape[1] if left else param.shape[0]
        first = torch.zeros(vectors, -(-rank // eager.BLOCK), device=param.device)
        scales = (first, first.clone())
    exact = torch.float64 if param.dtype == torch.float64 else torch.float32
    return FiraState(
        torch.zeros(shape, dtype=kinds[0], device=param.device),
        torch.zeros(shape, dtype=kinds[1], device=param.device),
        projector,
        torch.full((), math.nan, dtype=exact, device=param.device),
        torch.zeros((), dtype=torch.float32, device=param.device),
        scales,
        gram,
        torch.zeros_like(param) if compensated else None,
    )


# --- checks ---------------------------------------------------------------------------------------------------


def _shape(name: str, i: int, field: str, tensor: Tensor, want: tuple[int, ...], why: str) -> None:
    if tensor.shape != want:
        raise ValueError(f"{OP}: {name}[{i}]{field} is {list(tensor.shape)}; expected {list(want)}, {why}")


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[FiraState],
    left: Sequence[bool],
    lr: float | Tensor,
    betas: tuple[float, float],
    mode: str,
    stochastic: bool,
) -> None:
    """Everything that needs no data."""
    for name, given in (("grads", grads), ("states", states), ("left", left)):
        if len(given) != len(params):
            raise ValueError(f"{OP}: {name} has {len(given)} entries; expected {len(params)}, one per parameter")
    _errors.check_choice(OP, "mode", mode, tuple(MODES))
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{OP}: {name} is {beta}; expected 0 <= beta < 1")
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{OP}: lr is {list(lr.shape)}; expected one number")
    elif not lr >= 0:
        raise ValueError(f"{OP}: lr is {lr}; expected a non-negative number")
    for i, (w, g, s, side) in enumerate(zip(params, grads, states, left, strict=True)):
        _check_matrix(i, w, g, s, side, params[0], states[0])
    if stochastic and params and params[0].dtype != torch.bfloat16:
        raise TypeError(f"{OP}: stochastic=True rounds bfloat16 weights; params[0] is {params[0].dtype}")


def _check_matrix(i: int, w: Tensor, g: Tensor, s: FiraState, side: bool, first: Tensor, like: FiraState) -> None:
    """Of matrix ``i``; the names for messages are made where one fails, as a model has hundreds of matrices a step."""
    if not isinstance(w, Tensor) or w.ndim != 2:
        _errors.check_rank(OP, f"params[{i}]", w, 2, "[m, n]")
    if hasattr(w, "_local_tensor") or hasattr(g, "_local_tensor"):
        _errors.refuse_dtensor(OP, **{f"params[{i}]": w, f"grads[{i}]": g})
    if g.layout != torch.strided:
        raise TypeError(f"{OP}: grads[{i}] is sparse; expected a dense gradient")
    dtype, device = first.dtype, first.device
    if w.dtype not in DTYPES:
        _errors.check_floating(OP, f"params[{i}]", w, DTYPES)
    if w.dtype != dtype or g.dtype != dtype:
        name, x = ("params", w) if w.dtype != dtype else ("grads", g)
        raise TypeError(f"{OP}: {name}[{i}] is {x.dtype}, params[0] is {dtype}; expected one dtype")
    _shape("grads", i, "", g, w.shape, "the shape of its parameter")
    m, n = w.shape
    p = s.projector
    if not isinstance(p, Tensor) or p.ndim != 2:
        _errors.check_rank(OP, f"states[{i}].projector", p, 2, "[m, r]" if side else "[r, n]")
    rank = p.shape[1 if side else 0]
    if p.shape != ((m, rank) if side else (rank, n)):
        _shape("states", i, ".projector", p, (m, rank) if side else (rank, n), f"left={side} of [{m}, {n}]")
    moment = (rank, n) if side else (m, rank)
    if s.exp_avg.shape != moment or s.exp_avg_sq.shape != moment:
        for name in ("exp_avg", "exp_avg_sq"):
            _shape("states", i, f".{name}", getattr(s, name), moment, f"rank {rank}")
    if s.exp_avg.dtype != like.exp_avg.dtype or s.exp_avg_sq.dtype != like.exp_avg_sq.dtype:
        raise TypeError(f"{OP}: states[{i}] has moments in {s.exp_avg.dtype}; expected one dtype in a call")
    if s.exp_avg.dtype == torch.int8 and s.moment_scales is None:
        raise ValueError(f"{OP}: states[{i}] has 8-bit moments and no moment_scales")
    if (s.remainder is None) != (like.remainder is None):
        raise ValueError(f"{OP}: states[{i}].remainder: expected for all matrices of a call or for none")
    if s.gram is not None and s.gram.shape != (rank, rank):
        _shape("states", i, ".gram", s.gram, (rank, rank), f"rank {rank}")
    if any(x.device != device for x in (w, g, p, s.exp_avg, s.step)):
        tensors = {f"params[{i}]": w, f"grads[{i}]": g, "params[0]": first, f"states[{i}].projector": p}
        _errors.check_same_device(OP, **tensors, **{f"states[{i}].exp_avg": s.exp_avg, f"states[{i}].step": s.step})


# --- raw ops --------------------------------------------------------------------------------------------------

_SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] moment_scales, Tensor[] projectors, Tensor[] grams, Tensor(e!)[] limiter_norms, "
    "Tensor(f!)[] steps, Tensor(g!)[] remainders, Tensor lr, Tensor? grad_factor, Tensor? found_inf, bool[] left, "
    "int[] seeds, float beta1, float beta2, float eps, float weight_decay, float gamma, float a_r, float a_n, "
    "float a_s, int flags) -> ()"
)


def _fake(*arguments: Any) -> None:
    """Nothing is returned, so a trace has nothing to make up."""


_OPS = {
    name: _library.define(f"{OP}_step", name, _SCHEMA, launcher.step_, _fake)
    for name, launcher in (("cpu", cpu), ("cuda", cuda), ("triton", triton))
}


# --- backends -------------------------------------------------------------------------------------------------


def _make_call(
    params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[FiraState], **options: Any
) -> Call:
    first = states[0]
    ranks = [min(s.projector.shape) for s in states]
    return Call(OP, params[0].device, params[0].dtype, "params[0]", first.exp_avg.dtype, max(ranks, default=0))


def _cpu_why_not(call: Call) -> str | None:
    if call.device.type != "cpu":
        return f"params[0] is on {call.device}; the kernel runs on the CPU"
    return _extension.why_not()


def _gpu_why_not(call: Call) -> str | None:
    return _dispatch.unsupported_dtype(call, DTYPES[:3])


def _cuda_why_not(call: Call) -> str | None:
    return _gpu_why_not(call) or _extension.cuda_why_not(str(call.device))


def _triton_why_not(call: Call) -> str | None:
    return _gpu_why_not(call) or _triton.why_not(str(call.device), call.dtype_argument, OP, "project")


_HALF = ("float16", "bfloat16", "float32")
_STEP = ("step",)
_ALL = ("float16", "bfloat16", "float32", "float64")

_dispatch.register(
    OP,
    _dispatch.Backend(
        "cuda", _OPS["cuda"], _cuda_why_not, _HALF, directions=_STEP, label="emulated; not yet run on a GPU"
    ),
    _dispatch.Backend(
        "triton", _OPS["triton"], _triton_why_not, _HALF, directions=_STEP, label="interpreted; not yet run on a GPU"
    ),
    _dispatch.Backend("cpu", _OPS["cpu"], _cpu_why_not, _ALL, directions=_STEP, label="tested on CPU"),
    _dispatch.Backend(
        "eager", eager.step_, lambda call: None, _ALL, directions=_STEP, label="reference"
    ),
    make_call=_make_call,
)
