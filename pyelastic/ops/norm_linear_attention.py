"""Norm-aware linear attention: softmax attention's dependence on the query's norm, at a cost linear in the tokens.

Per head, with x^p of magnitudes, R_n the rotation by position n (RoPE, each half of the features alike; or none)::

    r = sqrt(|q|^2 + norm_eps^2),  p = lam (tau + tanh(norm_scale r)),  w = (|q| / r)^p
    phi_q(q) = [w 1(q > 0); w 1(q < 0)]
    phi_k(k) = [|k|^key_power 1(k > 0); |k|^key_power 1(k < 0)]                                       mode="split"
    phi_q(q) = [w cos t(q / r); w sin t(q / r)],  t(u) = pi/4 tanh(alpha u),  phi_k likewise of k / |k|  mode="cos"
    S = sum_j R_j phi_k(k_j) v_j^T,   z = sum_j phi_k(k_j)      over all tokens j, or causal: over j <= i
    o_i = silu(gate_i) S^T R_i phi_q(q_i) / (phi_q(q_i) . z + eps e_i),   e_i = tokens in z (eps_mode="mean") or 1

rope="num" rotates in the numerator only, as the released code; rope="both" also in z and beside it. Backward, with
g_i the gradient of o_i, D_i its denominator and y_i = g_i / D_i::

    d(R phi_q)_i = S y_i,  dD_i = -y_i . o_i,  dphi_q = R_i^T d(R phi_q)_i + dD_i z
    dS = sum_i R_i phi_q(q_i) y_i^T,  dz = sum_i dD_i phi_q(q_i)
    dphi_k = R_j^T dS v_j + dz,  dv_j = dS^T R_j phi_k(k_j)

Shapes: q [B, N, Hq, d], k [B, M, Hk, d], v [B, M, Hk, dv], o [B, N, Hq, dv]. Dtypes: float16, bfloat16, float32,
computed in float32; float64 in float64 (cpu, eager). Cost: 8 d dv per token and head forward, 16 backward; saved for
backward: the inputs, S and z. On the CPU up to 64 tokens go in quadratic order where that is less work: no state, and
the inputs alone are saved. Features never reach memory. Source: Meng et al., NaLaFormer (arXiv 2506.21137; section 3
for the map, the released code for mode="split" and rope="num"); the kernels' contract: csrc/norm_linear_attention.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyelastic import _dispatch, _errors, _extension, _library
from pyelastic.eager import norm_linear_attention as eager
from pyelastic.ops import _norm_linear_attention_cpu as cpu
from pyelastic.ops import _norm_linear_attention_cuda as cuda
from pyelastic.ops import _norm_linear_attention_triton as triton
from pyelastic.ops import _triton
from pyelastic.ops._binding import changed
from pyelastic.ops._norm_linear_attention import Inputs, empty_like, sequences_of
from pyelastic.ops._norm_linear_attention import LinearAttentionState as LinearAttentionState
from pyelastic.ops._norm_linear_attention_checks import (
    DTYPES,
    OP,
    check_numbers,
    check_offsets,
    check_tensors,
    head_parameters,
    make_rope,
    with_state,
)

MODES = {"split": eager.SPLIT, "cos": eager.COSINE}


@dataclass(frozen=True)
class Call:
    """What a backend needs to know to say whether it can run a call."""

    op: str
    device: torch.device
    dtype: torch.dtype
    dtype_argument: str
    dim: int
    v_dim: int
    map: int
    causal: bool


def norm_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mode: str = "split",
    lam: float | Tensor = 3.0,
    tau: float | Tensor = 0.5,
    norm_scale: float | Tensor = 1.0,
    key_power: float = 3.0,
    alpha: float = 20.0,
    eps: float = 1e-6,
    eps_mode: str = "mean",
    norm_eps: float = 1e-6,
    rope: str | None = None,
    rope_tables: tuple[Tensor, Tensor] | None = None,
    rope_grid: tuple[int, int] | None = None,
    position: int | Tensor | None = None,
    causal: bool = False,
    cu_seqlens: Tensor | None = None,
    initial_state: LinearAttentionState | None = None,
    output_final_state: bool = False,
    gate: Tensor | None = None,
    layout: str = "bnhd",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """Norm-aware linear attention, bidirectional or causal.

    Args:
        q: [B, N, Hq, d]. k: [B, M, Hk, d]. v: [B, M, Hk, dv]. Hq is a multiple of Hk; query head h reads head
            h // (Hq / Hk). M may differ from N only in the bidirectional form; either may be 0, which reads a state or
            makes one. Any strides: views of a packed projection are not copied.
        mode: "split" (the released code) or "cos" (the paper; tends to "split" as alpha grows).
        lam, tau, norm_scale: of the query's exponent lam (tau + tanh(norm_scale |q|)); numbers, or tensors [] or [Hq],
            which get gradients. With lam * tau below 1 the gradient of a channel that is nearly 0 is unbounded.
        key_power: exponent of the keys' magnitudes, above 0. alpha: steepness of the angle in mode "cos".
        eps: added to the denominator, as a mean over tokens (eps_mode="mean") or as it is ("sum").
        norm_eps: r = sqrt(|q|^2 + norm_eps^2) in place of the norm.
        rope: None, "num" or "both".
        rope_tables: sin, cos [positions, d / 2], or [positions, d] with each pair's value twice; by default those of
            ``pyelastic.rope_tables`` for N positions, or of ``rope_grid`` (height, width).
        position: of the first token in the tables, an int or int64 [sequences]; by default the state's count in the
            causal form, else 0.
        causal: token i attends to tokens up to i.
        cu_seqlens: [sequences + 1] int32 or int64, for sequences packed along N with B = 1: the first token of each,
            and the end of the last.
        initial_state: of tokens before these. output_final_state: also return the state after them.
        gate: [B, N, Hq, dv]; the output is multiplied by silu(gate).
        layout: "bnhd", or "bhnd" for all tensors as [B, H, N, .].
        backend: ``auto``, ``cuda``, ``triton``, ``cpu`` or ``eager``.

    Returns:
        o [B, N, Hq, dv] in q's dtype; with ``output_final_state`` also a ``LinearAttentionState``, which has gradients.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what was got.
        BackendError: the backend asked for cannot run the call.
        RuntimeError: double backward through a kernel; ``backend="eager"`` supports it.
    """
    _errors.check_choice(OP, "mode", mode, tuple(MODES))
    _errors.check_choice(OP, "eps_mode", eps_mode, ("mean", "sum"))
    _errors.check_choice(OP, "layout", layout, ("bnhd", "bhnd"))
    given = {"q": q, "k": k, "v": v, **({} if gate is None else {"gate": gate})}
    for name, tensor in given.items():
        _errors.check_rank(OP, name, tensor, 4, "[B, N, H, d]" if layout == "bnhd" else "[B, H, N, d]")
    if layout == "bhnd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gate = None if gate is None else gate.transpose(1, 2)
    check_tensors(q, k, v, gate, causal, cu_seqlens)
    check_numbers(key_power=key_power, alpha=alpha, eps=eps, norm_eps=norm_eps)
    params = head_parameters(q, lam=lam, tau=tau, norm_scale=norm_scale)
    offsets = check_offsets(q, cu_seqlens)
    inputs = Inputs(
        q,
        k,
        v,
        params,
        gate,
        *make_rope(q, k, rope, rope_tables, rope_grid),
        None,
        offsets,
        None,
        None,
        None,
        MODES[mode],
        rope == "both",
        causal,
        eps_mode == "mean",
        float(key_power),
        float(alpha),
        float(eps),
        float(norm_eps),
    )
    inputs = with_state(inputs, initial_state, position)
    return attend(inputs, output_final_state, layout, backend)


def attend(inputs: Inputs, output_final_state: bool, layout: str, backend: str) -> Any:
    """Resolve the backend, run it, and give the result the caller's layout."""
    inputs = changed(inputs, final_state=output_final_state)
    o, s, z = _dispatch.resolve(OP, call_of(inputs), backend).run.attend(inputs)  # type: ignore[union-attr]
    o = o.transpose(1, 2) if layout == "bhnd" else o
    if not output_final_state:
        return o
    if inputs.cu_seqlens is None:
        tokens = s.new_full((sequences_of(inputs),), inputs.k.shape[1], dtype=torch.int64)
    else:
        tokens = inputs.cu_seqlens.diff()
    return o, LinearAttentionState(s, z, tokens if inputs.count0 is None else inputs.count0 + tokens)


