"""Margin softmax: the ArcFace family's loss from embeddings and class weights; the B x C logits never exist.

With unit rows ``e^_i``, ``w^_j``, cosines ``c_ij = <e^_i, w^_j>``, target angle ``theta_i`` and scale ``s``::

    z_ij = s c_ij  (j != y_i),   z_iy = s phi_i(theta_i)          phi: pyelastic.margins
    lse_neg_i = log sum_{j != y_i} exp z_ij
    loss_i = softplus(lse_neg_i - z_iy)                           = lse_i - z_iy without its cancellation

Only the target column is bent, so the margin is arithmetic on ``[B]`` vectors left to autograd, and one pair of
kernels, the *sweep over the negatives*, serves every variant:
forward ``(theta, lse_neg)``; backward, from their upstream gradients ``g_theta``, ``g_lse``::

    G_ij = g_lse_i s exp(z_ij - lse_neg_i)  (j != y_i)
    dE^ = G W^ - g_theta t,  dW^ = G^T E^ - (g_theta u at row y)  t, u: unit tangents at e^_i and w^_y
    dx = (dx^ - <dx^, x^> x^) / |x|

Shapes: embeddings [B, D], weight [C * subcenters, D], labels [B]. Dtypes: float16, bfloat16, float32 in any mix,
computed and returned in float32; float64 in float64. Cost: 2 B C D operations forward, 6 B C D backward; saved for
backward: the inputs and O(B) floats. Sources: see pyelastic.margins; the common core, csrc/margin_softmax.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyelastic import _dispatch, _errors, _extension, _library, _random
from pyelastic.eager import margin_softmax as eager
from pyelastic.eager.margin_softmax import MOMENTS, RANK, SUM_COS, Sweep, statistics_dtype
from pyelastic.margins import ArcFace, Margin, deal
from pyelastic.ops import _margin_softmax_cpu as cpu
from pyelastic.ops import _margin_softmax_cuda as cuda
from pyelastic.ops import _margin_softmax_rows as rows
from pyelastic.ops import _margin_softmax_triton as triton
from pyelastic.ops import _triton
from pyelastic.ops._margin_softmax_rows import MarginSoftmaxAux

OP = "margin_softmax"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("none", "mean", "sum")


@dataclass(frozen=True)
class Call:
    """What a backend needs to know to say whether it can run a call."""

    op: str
    device: torch.device
    dtype: torch.dtype
    dtype_argument: str
    subcenters: int


def margin_softmax(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: Margin | None = None,
    scale: float = 64.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    subcenters: int = 1,
    classes: Tensor | None = None,
    sparse_grad: bool = False,
    margins: Tensor | None = None,
    training: bool = True,
    seed: int | Tensor | None = None,
    row_offset: int = 0,
    return_aux: bool | Sequence[str] = False,
    backend: str = "auto",
) -> Any:
    """Margin-softmax loss of ``embeddings`` [B, D] against class rows ``weight`` [C * subcenters, D].

    Args:
        labels: [B], int64 or int32, in [0, C) or ``ignore_index``.
        margin: one of ``pyelastic.margins``; None is ``ArcFace(0.5)``.
        scale: s > 0. Any size; beyond about 64 the CPU kernel carries a running maximum.
        reduction: ``"none"`` [B], ``"sum"``, or ``"mean"`` over the rows not ignored (0 if there are none).
        sample_weight: [B], multiplies each row's loss; ``"mean"`` still divides by the number of rows.
        label_smoothing: in [0, 1), over the classes present, as in ``F.cross_entropy``.
        z_loss: adds ``z_loss * lse^2``.
        subcenters: K rows per class, class-major; the closest counts (Deng 2020, sub-centre ArcFace).
        classes: [n] int64, sorted and unique: only these classes exist for this call (Partial FC; see
            ``sample_classes``). Must hold every label.
        sparse_grad: with ``classes``, return the gradient of ``weight`` as a sparse COO tensor of the rows read.
        margins: [B], used instead of the margin's own value or draw.
        training: False replaces drawn margins by their mean.
        seed, row_offset: drawn margins are a function of (seed, row_offset + row) alone; None takes a seed from
            torch's default generator.
        return_aux: True or a sequence of ``MarginSoftmaxAux`` field names: also return that tuple.
        backend: ``auto``, ``cpu`` or ``eager``.

    Returns:
        The loss, float32 (float64 for float64 inputs), or ``(loss, MarginSoftmaxAux)``.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what was got.
        BackendError: the backend asked for cannot run the call.
        RuntimeError: double backward through a kernel; ``backend="eager"`` supports it.
    """
    margin = ArcFace() if margin is None else margin
    # Spelled out: locals() is not traced by the torch.compile of torch 2.6.
    wanted = _check({
        "embeddings": embeddings, "weight": weight, "labels": labels, "margin": margin, "scale": scale,
        "reduction": reduction, "sample_weight": sample_weight, "label_smoothing": label_smoothing, "z_loss": z_loss,
        "subcenters": subcenters, "classes": classes, "sparse_grad": sparse_grad, "margins": margins,
        "return_aux": return_aux,
    })  # fmt: skip
    chosen = _dispatch.resolve(OP, _make_call(embeddings, weight, labels, subcenters=subcenters), backend)
    if _dispatch.may_read(embeddings.device):
        _check_labels(labels, weight.shape[0] // subcenters, ignore_index, classes)

    with torch.autocast(embeddings.device.type, enabled=False):
        dtype = statistics_dtype(embeddings)
        valid = labels != ignore_index
        targets = rows.targets_of(labels, valid, weight.shape[0] // subcenters, classes)
        values = rows.margins_of(margin, margins, labels, dtype, training, seed, row_offset)
        # Whatever an ignored row holds: a NaN would come back from the backward as 0 * NaN.
        values = torch.where(valid, values, 0.0)
        norms = None
        if margin.needs_norms:
            # One cast for both paths: rounding each gradient to 16 bits before they are added would lose digits.
            embeddings = embeddings.to(dtype)
            norms = torch.linalg.vector_norm(torch.where(valid[:, None], embeddings, 0.0), dim=1)

        threshold = hard_map = None
        if margin.stresses_negatives:
            with torch.no_grad():
                before = eager.target_angle(embeddings, weight, targets, classes, subcenters)
                threshold, hard_map = margin.hard_negatives(before, values)
        stats = (SUM_COS if label_smoothing else 0) | (RANK if {"rank", "max_negative_cos"} & wanted else 0)
        stats |= MOMENTS if {"el2n", "entropy"} & wanted else 0
        inputs = (embeddings, weight, targets, classes, threshold, hard_map, float(scale), subcenters, stats)
        assert chosen.run is not None  # resolve returns only backends that can run
        swept: Sweep = chosen.run(*inputs, sparse_grad)

        count = weight.shape[0] // subcenters if classes is None else classes.shape[0]
        if margin.order is not None and margins is None and training:
            values = deal(values, torch.cos(swept.theta.detach()), valid, margin.order)
        result, aux = rows.loss_of(
            swept, margin, values, norms, valid, scale=scale, label_smoothing=label_smoothing, z_loss=z_loss,
            sample_weight=sample_weight, reduction=reduction, count=count, wanted=wanted,
        )  # fmt: skip
        return (result, aux) if return_aux else result


def sample_classes(
    labels: Tensor, num_classes: int, rate: float, *, seed: int | Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Classes for Partial FC [n], sorted: every class in ``labels`` and a random rest (An 2022, arXiv 2203.15565).

    ``n = max(ceil(rate * num_classes), min(B, num_classes))`` depends on shapes alone, so nothing synchronises.
    Class j's random score is a function of (seed, j): all ranks of a job with one seed choose alike.
    """
    _errors.check_rank(OP, "labels", labels, 1, "[B]")
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"{OP}: rate is {rate}; expected 0 < rate <= 1")
    seed = _random.fresh_seed() if seed is None else seed
    n = max(-int(-rate * num_classes // 1), min(labels.shape[0], num_classes))
    score = _random.philox(seed, torch.arange(num_classes, device=labels.device))[0]
    # One spare slot takes the ignored rows; a positive outranks every random score.
    score = torch.cat((score, score.new_zeros(1)))
    score[torch.where(labels == ignore_index, num_classes, labels.to(torch.int64))] = 1 << 33
    return torch.topk(score[:num_classes], n).indices.sort().values


# --- checks ---------------------------------------------------------------------------------------------------


def _check(arguments: dict[str, Any]) -> frozenset[str]:
    """Validate everything that needs no data; returns the wanted auxiliaries."""
    e, w, labels = arguments["embeddings"], arguments["weight"], arguments["labels"]
    optional = {name: arguments[name] for name in ("sample_weight", "classes", "margins")}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    _errors.refuse_dtensor(OP, embeddings=e, weight=w, labels=labels, **given)
    _errors.check_rank(OP, "embeddings", e, 2, "[B, D]")
    _errors.check_rank(OP, "weight", w, 2, "[C, D]")
    _errors.check_rank(OP, "labels", labels, 1, "[B]")
    for name, tensor in given.items():
        _errors.check_rank(OP, name, tensor, 1, "[n]" if name == "classes" else "[B]")
    _errors.check_floating(OP, "embeddings", e, DTYPES)
    _errors.check_floating(OP, "weight", w, DTYPES)
    if (e.dtype == torch.float64) != (w.dtype == torch.float64):
        raise TypeError(f"{OP}: embeddings is {e.dtype} and weight is {w.dtype}; float64 needs both")
    for name in ("sample_weight", "margins"):
        if name in given and given[name].is_complex():
            raise TypeError(f"{OP}: {name} is {str(given[name].dtype).removeprefix('torch.')}; expected a real dtype")
    for name in ("labels", "classes"):
        tensor = arguments[name]
        allowed = (torch.int64, torch.int32) if name == "labels" else (torch.int64,)
        if tensor is not None and tensor.dtype not in allowed:
            text = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise TypeError(f"{OP}: {name} is {str(tensor.dtype).removeprefix('torch.')}; expected {text}")
    _errors.check_same_device(OP, embeddings=e, weight=w, labels=labels, **given)
    if e.shape[1] != w.shape[1]:
        raise ValueError(
            f"{OP}: embeddings is {list(e.shape)} and weight is {list(w.shape)}; expected the same last size D"
        )
    for name in ("labels", "sample_weight", "margins"):
        tensor = arguments[name]
        if tensor is not None and tensor.shape[0] != e.shape[0]:
            raise ValueError(f"{OP}: {name} is {list(tensor.shape)}; expected [{e.shape[0]}], one per embedding")
    if "classes" in given and given["classes"].shape[0] == 0:
        raise ValueError(f"{OP}: classes is [0]; expected at least one class")
    k = arguments["subcenters"]
    if k < 1 or w.shape[0] % k or w.shape[0] == 0:
        raise ValueError(f"{OP}: weight is {list(w.shape)}; expected C * {k} rows, C >= 1 classes of subcenters={k}")
    if arguments["sparse_grad"] and arguments["classes"] is None:
        raise ValueError(f"{OP}: sparse_grad=True needs classes")
    margin = arguments["margin"]
    if not isinstance(margin, Margin):
        raise TypeError(f"{OP}: margin is {type(margin).__name__}; expected one of pyelastic.margins")
    if arguments["margins"] is not None and not margin.accepts_margins:
        raise ValueError(f"{OP}: {type(margin).__name__} computes its margins; margins must be None")
    _errors.check_choice(OP, "reduction", arguments["reduction"], REDUCTIONS)
    for name, low, high, rule in (
        ("scale", 0.0, float("inf"), "a positive number"),
        ("label_smoothing", -1e-300, 1.0, "0 <= label_smoothing < 1"),
        ("z_loss", -1e-300, float("inf"), "a non-negative number"),
    ):
        if not low < arguments[name] < high:
            raise ValueError(f"{OP}: {name} is {arguments[name]}; expected {rule}")
    wanted = arguments["return_aux"]
    if isinstance(wanted, bool):
        return frozenset(MarginSoftmaxAux._fields if wanted else ())
    for name in wanted:
        _errors.check_choice(OP, "return_aux", name, MarginSoftmaxAux._fields)
    return frozenset(wanted)


def _check_labels(labels: Tensor, count: int, ignore_index: int, classes: Tensor | None) -> None:
    """Range of the labels; reads data."""
    valid = labels != ignore_index
    bad = valid & ((labels < 0) | (labels >= count))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{OP}: labels[{row}] is {int(labels[row])}; expected 0 <= label < {count} or ignore_index={ignore_index}"
        )
    if classes is None:
        return
    ordered = bool((classes[1:] > classes[:-1]).all())
    if not ordered or int(classes[0]) < 0 or int(classes[-1]) >= count:
        raise ValueError(f"{OP}: classes must be sorted, unique and in [0, {count})")
    missing = valid & ~torch.isin(labels, classes)
    if bool(missing.any()):
        row = int(missing.nonzero()[0])
        raise ValueError(f"{OP}: labels[{row}] is {int(labels[row])}, which is not in classes")


# --- raw ops and autograd -------------------------------------------------------------------------------------

_INPUTS = (
    "Tensor embeddings, Tensor weight, Tensor labels, Tensor? classes, Tensor? threshold, Tensor? hard_map, "
    "float scale, int subcenters"
)
_FORWARD = f"({_INPUTS}, int stats) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"({_INPUTS}, Tensor theta, Tensor lse_neg, Tensor best, Tensor grad_theta, Tensor grad_lse, "
    "Tensor? grad_sum, bool need_embeddings, bool need_weight) -> (Tensor, Tensor)"
)


def _fake_forward(  # type: ignore[no-untyped-def]
    embeddings, weight, labels, classes, threshold, hard_map, scale, subcenters, stats
):
    per_row = embeddings.new_empty(embeddings.shape[0], dtype=statistics_dtype(embeddings))
    none, index = per_row.new_empty(0), labels.new_empty(labels.shape)

    def optional(bit: int) -> Tensor:
        return torch.empty_like(per_row) if stats & bit else torch.empty_like(none)

    return (
        per_row,
        torch.empty_like(per_row),
        optional(SUM_COS),
        torch.empty_like(index) if stats & RANK else labels.new_empty(0),
        optional(RANK),
        optional(MOMENTS),
        optional(MOMENTS),
        index,
    )


def _fake_backward(  # type: ignore[no-untyped-def]
    embeddings, weight, labels, classes, threshold, hard_map, scale, subcenters,
    theta, lse_neg, best, grad_theta, grad_lse, grad_sum, need_embeddings, need_weight,
):  # fmt: skip
    d_e = torch.empty_like(embeddings) if need_embeddings else embeddings.new_empty(0, embeddings.shape[1])
    if not need_weight:
        return d_e, weight.new_empty(0, weight.shape[1])
    if classes is None:
        return d_e, torch.empty_like(weight)
    return d_e, weight.new_empty(classes.shape[0] * subcenters, weight.shape[1])


_OPS = {
    name: (
        _library.define(f"{OP}_fwd", name, _FORWARD, launcher.forward, _fake_forward),
        _library.define(f"{OP}_bwd", name, _BACKWARD, launcher.backward, _fake_backward),
    )
    for name, launcher in (("cpu", cpu), ("cuda", cuda), ("triton", triton))
}


class _Backward(torch.autograd.Function):
    """The backward as a node of its own, so that differentiating it fails loudly instead of giving zeros."""

    @staticmethod
    def forward(ctx: Any, backend: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor] = _OPS[backend][1](*arguments)
        return gradients

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{OP}: double backward needs backend='eager'; the kernels compute first gradients only")


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, sparse_grad: bool, *inputs: Any) -> tuple[Tensor, ...]:
        outputs = _OPS[backend][0](*inputs)
        theta, lse_neg, *_, best = outputs
        embeddings, weight, labels, classes, threshold, hard_map, ctx.scale, ctx.subcenters, stats = inputs
        ctx.backend, ctx.sparse_grad, ctx.summed = backend, sparse_grad, bool(stats & SUM_COS)
        ctx.save_for_backward(embeddings, weight, labels, classes, threshold, hard_map, theta, lse_neg, best)
        ctx.mark_non_differentiable(*outputs[3:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        g_theta, g_lse, g_sum = gradients[:3]
        *inputs, theta, lse_neg, best = ctx.saved_tensors
        weight, classes = inputs[1], inputs[3]
        need_e, need_w = ctx.needs_input_grad[2:4]
        with torch.autocast(weight.device.type, enabled=False):  # also where backward is called under it
            d_e, d_w = _Backward.apply(
                ctx.backend, *inputs, ctx.scale, ctx.subcenters, theta, lse_neg, best, g_theta, g_lse,
                g_sum if ctx.summed else None, need_e, need_w,
            )  # fmt: skip
        if need_w and classes is not None:
            k = ctx.subcenters
            rows = (classes[:, None] * k + torch.arange(k, device=classes.device)).flatten()
            if ctx.sparse_grad:
                d_w = torch.sparse_coo_tensor(rows[None], d_w, weight.shape, is_coalesced=True, check_invariants=False)
            else:
                d_w = torch.zeros_like(weight).index_copy(0, rows, d_w)
        return (None, None, d_e if need_e else None, d_w if need_w else None) + (None,) * 7


# --- backends -------------------------------------------------------------------------------------------------


def _run(backend: str) -> Any:
    def run(*inputs: Any) -> Sweep:
        *arguments, sparse_grad = inputs
        return Sweep(*_Sweep.apply(backend, sparse_grad, *arguments)[:7])

    return run


def _run_eager(*inputs: Any) -> Sweep:
    return eager.sweep(*inputs[:-1])  # gathers by autograd: the gradient of `weight` is dense


def _make_call(
    embeddings: Tensor, weight: Tensor, labels: Tensor, *, subcenters: int = 1, **options: Any
) -> Call:
    return Call(OP, embeddings.device, embeddings.dtype, "embeddings", subcenters)


def _cpu_why_not(call: Call) -> str | None:
    if call.device.type != "cpu":
        return f"embeddings is on {call.device}; the kernel runs on the CPU"
    return _extension.why_not()


def _cuda_why_not(call: Call) -> str | None:
    dtype = _dispatch.unsupported_dtype(call, DTYPES[:3])
    return dtype or _extension.cuda_why_not(str(call.device))


def _triton_why_not(call: Call) -> str | None:
    dtype = _dispatch.unsupported_dtype(call, DTYPES[:3])
    return dtype or _triton.why_not(str(call.device), "embeddings", OP, "forward")


_HALF, _ALL = ("float16", "bfloat16", "float32"), ("float16", "bfloat16", "float32", "float64")

_dispatch.register(
    OP,
    _dispatch.Backend("cuda", _run("cuda"), _cuda_why_not, _HALF, label="emulated; not yet run on a GPU"),
    _dispatch.Backend("triton", _run("triton"), _triton_why_not, _HALF, label="interpreted; not yet run on a GPU"),
    _dispatch.Backend("cpu", _run("cpu"), _cpu_why_not, _ALL, label="tested on CPU"),
    _dispatch.Backend("eager", _run_eager, lambda call: None, _ALL, label="reference"),
    make_call=_make_call,
)
