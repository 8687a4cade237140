"""Losses on MaxSim scores, each one autograd op: scores, loss and the scores' gradient in one forward pass.

With scores ``z = score / temperature`` of a row's documents, probabilities ``p = softmax(z)`` and teacher's ``q``::

    info_nce      loss_i = logsumexp_j z_ij - z_iy           g_ij = (p_ij - [j = y]) / temperature
    kl_distill    loss_i = sum_j q_ij (log q_ij - log p_ij)  g_ij = (p_ij - q_ij) / temperature
    margin_mse    loss_i = mean_k (D_ik)^2, D_ik = (s_i0 - s_ik) - (t_i0 - t_ik), k >= 1
                  g_ik = -2 D_ik / (K - 1),  g_i0 = - sum_k g_ik

``filter_eps``: entries of g below ``filter_eps * max_j |g_ij|`` are dropped before the backward pass, which skips such
pairs; an approximation (as gradient filtering in Wijmans 2024, Cut Cross-Entropy, arXiv 2411.09009), off by default.
Sources: van den Oord 2018 (InfoNCE, arXiv 1807.03748), Hofstaetter 2020 (Margin-MSE, arXiv 2010.02666), Lee 2023 (XTR,
arXiv 2304.01982).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyelastic import _dispatch, _errors
from pyelastic.ops._binding import changed
from pyelastic.ops._maxsim_layout import OP, Inputs
from pyelastic.ops.maxsim import (
    OPS,
    Documents,
    Prepared,
    call_of,
    gradients,
    maxsim,
    prepare,
    remember,
    saves,
    score,
)

REDUCTIONS = ("none", "mean", "sum")
# Bytes of similarities that maxsim_xtr looks at together to find its thresholds.
XTR_BYTES = 32 << 20
XTR_OPTIONS = frozenset(
    {
        "query_mask",
        "document_mask",
        "normalize",
        "cu_seqlens_q",
        "cu_seqlens_d",
        "max_seqlen_q",
        "max_seqlen_d",
        "save",
    }
)


def maxsim_info_nce(
    queries: Tensor,
    documents: Documents,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    loss_reduction: str = "mean",
    filter_eps: float = 0.0,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """Contrastive cross-entropy of each query's scores against its positive document.

    Args:
        queries: as in ``pyelastic.maxsim``, [Nq, Lq, d] or packed.
        documents: [Nd, Ld, d] or packed, scored against all queries; hard negatives are more documents. Or
            [Nq, K, Ld, d]: K documents of each query, no in-batch negatives.
        labels: [Nq] int64, the positive's index. None: ``i * (Nd // Nq)``, documents grouped by query with the positive
            first, or 0 for [Nq, K, Ld, d].
        temperature: divides the scores; > 0. ``maxsim``'s own, of the smooth maximum, is ``smooth_temperature`` here.
        loss_reduction: over queries, and over ``dims``: ``"mean"``, ``"sum"``, or ``"none"``, [Nq] or [n, Nq].
        filter_eps: see the module; 0 is exact.
        options: any of ``maxsim``'s, e.g. masks, ``normalize``, ``cu_seqlens_d``, ``reduction="mean"``.

    Returns:
        The loss, float32 (float64 for float64 inputs).

    Raises:
        As ``maxsim``; ValueError for labels out of range (on the CPU) or a layout without rows of scores.
    """
    p = prepare(queries, documents, **_allowed(options))
    rows, columns = _grid(p)
    if labels is None:
        step = 0 if p.problem.layout == "grouped" else columns // max(rows, 1)
        labels = torch.arange(rows, device=queries.device) * step
    _errors.check_rank(OP, "labels", labels, 1, "[Nq]")
    if labels.dtype != torch.int64 or labels.shape[0] != rows:
        raise ValueError(
            f"{OP}: labels is {labels.dtype} {list(labels.shape)}; expected int64 [{rows}], one per query"
        )
    if _dispatch.may_read(labels.device) and bool(((labels < 0) | (labels >= columns)).any()):
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"{OP}: labels reach from {low} to {high}; expected 0 <= label < {columns}")
    settings = ("info_nce", _positive("temperature", temperature), 1.0, filter_eps)
    return _loss(p, settings, labels, loss_reduction, backend, options)


def maxsim_kl_distill(
    queries: Tensor,
    documents: Documents,
    teacher_scores: Tensor,
    *,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    loss_reduction: str = "mean",
    filter_eps: float = 0.0,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """KL divergence of the teacher's distribution over each query's documents from ours.

    teacher_scores: [Nq, K] floating, or [Nq, Nd] for documents [Nd, Ld, d]; -inf gives a document no probability. No
    gradient. Other arguments, result and errors as in ``maxsim_info_nce``.
    """
    p = prepare(queries, documents, **_allowed(options))
    _check_teacher(teacher_scores, *_grid(p))
    temperatures = _positive("temperature", temperature), _positive("teacher_temperature", teacher_temperature)
    return _loss(
        p, ("kl_distill", *temperatures, filter_eps), teacher_scores.detach(), loss_reduction, backend, options
    )


def maxsim_margin_mse(
    queries: Tensor,
    documents: Documents,
    teacher_scores: Tensor,
    *,
    loss_reduction: str = "mean",
    filter_eps: float = 0.0,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """Squared difference of the margins (positive, column 0, minus negative) to the teacher's.

    teacher_scores: [Nq, K], K >= 2. Documents [Nq, K, Ld, d], or any that ``maxsim_info_nce`` takes. No gradient to the
    teacher. Other arguments, result and errors as in ``maxsim_info_nce``.
    """
    p = prepare(queries, documents, **_allowed(options))
    rows, columns = _grid(p)
    _check_teacher(teacher_scores, rows, columns)
    if columns < 2:
        raise ValueError(f"{OP}: {columns} documents per query; a margin needs 2 or more")
    return _loss(p, ("margin_mse", 1.0, 1.0, filter_eps), teacher_scores.detach(), loss_reduction, backend, options)


def maxsim_xtr(queries: Tensor, documents: Tensor, *, k: int = 256, backend: str = "auto", **options: Any) -> Tensor:
    """XTR training scores [Nq, Nd] (Lee 2023, section 3.1): each query token keeps the documents that one of its ``k``
    best tokens of the batch lies in, and a score is the mean over the tokens that kept anything there.

    With theta_is the k-th largest similarity of query token (i, s) over all document tokens::

        score_ij = sum_s [m_ijs >= theta_is] max(m_ijs, 0) / Z_ij,   Z_ij = #{s: the term is positive}, at least 1e-3

    Z and theta carry no gradient. A negative maximum counts as 0, also in the corner where all of a document's tokens
    are among the k best, in which PyLate's XTRScores keeps it negative. Similarities within 2^-20 of theta count as
    equal to it. Takes ``query_mask``, ``document_mask``, ``normalize``, ``cu_seqlens_q``, ``cu_seqlens_d``, ``save``.

    queries, documents: as in ``maxsim``, layout "cross". Raises as ``maxsim``; ValueError for k < 1.
    """
    unknown = set(options) - XTR_OPTIONS
    if unknown:
        raise TypeError(f"{OP}: maxsim_xtr does not take {', '.join(sorted(unknown))}")
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"{OP}: k is {k!r}; expected an integer >= 1")
    options = {"layout": "cross", **options}
    p = prepare(queries, documents, **options)
    m = maxsim(queries, documents, reduction="none", backend=backend, **options)  # [Nq, Nd, Lq]
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        theta = _thresholds(p, k)
        sequence = p.problem.queries
        at = sequence.offsets[:-1, None] + torch.arange(sequence.longest, device=m.device)
        theta = torch.cat((theta, theta.new_zeros(1)))[torch.where(at < sequence.offsets[1:, None], at, len(theta))]
        limit = theta - theta.abs() * 2.0**-20
        kept = (m >= limit[:, None]) & (m > 0)
        z = kept.sum(-1).to(m.dtype).clamp(min=1e-3)
    return torch.where(kept, m, 0.0).sum(-1) / z


def _thresholds(p: Prepared, k: int) -> Tensor:
    """theta [Tq]: the k-th largest similarity over all documents' tokens that count, -inf where there are fewer."""
    x = p.inputs
    dtype = torch.float64 if x.queries.dtype == torch.float64 else torch.float32
    q, best = x.queries.to(dtype), None
    q = F.normalize(q, dim=1) if x.normalize else q
    width = max(k, XTR_BYTES // (max(len(q), 1) * dtype.itemsize))
    for first in range(0, x.documents.shape[0], width):
        d = x.documents[first : first + width].to(dtype)
        s = q @ (F.normalize(d, dim=1) if x.normalize else d).T
        if x.d_mask is not None:
            s = torch.where(x.d_mask[first : first + width], s, -torch.inf)
        s = s if best is None else torch.cat((best, s), 1)
        best = s.topk(min(k, s.shape[1]), 1).values
    if best is None or best.shape[1] < k:
        return q.new_full((len(q),), -torch.inf)
    return best[:, -1]


# --- checks ---------------------------------------------------------------------------------------------------


def _allowed(options: dict[str, Any]) -> dict[str, Any]:
    """Options of ``maxsim`` that give one score per query and document."""
    if "smooth_temperature" in options:
        options = {**options, "temperature": options["smooth_temperature"]}
        del options["smooth_temperature"]
    for name in ("empty_score", "pairs"):
        if name in options:
            raise TypeError(f"{OP}: the losses do not take {name}")
    if options.get("reduction") == "none":
        raise ValueError(f"{OP}: reduction is 'none'; a loss needs sum or mean")
    return options


def _grid(p: Prepared) -> tuple[int, int]:
    """Queries and scores per query."""
    shape = p.problem.shape()
    if p.problem.layout not in ("cross", "grouped"):
        raise ValueError(f"{OP}: layout is '{p.problem.layout}'; a loss needs 'cross' or 'grouped'")
    return shape[0], shape[1]


def _positive(name: str, value: float) -> float:
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{OP}: {name} is {value}; expected a positive number")
    return float(value)


def _check_teacher(teacher: Tensor, rows: int, columns: int) -> None:
    _errors.check_rank(OP, "teacher_scores", teacher, 2, "[Nq, K]")
    if tuple(teacher.shape) != (rows, columns) or not teacher.is_floating_point():
        raise ValueError(
            f"{OP}: teacher_scores is {teacher.dtype} {list(teacher.shape)}; expected floating [{rows}, {columns}]"
        )


# --- the op ---------------------------------------------------------------------------------------------------

_Settings = tuple[str, float, float, float]  # kind, temperature, teacher's temperature, filter_eps


def _loss(
    p: Prepared, settings: _Settings, target: Tensor, loss_reduction: str, backend: str, options: dict[str, Any]
) -> Tensor:
    _errors.check_choice(OP, "loss_reduction", loss_reduction, REDUCTIONS)
    if not 0.0 <= settings[3] < 1.0:
        raise ValueError(f"{OP}: filter_eps is {settings[3]}; expected 0 <= filter_eps < 1")
    inputs, weights = p.inputs, p.weights
    chosen = _dispatch.resolve(OP, call_of(inputs), backend)
    shape = (len(inputs.prefixes), *p.problem.shape())
    save = options.get("save", "auto")
    if chosen.name == "eager" or (weights is not None and weights.requires_grad):
        # By autograd; learned weights need each token's value in Python anyway.
        rows = _rows(score(p, chosen, save).reshape(shape), target, settings)
    else:
        inputs = changed(inputs, weights=weights)
        rows = _Loss.apply(chosen.name, saves(inputs, save), shape, settings, target, *inputs)
    rows = rows if options.get("dims") is not None else rows[0]
    if loss_reduction == "none":
        return rows
    return rows.sum() if loss_reduction == "sum" else rows.sum() / max(rows.numel(), 1)


def _margins(scores: Tensor, teacher: Tensor) -> Tensor:
    """D [n, Nq, K - 1]."""
    return (scores[..., :1] - scores[..., 1:]) - (teacher[..., :1] - teacher[..., 1:])


class _Filter(torch.autograd.Function):
    """The identity, with small gradients dropped."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _filtered(grad, ctx.eps), None


def _filtered(g: Tensor, eps: float) -> Tensor:
    return torch.where(g.abs() < eps * g.abs().amax(-1, keepdim=True), 0.0, g) if g.shape[-1] else g


def _rows(scores: Tensor, target: Tensor, settings: _Settings) -> Tensor:
    """Loss of each query [n, Nq], from scores [n, Nq, K], for autograd."""
    kind, temperature, teacher_temperature, eps = settings
    scores = _Filter.apply(scores, eps) if eps else scores
    if kind == "margin_mse":
        return _margins(scores, target.to(scores.dtype)).square().mean(-1)
    log_p = torch.log_softmax(scores / temperature, -1)
    if kind == "info_nce":
        return -log_p.gather(-1, target.expand(len(scores), -1)[..., None])[..., 0]
    q = torch.softmax(target.to(scores.dtype) / teacher_temperature, -1)
    return torch.special.xlogy(q, q).sum(-1) - torch.where(q == 0, 0.0, q * log_p).sum(-1)


def _gradient(scores: Tensor, target: Tensor, settings: _Settings) -> Tensor:
    """d loss_i / d score_ij in closed form."""
    kind, temperature, teacher_temperature, eps = settings
    if kind == "margin_mse":
        d = _margins(scores, target.to(scores.dtype))
        g = d * (-2.0 / max(d.shape[-1], 1))
        g = torch.cat((-g.sum(-1, keepdim=True), g), -1)
    else:
        g = torch.softmax(scores / temperature, -1)
        if kind == "info_nce":
            at = target.expand(len(scores), -1)[..., None]
            g = g.scatter_add(-1, at, torch.full_like(at, -1.0, dtype=g.dtype))
        else:
            g = g - torch.softmax(target.to(scores.dtype) / teacher_temperature, -1)
        g = g / temperature
    return _filtered(g, eps) if eps else g


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        save: bool,
        shape: tuple[int, ...],
        settings: _Settings,
        target: Tensor,
        *arguments: Any,
    ) -> Tensor:
        inputs = Inputs(*arguments)
        outputs = OPS[backend][0](*inputs, False, save)
        scores = outputs[0].reshape(shape)
        g = _gradient(scores, target, settings)
        remember(ctx, backend, inputs, False, outputs, g)
        return _rows(scores, target, (*settings[:3], 0.0))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        g = ctx.saved_tensors[-1] * grad[..., None]
        g = g if ctx.saved_tensors[6] is None else g.flatten(1)  # a list of pairs: [n, P]
        return (*(None,) * 5, *gradients(ctx, g, ctx.needs_input_grad[5:7]), *(None,) * 17)