# --- raw ops and autograd -------------------------------------------------------------------------------------

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? params, Tensor? gate, Tensor? sin, Tensor? cos, Tensor? start, "
    "Tensor? cu_seqlens, Tensor? s0, Tensor? z0, Tensor? count0, int map, bool rope_both, bool causal, bool mean, "
    "float key_power, float alpha, float eps, float norm_eps, bool final_state"
)
FORWARD = f"({_INPUTS}) -> (Tensor, Tensor, Tensor)"
BACKWARD = (
    f"({_INPUTS}, Tensor s, Tensor z, Tensor grad, Tensor? grad_s, Tensor? grad_z, bool[7] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
STEP = (
    "(Tensor q, Tensor k, Tensor v, Tensor? params, Tensor? gate, Tensor? sin, Tensor? cos, Tensor(a!) tokens, "
    "Tensor(b!) s, Tensor(c!) z, int map, bool rope_both, bool mean, float key_power, float alpha, float eps, "
    "float norm_eps) -> Tensor"
)
# Inputs that can have a gradient: their places in the schema.
DIFFERENTIABLE = (0, 1, 2, 3, 4, 9, 10)
ROWS = (0, 1, 2, 4)  # q, k, v and the gate


def _fake_forward(launcher: Any, *arguments: Any) -> tuple[Tensor, ...]:
    x = Inputs(*arguments)
    s, z = ((0,), (0,)) if launcher.quadratic(x) else x.state_shapes()
    return x.empty_output(), x.q.new_empty(s, dtype=x.dtype), x.q.new_empty(z, dtype=x.dtype)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    def made(place: int, need: bool) -> Tensor:
        x: Tensor | None = arguments[place]
        if x is None or not need:
            return arguments[0].new_empty(0)
        return empty_like(x, x.shape[3]) if place in ROWS else x.new_empty(x.shape)

    return tuple(map(made, DIFFERENTIABLE, arguments[-1]))


def _fake_step(*arguments: Any) -> Tensor:
    q, v = arguments[0], arguments[2]
    return empty_like(q, v.shape[-1])


# A launcher has forward and backward, as the schemas, quadratic(inputs), whether these make no states, and
# advance(inputs) -> o, a causal forward that leaves the state after its tokens in inputs.s0 and inputs.z0.
LAUNCHERS: dict[str, Any] = {"cpu": cpu, "cuda": cuda, "triton": triton}


def _define(name: str, launcher: Any) -> tuple[Any, Any, Any]:
    """The three raw ops of a backend."""

    def step(*arguments: Any) -> Tensor:
        tensors, (tokens, s, z, *options) = arguments[:7], arguments[7:]
        map, rope_both, mean, *scalars = options
        rope_start = None if tensors[5] is None else tokens
        state = (rope_start, None, s, z, tokens)
        inputs = Inputs(*(*tensors, *state, map, rope_both, True, mean, *scalars))
        o: Tensor = launcher.advance(inputs)
        tokens.add_(inputs.q.shape[1])
        return o

    return (
        _library.define(f"{OP}_fwd", name, FORWARD, launcher.forward, partial(_fake_forward, launcher)),
        _library.define(f"{OP}_bwd", name, BACKWARD, launcher.backward, _fake_backward),
        _library.define(f"{OP}_step", name, STEP, step, _fake_step),
    )


OPS = {name: _define(name, launcher) for name, launcher in LAUNCHERS.items()}


class _Backward(torch.autograd.Function):
    """The backward as a node of its own, with create_graph: differentiating it fails loudly instead of giving zeros."""

    @staticmethod
    def forward(ctx: Any, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = OPS[backend][1](*arguments)
        return gradients

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{OP}: double backward needs backend='eager'; the kernels compute first gradients only")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        o, s, z = OPS[backend][0](*arguments)
        ctx.backend, ctx.options = backend, arguments[12:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:12], s, z)
        return o, s, z

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_s: Tensor | None, grad_z: Tensor | None) -> Any:
        *tensors, s, z = ctx.saved_tensors
        inputs = Inputs(*tensors, *ctx.options)
        if grad is None:
            grad = inputs.q.new_zeros(inputs.output_shape())
        needs = [ctx.needs_input_grad[1 + i] for i in DIFFERENTIABLE]
        run = partial(_Backward.apply, ctx.backend) if torch.is_grad_enabled() else OPS[ctx.backend][1]
        made = run(*inputs, s, z, grad, grad_s, grad_z, needs)
        found: list[Tensor | None] = [None] * len(inputs)
        for place, gradient, need in zip(DIFFERENTIABLE, made, needs, strict=True):
            found[place] = gradient if need else None
        return (None, *found)


