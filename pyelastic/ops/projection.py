"""A dense layer with its epilogue fused: bias, residual and L2 normalisation; the layer that ends a projection head.

With ``R`` the ``residual_weight``, or the identity::

    z_i = W x_i + b + R r_i,   y_i = z_i / max(|z_i|, 1e-12)  if normalize, else z_i

and backward, from the gradient ``g_i`` of ``y_i``::

    dz_i = (g_i - <g_i, y_i> y_i) / |z_i|      g_i / 1e-12 where the norm was clamped, as F.normalize
    dW = sum_i dz_i x_i^T,  db = sum_i dz_i,  dx_i = W^T dz_i,  dr_i = R^T dz_i,  dR = sum_i dz_i r_i^T

Shapes: x [..., d_in], weight [d_out, d_in], y [..., d_out]. Dtypes: float16, bfloat16, float32, the parameters in any
of them, computed in float32, y in x's dtype; float64 in float64 (cpu, eager). Cost: 2 d_in d_out per row forward, 4
backward; saved for backward: the inputs and, with ``normalize``, y and one float per row. z of more than a chunk of
rows never exists. With ``normalize`` and 16 bits, the backward takes y as it was returned, rounded. Rows without a
gradient cost nothing on the CPU where they are the most, as document rows that won nowhere in maxsim; there a NaN in
such a row of x reaches y but no gradient. On a GPU the forward's product has 16-bit operands where x and weight have
one 16-bit dtype, and is in one kernel with all else where a tile holds a row of y; the backward's have dz as two
bfloat16 parts in bfloat16, else float32 operands (TF32 if torch's settings allow it). Source: Clavie 2025 (arXiv
2510.12327) for the heads; the kernels' contract: csrc/projection.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyelastic import _dispatch, _errors, _extension, _library
from pyelastic.eager import projection as eager
from pyelastic.eager.projection import statistics_dtype
from pyelastic.ops import _projection as launcher
from pyelastic.ops import _triton
from pyelastic.ops._projection_cpu import CpuKernels
from pyelastic.ops._projection_cuda import CudaKernels
from pyelastic.ops._projection_triton import TritonKernels

OP = "projection"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Call:
    """What a backend needs to know to say whether it can run a call."""

    op: str
    device: torch.device
    dtype: torch.dtype
    dtype_argument: str


def projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    residual_weight: Tensor | None = None,
    normalize: bool = True,
    gradient_rows: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """``normalize(x W^T + bias + residual R^T)`` along the last dimension.

    Args:
        x: [..., d_in]. weight: [d_out, d_in]. bias: [d_out].
        residual: [..., d_out], added as it is; or [..., d_r] with ``residual_weight`` [d_out, d_r], the projected skip.
        normalize: divide by ``max(|z|, 1e-12)``, as ``F.normalize``; False leaves the epilogue without it.
        gradient_rows: a bound, known from shapes, on the rows of y that will have a gradient other than zero; if it is
            below half of them, the backward on a GPU gathers that many first (rows beyond a wrong bound would be lost).
            The CPU counts them itself. In maxsim's k-negatives layout it is Nq K Lq: see ``nn.LateInteraction``.
        backend: ``auto``, ``cuda``, ``triton``, ``cpu`` or ``eager``.

    Returns:
        y [..., d_out] in x's dtype.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what was got.
        BackendError: the backend asked for cannot run the call.
        RuntimeError: double backward through a kernel; ``backend="eager"`` supports it.
    """
    _check(x, weight, bias, residual, residual_weight)
    chosen = _dispatch.resolve(OP, Call(OP, x.device, x.dtype, "x"), backend)
    flat = x.reshape(-1, x.shape[-1])
    r = None if residual is None else residual.reshape(-1, residual.shape[-1])
    bound = -1 if gradient_rows is None else gradient_rows
    y: Tensor = chosen.run(flat, weight, bias, r, residual_weight, normalize, bound)  # type: ignore[misc]
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, residual_weight: Tensor | None
) -> None:
    optional = {"bias": bias, "residual": residual, "residual_weight": residual_weight}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    tensors = {"x": x, "weight": weight, **given}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{OP}: {name} is {type(tensor).__name__}; expected a tensor")
    _errors.refuse_dtensor(OP, **tensors)
    if x.ndim < 1:
        raise ValueError(f"{OP}: x is []; expected [..., d_in]")
    _errors.check_rank(OP, "weight", weight, 2, "[d_out, d_in]")
    for name, tensor in tensors.items():
        _errors.check_floating(OP, name, tensor, DTYPES)
        if (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
            raise TypeError(f"{OP}: x is {x.dtype} and {name} is {tensor.dtype}; float64 needs both")
    _errors.check_same_device(OP, **tensors)
    d_out, d_in = weight.shape
    if x.shape[-1] != d_in or d_in == 0 or d_out == 0:
        raise ValueError(
            f"{OP}: x is {list(x.shape)} and weight is {list(weight.shape)}; expected [..., d_in] and [d_out, d_in]"
        )
    if bias is not None and bias.shape != (d_out,):
        raise ValueError(f"{OP}: bias is {list(bias.shape)}; expected [{d_out}]")
    if residual is None:
        if residual_weight is not None:
            raise ValueError(f"{OP}: residual_weight needs residual")
        return
    width = d_out
    if residual_weight is not None:
        _errors.check_rank(OP, "residual_weight", residual_weight, 2, "[d_out, d_r]")
        width = residual_weight.shape[1]
        if residual_weight.shape[0] != d_out or width == 0:
            raise ValueError(f"{OP}: residual_weight is {list(residual_weight.shape)}; expected [{d_out}, d_r]")
    if residual.shape != (*x.shape[:-1], width):
        raise ValueError(f"{OP}: residual is {list(residual.shape)}; expected {[*x.shape[:-1], width]}")


# --- raw ops and autograd -------------------------------------------------------------------------------------

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? residual_weight, bool normalize"
_FORWARD = f"({_INPUTS}) -> (Tensor, Tensor)"
_BACKWARD = (
    "(Tensor grad, Tensor x, Tensor weight, Tensor? residual, Tensor? residual_weight, Tensor y, Tensor inverse, "
    "bool normalize, bool[5] needs, SymInt gradient_rows=-1) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fake_forward(  # type: ignore[no-untyped-def]
    x, weight, bias, residual, residual_weight, normalize
):
    inverse = x.new_empty(x.shape[0] if normalize else 0, dtype=statistics_dtype(x))
    return x.new_empty(x.shape[0], weight.shape[0]), inverse


def _fake_backward(  # type: ignore[no-untyped-def]
    grad, x, weight, residual, residual_weight, y, inverse, normalize, needs, gradient_rows=-1
):
    dtype = statistics_dtype(x)

    def like(needed: bool, shape: Any, dtype: torch.dtype = dtype) -> Tensor:
        return x.new_empty(shape if needed else (0,), dtype=dtype)

    return (
        like(needs[0], x.shape, x.dtype),
        like(needs[1], weight.shape),
        like(needs[2], (weight.shape[0],)),
        like(needs[3], (0,)) if residual is None else like(needs[3], residual.shape, residual.dtype),
        like(needs[4], (0,) if residual_weight is None else residual_weight.shape),
    )


def _define(name: str, kernels: type[launcher.Kernels]) -> tuple[Any, Any]:
    """Both raw ops of a backend."""

    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        with launcher.environment(arguments[0].device):
            return launcher.forward(kernels(arguments[0]), *arguments)

    def backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        with launcher.environment(grad.device):
            return tuple(launcher.backward(kernels(arguments[0]), grad, *arguments))

    return (
        _library.define(f"{OP}_fwd", name, _FORWARD, forward, _fake_forward),
        _library.define(f"{OP}_bwd", name, _BACKWARD, backward, _fake_backward),
    )


OPS = {
    name: _define(name, kernels)
    for name, kernels in (("cpu", CpuKernels), ("cuda", CudaKernels), ("triton", TritonKernels))
}


class _Backward(torch.autograd.Function):
    """The backward as a node of its own, so that differentiating it fails loudly instead of giving zeros."""

    @staticmethod
    def forward(ctx: Any, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = OPS[backend][1](*arguments)
        return gradients

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{OP}: double backward needs backend='eager'; the kernels compute first gradients only")


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, gradient_rows: int, *inputs: Any) -> Tensor:
        y, inverse = OPS[backend][0](*inputs)
        x, weight, _, residual, residual_weight, ctx.normalize = inputs
        ctx.backend, ctx.gradient_rows = backend, gradient_rows
        ctx.dtypes = [None if t is None else t.dtype for t in inputs[:5]]
        # Not normalised, the backward does not read y, and the caller may change it in place.
        ctx.save_for_backward(x, weight, residual, residual_weight, y if ctx.normalize else None, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, residual, residual_weight, y, inverse = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[2:7])
        y = grad if y is None else y
        made = _Backward.apply(
            ctx.backend, grad, x, weight, residual, residual_weight, y, inverse, ctx.normalize, needs, ctx.gradient_rows
        )
        found = (g.to(dtype) if need else None for g, need, dtype in zip(made, needs, ctx.dtypes, strict=True))
        return (None, None, *found, None)


# --- backends -------------------------------------------------------------------------------------------------


def _run(backend: str) -> Any:
    def run(*inputs: Any) -> Tensor:
        return _Projection.apply(backend, inputs[-1], *inputs[:-1])

    return run


def _run_eager(*inputs: Any) -> Tensor:
    with torch.autocast(inputs[0].device.type, enabled=False):
        return eager.project(*inputs[:-1])


def _make_call(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Call:
    return Call(OP, x.device, x.dtype, "x")


def _cpu_why_not(call: Call) -> str | None:
    if call.device.type != "cpu":
        return f"x is on {call.device}; the kernel runs on the CPU"
    return _extension.why_not()


def _cuda_why_not(call: Call) -> str | None:
    return _dispatch.unsupported_dtype(call, DTYPES[:3]) or _extension.cuda_why_not(str(call.device))


def _triton_why_not(call: Call) -> str | None:
    dtype = _dispatch.unsupported_dtype(call, DTYPES[:3])
    return dtype or _triton.why_not(str(call.device), "x", OP, "forward")


_HALF = ("float16", "bfloat16", "float32")
_ALL = ("float16", "bfloat16", "float32", "float64")

_dispatch.register(
    OP,
    _dispatch.Backend("cuda", _run("cuda"), _cuda_why_not, _HALF, label="emulated; not yet run on a GPU"),
    _dispatch.Backend("triton", _run("triton"), _triton_why_not, _HALF, label="interpreted; not yet run on a GPU"),
    _dispatch.Backend("cpu", _run("cpu"), _cpu_why_not, _ALL, label="tested on CPU"),
    _dispatch.Backend("eager", _run_eager, lambda call: None, _ALL, label="reference"),
    make_call=_make_call,
)