# --- backends -------------------------------------------------------------------------------------------------


class Runner(NamedTuple):
    """What a backend does: a pass with gradients, and a step that changes the state in place."""

    attend: Any
    step: Any


def _runner(name: str) -> Runner:
    def attend(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        return _Attention.apply(name, *inputs)

    return Runner(attend, OPS[name][2])


def _eager_attend(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(inputs.q.device.type, enabled=False):
        return eager.attend(*inputs)


def _eager_step(*arguments: Any) -> Tensor:
    tensors, (tokens, s, z, *options) = arguments[:7], arguments[7:]
    map, rope_both, mean, *scalars = options
    start = None if tensors[5] is None else tokens
    made = _eager_attend(Inputs(*(*tensors, start, None, s, z, tokens, map, rope_both, True, mean, *scalars)))
    s.copy_(made[1])
    z.copy_(made[2])
    tokens.add_(tensors[0].shape[1])
    return made[0]


def call_of(inputs: Inputs) -> Call:
    q, v = inputs.q, inputs.v
    return Call(OP, q.device, q.dtype, "q", q.shape[3], v.shape[3], inputs.map, inputs.causal)


def _make_call(q: Tensor, k: Tensor, v: Tensor, *, mode: str = "split", causal: bool = False, **options: Any) -> Call:
    return Call(OP, q.device, q.dtype, "q", q.shape[3], v.shape[3], MODES[mode], causal)


def _cpu_why_not(call: Call) -> str | None:
    if call.device.type != "cpu":
        return f"q is on {call.device}; the kernel runs on the CPU"
    return _extension.why_not()


def _cuda_why_not(call: Call) -> str | None:
    missing = _dispatch.unsupported_dtype(call, DTYPES[:3]) or cuda.why_not(call.dim, call.v_dim, call.map)
    return missing or _extension.cuda_why_not(str(call.device))


def _triton_why_not(call: Call) -> str | None:
    missing = _dispatch.unsupported_dtype(call, DTYPES[:3]) or triton.why_not(call.dim, call.v_dim, call.map)
    return missing or _triton.why_not(str(call.device), "q", OP, "forward")


def _order(call: Call) -> Sequence[str]:
    """Triton first on GPUs: its products run on the matrix units, those of the CUDA kernels do not. Not measured."""
    return ("triton", "cuda", "eager") if call.device.type == "cuda" else _dispatch.default_order(call)


_ALL = ("float16", "bfloat16", "float32", "float64")
_DIRECTIONS = ("forward", "backward", "step")

_dispatch.register(
    OP,
    _dispatch.Backend(
        "cuda",
        _runner("cuda"),  # type: ignore[arg-type]
        _cuda_why_not,
        _ALL[:3],
        _DIRECTIONS,
        label="emulated; not yet run on a GPU",
    ),
    _dispatch.Backend(
        "triton",
        _runner("triton"),  # type: ignore[arg-type]
        _triton_why_not,
        _ALL[:3],
        _DIRECTIONS,
        label="interpreted; not yet run on a GPU",
    ),
    _dispatch.Backend(
        "cpu",
        _runner("cpu"),  # type: ignore[arg-type]
        _cpu_why_not,
        _ALL,
        _DIRECTIONS,
        label="tested on CPU",
    ),
    _dispatch.Backend(
        "eager",
        Runner(_eager_attend, _eager_step),  # type: ignore[arg-type]
        lambda call: None,
        _ALL,
        _DIRECTIONS,
        label="reference",
    ),
    make_call=_make_call,
    order=_order,
)
