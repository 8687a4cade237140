"""MaxSim, ColBERT's late-interaction score of queries and documents; the similarity tensor never exists.

With query tokens ``q_is``, document tokens ``d_jt`` (unit vectors if ``normalize``) and weights ``w_is``::

    s_ijst = <q_is, d_jt>
    m_ijs  = max_t s_ijst, at its first winner a_ijs            the maximum
           = mean of the k largest s_ijst                       topk=k
           = tau log sum_t exp(s_ijst / tau)                    temperature=tau
    score_ij = sum_s w_is m_ijs

and backward, from the upstream gradient ``g_ij``::

    dq^_is = sum_j g_ij w_is d^_{j a_ijs},   dd^_jt = sum_i sum_{s: a_ijs = t} g_ij w_is q^_is
    dx = (dx^ - <dx^, x^> x^) / |x|          if normalize

Layouts: pyelastic/ops/_maxsim_layout.py. Dtypes: float16, bfloat16, float32 in any mix, computed and returned in
float32; float64 in float64; documents also quantised (pyelastic.quantized). Cost: 2 d per similarity forward and 4 d
per query token and document backward. Saved for it: the inputs and a 16-bit winner per query token and document.
Sources: Khattab 2020 (ColBERT, arXiv 2004.12832, eq. 3), Santhanam 2022 (ColBERTv2). The kernels' contract:
csrc/maxsim.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyelastic import _dispatch, _errors, _extension, _library
from pyelastic.eager import maxsim as eager
from pyelastic.eager.maxsim import statistics_dtype
from pyelastic.ops import _maxsim_cpu as cpu
from pyelastic.ops import _maxsim_cuda as cuda
from pyelastic.ops import _maxsim_triton as triton
from pyelastic.ops import _triton
from pyelastic.ops._binding import changed
from pyelastic.ops._maxsim_layout import (
    DTYPES,
    OP,
    Inputs,
    Problem,
    arrange,
    document_counts,
    make_inputs,
    make_prefixes,
    make_weights,
    planes_of,
    stored,
    winner_dtype_of,
    winner_planes_of,
)
from pyelastic.quantized import Int8Tokens, ResidualTokens

Documents = Tensor | Int8Tokens | ResidualTokens
MASK_MODES = ("exclude", "zero")
REDUCTIONS = ("sum", "mean", "none")
SAVES = ("auto", "winners", "recompute")
# Bytes of winners (of maxima, if smooth) above which save="auto" computes them again in the backward pass.
SAVE_BUDGET = 1 << 31


@dataclass(frozen=True)
class Call:
    """What a backend needs to know to say whether it can run a call."""

    op: str
    device: torch.device
    dtype: torch.dtype
    dtype_argument: str
    planes: int
    topk: int
    temperature: float
    quantized: bool


def maxsim(
    queries: Tensor,
    documents: Documents,
    *,
    layout: str | None = None,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    mask_mode: str = "exclude",
    token_weights: Tensor | None = None,
    reduction: str = "sum",
    topk: int = 1,
    temperature: float = 0.0,
    dims: Sequence[int] | None = None,
    normalize: bool = False,
    empty_score: float = 0.0,
    pairs: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_d: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_d: int | None = None,
    save: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Late-interaction scores of ``queries`` and ``documents``.

    Args:
        queries: [Nq, Lq, d], [Lq, d] (one query), or packed [tokens, d] with ``cu_seqlens_q``.
        documents: [Nd, Ld, d], [Nq, K, Ld, d] (K documents of each query), or packed [tokens, d] with ``cu_seqlens_d``;
            ``Int8Tokens`` or ``ResidualTokens`` of those shapes for scoring without gradients.
        layout: ``"single"`` -> [Nd], ``"cross"`` -> [Nq, Nd], ``"grouped"`` -> [Nq, K], ``"pairs"`` -> [N], query i
            with document i, ``"list"`` -> [P]. None: by the shapes; only "pairs" has to be asked for.
        query_mask, document_mask: bool, [...] like the tokens, holes included. A masked query token adds nothing.
        mask_mode: ``"exclude"``: masked document tokens do not exist. ``"zero"``: their similarity is 0 (PyLate).
        token_weights: floating, [...] like the queries' tokens; gradients flow to it.
        reduction: over a query's tokens: ``"sum"``; ``"mean"``, the sum over the number of tokens not masked;
            ``"none"`` returns w m of each token, [..., Lq], with 0 beyond a packed query's end and where it is masked.
        topk: mean of the ``topk`` largest similarities, of all where there are fewer.
        temperature: tau > 0, in units of the similarity: the smooth maximum.
        dims: rising prefixes of the dimension (Matryoshka): scores [len(dims), ...], all in one pass.
        normalize: L2-normalise the tokens (of each prefix) first, as ``F.normalize``: norms below 1e-12 count as 1e-12.
        empty_score: the score of a document without tokens.
        pairs: [P, 2] integers, (query, document), for layout "list".
        cu_seqlens_q, cu_seqlens_d: [N + 1] int32 or int64, the first token of each sequence and the end of the last.
        max_seqlen_q, max_seqlen_d: the longest sequence, as int; without it a packed side on a GPU is read once, which
            synchronises.
        save: ``"winners"`` keeps them for the backward pass, ``"recompute"`` does not; ``"auto"`` keeps up to 2 GiB.
        backend: ``auto``, ``cuda``, ``triton``, ``cpu`` or ``eager``.

    Returns:
        Scores, float32 (float64 for float64 inputs). Ties go to the first token, as in ``x.max(dim)``; NaN propagates.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what was got.
        BackendError: the backend asked for cannot run the call.
        RuntimeError: double backward through a kernel; ``backend="eager"`` supports it.
    """
    prepared = prepare(
        queries,
        documents,
        layout=layout,
        query_mask=query_mask,
        document_mask=document_mask,
        mask_mode=mask_mode,
        token_weights=token_weights,
        reduction=reduction,
        topk=topk,
        temperature=temperature,
        dims=dims,
        normalize=normalize,
        pairs=pairs,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_d=cu_seqlens_d,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_d=max_seqlen_d,
        save=save,
    )
    inputs, problem, _ = prepared
    chosen = _dispatch.resolve(OP, call_of(inputs), backend)
    result = (weighted if reduction == "none" else score)(prepared, chosen, save)
    if empty_score and reduction != "none":
        some = document_counts(problem.documents) > 0
        some = some[problem.pair_d] if problem.pair_d is not None else some
        result = torch.where(some, result, empty_score)
    shape = problem.shape() if reduction != "none" else (*problem.shape(), problem.queries.longest)
    return result.reshape(shape if dims is None else (len(inputs.prefixes), *shape))


class Prepared(NamedTuple):
    """A checked call: the raw ops' arguments without weights, its layout, and the weights [Tq] or None."""

    inputs: Inputs
    problem: Problem
    weights: Tensor | None


def prepare(
    queries: Tensor,
    documents: Documents,
    *,
    layout: str | None = None,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    mask_mode: str = "exclude",
    token_weights: Tensor | None = None,
    reduction: str = "sum",
    topk: int = 1,
    temperature: float = 0.0,
    dims: Sequence[int] | None = None,
    normalize: bool = False,
    pairs: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_d: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_d: int | None = None,
    save: str = "auto",
) -> Prepared:
    """Check the arguments of ``maxsim`` and turn them into the raw ops'."""
    values, dim = stored(documents)
    _check(queries, mask_mode, reduction, topk, temperature, save)
    problem = arrange(
        queries,
        values,
        query_mask,
        document_mask,
        layout,
        pairs,
        cu_seqlens_q,
        cu_seqlens_d,
        max_seqlen_q,
        max_seqlen_d,
        dim,
    )
    made = make_inputs(problem, documents, mask_mode, topk, temperature, make_prefixes(dims, dim), normalize)
    return Prepared(made, problem, make_weights(queries, problem.queries, token_weights, reduction))


def weighted(prepared: Prepared, chosen: _dispatch.Backend, save: str) -> Tensor:
    """w m of each query token, [planes, Nq, Nd, Lq] or [planes, P, Lq]."""
    inputs, problem, weights = prepared
    # The kernels get the weights all the same: what a token of weight 0 holds reaches nothing.
    inputs = changed(inputs, weights=None if weights is None else weights.detach())
    result = _by_query(chosen.run(inputs, True, save), problem)  # type: ignore[misc]
    if weights is None:
        return result
    w = eager.padded(weights[:, None], problem.queries.offsets, problem.queries.longest)[..., 0]
    w = w[problem.pair_q] if problem.pair_q is not None else w[:, None]
    return torch.where(w == 0, 0.0, result * w)


def score(prepared: Prepared, chosen: _dispatch.Backend, save: str) -> Tensor:
    """Scores [planes, Nq, Nd] or [planes, P]."""
    weights = prepared.weights
    if weights is not None and weights.requires_grad:
        return weighted(prepared, chosen, save).sum(-1)  # their gradient is made of each token's m
    return chosen.run(changed(prepared.inputs, weights=weights), False, save)  # type: ignore[misc]


# --- checks and the [tokens]-sized part -----------------------------------------------------------------------


def _check(queries: Tensor, mask_mode: str, reduction: str, topk: int, temperature: float, save: str) -> None:
    if not isinstance(queries, Tensor):
        raise TypeError(f"{OP}: queries is {type(queries).__name__}; expected a tensor")
    _errors.check_choice(OP, "mask_mode", mask_mode, MASK_MODES)
    _errors.check_choice(OP, "reduction", reduction, REDUCTIONS)
    _errors.check_choice(OP, "save", save, SAVES)
    if not isinstance(topk, int) or not 1 <= topk <= 64:
        raise ValueError(f"{OP}: topk is {topk!r}; expected an integer from 1 to 64")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"{OP}: temperature is {temperature}; expected a finite number >= 0")
    if topk > 1 and temperature > 0:
        raise ValueError(f"{OP}: topk is {topk} and temperature is {temperature}; only one of them can be used")


def _by_query(tokens: Tensor, problem: Problem) -> Tensor:
    """Per-token values as [planes, Nq, Nd, Lq] or [planes, P, Lq], zeros beyond a query's end."""
    q = problem.queries
    if problem.pair_q is not None:
        inside = (
            torch.arange(q.longest, device=tokens.device) < (q.offsets[1:] - q.offsets[:-1])[problem.pair_q, None]
        )
        return torch.where(inside, tokens, 0.0)
    flat = eager.padded(tokens.permute(2, 0, 1), q.offsets, q.longest)  # [Nq, Lq, planes, Nd]
    return flat.permute(2, 0, 3, 1)


# --- raw ops and autograd -------------------------------------------------------------------------------------

_INPUTS = (
    "Tensor queries, Tensor documents, Tensor q_offsets, Tensor d_offsets, Tensor? d_mask, Tensor? floor, "
    "Tensor? pair_q, Tensor? pair_d, Tensor? weights, Tensor? d_scale, Tensor? codes, Tensor? centroids, "
    "Tensor? buckets, SymInt[] prefixes, int topk, float temperature, bool normalize, SymInt max_q, SymInt max_d"
)
_FORWARD = f"({_INPUTS}, bool per_token, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"({_INPUTS}, Tensor maxima, Tensor winners, Tensor q_inv, Tensor d_inv, Tensor grad, bool per_token, "
    "bool need_queries, bool need_documents) -> (Tensor, Tensor)"
)


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *rest, per_token, save = arguments
    x = Inputs(*rest)
    like = x.queries.new_empty(0, dtype=statistics_dtype(x.queries))

    def empty(there: bool, *shape: Any, dtype: torch.dtype = like.dtype) -> Tensor:
        return like.new_empty(shape if there else (0,), dtype=dtype)

    smooth = x.temperature > 0
    return (
        empty(not per_token, *x.score_shape()),
        empty(per_token or (smooth and save), *x.token_shape(x.planes)),
        empty(save and not smooth, *x.token_shape(x.winner_planes), dtype=x.winner_dtype),
        empty(x.normalize, x.planes, x.queries.shape[0]),
        empty(x.normalize, x.planes, x.documents.shape[0]),
    )


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *rest, _, _, _, _, _, _, need_queries, need_documents = arguments
    x = Inputs(*rest)
    return (
        x.queries.new_empty(x.queries.shape if need_queries else (0, x.queries.shape[1])),
        x.documents.new_empty(x.documents.shape if need_documents else (0, x.documents.shape[1])),
    )


OPS = {
    name: (
        _library.define(f"{OP}_fwd", name, _FORWARD, launcher.forward, _fake_forward),
        _library.define(f"{OP}_bwd", name, _BACKWARD, launcher.backward, _fake_backward),
    )
    for name, launcher in (("cpu", cpu), ("cuda", cuda), ("triton", triton))
}


def saves(inputs: Inputs, save: str) -> bool:
    """Whether a forward pass keeps what its backward needs: one winner, or maximum, per query token and document."""
    if not torch.is_grad_enabled() or not (inputs.queries.requires_grad or inputs.documents.requires_grad):
        return False
    if save != "auto":
        return save == "winners"
    smooth = inputs.temperature > 0
    planes, count, tokens = inputs.token_shape(planes_of(inputs) if smooth else winner_planes_of(inputs))
    each = statistics_dtype(inputs.queries).itemsize if smooth else winner_dtype_of(inputs).itemsize
    return planes * count * tokens * each <= SAVE_BUDGET


class _Backward(torch.autograd.Function):
    """The backward as a node of its own, so that differentiating it fails loudly instead of giving zeros."""

    @staticmethod
    def forward(ctx: Any, backend: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor] = OPS[backend][1](*arguments)
        return gradients

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{OP}: double backward needs backend='eager'; the kernels compute first gradients only")


def remember(ctx: Any, backend: str, inputs: Inputs, per_token: bool, outputs: Any, *more: Tensor) -> None:
    """Save for `gradients` what a forward pass was given and made; `more`: tensors of the caller's."""
    given = [*inputs]  # torch.compile of torch 2.6 slices no NamedTuple
    ctx.backend, ctx.per_token, ctx.options = backend, per_token, given[13:]
    ctx.save_for_backward(*given[:13], *outputs[1:], *more)


def gradients(ctx: Any, grad: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """dq and dd from the gradient of the scores, or of the per-token values; None where not needed."""
    saved = ctx.saved_tensors
    d_q, d_d = _Backward.apply(
        ctx.backend, *saved[:13], *ctx.options, *saved[13:17], grad, ctx.per_token, need[0], need[1]
    )
    return d_q if need[0] else None, d_d if need[1] else None


class _MaxSim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, per_token: bool, save: bool, *arguments: Any) -> Tensor:
        inputs = Inputs(*arguments)
        outputs = OPS[backend][0](*inputs, per_token, save)
        remember(ctx, backend, inputs, per_token, outputs)
        result: Tensor = outputs[1 if per_token else 0]
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (None, None, None, *gradients(ctx, grad, ctx.needs_input_grad[3:5]), *(None,) * 17)


# --- backends -------------------------------------------------------------------------------------------------


def _run(backend: str) -> Any:
    def run(inputs: Inputs, per_token: bool, save: str) -> Tensor:
        return _MaxSim.apply(backend, per_token, saves(inputs, save), *inputs)

    return run


def _run_eager(inputs: Inputs, per_token: bool, save: str) -> Tensor:
    with torch.autocast(inputs.queries.device.type, enabled=False):
        return eager.scores(*_decoded(inputs), per_token)


def _decoded(x: Inputs) -> Inputs:
    """Quantised documents as floating ones."""
    documents = x.documents
    if x.d_scale is not None:
        documents = Int8Tokens(documents, x.d_scale).decode()
    elif x.codes is not None and x.centroids is not None and x.buckets is not None:
        documents = ResidualTokens(x.codes, documents, x.centroids, x.buckets).decode()
    return x if documents is x.documents else changed(x, documents=documents.to(statistics_dtype(x.queries)))


def call_of(inputs: Inputs) -> Call:
    quantized = not inputs.documents.is_floating_point()
    return Call(
        OP,
        inputs.queries.device,
        inputs.queries.dtype,
        "queries",
        planes_of(inputs),
        inputs.topk,
        inputs.temperature,
        quantized,
    )


def _make_call(
    queries: Tensor,
    documents: Documents,
    *,
    dims: Sequence[int] | None = None,
    topk: int = 1,
    temperature: float = 0.0,
    **options: Any,
) -> Call:
    planes = 1 if dims is None else len(dims)
    quantized = not isinstance(documents, Tensor)
    return Call(OP, queries.device, queries.dtype, "queries", planes, topk, float(temperature), quantized)


def _combination_why_not(call: Call) -> str | None:
    if call.planes > 1 and (call.topk > 1 or call.temperature > 0):
        return "several dims come with the maximum only; topk and temperature take one"
    return None


def _cpu_why_not(call: Call) -> str | None:
    if call.device.type != "cpu":
        return f"queries is on {call.device}; the kernel runs on the CPU"
    return _combination_why_not(call) or _extension.why_not()


def _cuda_why_not(call: Call) -> str | None:
    missing = _dispatch.unsupported_dtype(call, (torch.float16, torch.bfloat16, torch.float32))
    return missing or _combination_why_not(call) or _extension.cuda_why_not(str(call.device))


def _triton_why_not(call: Call) -> str | None:
    dtype = _dispatch.unsupported_dtype(call, DTYPES[:3])
    return dtype or _combination_why_not(call) or _triton.why_not(str(call.device), "queries", OP, "forward")


_ALL = ("float16", "bfloat16", "float32", "float64")
_SINGLE = _ALL[:3]

_dispatch.register(
    OP,
    _dispatch.Backend("cuda", _run("cuda"), _cuda_why_not, _SINGLE, label="emulated; not yet run on a GPU"),
    _dispatch.Backend("triton", _run("triton"), _triton_why_not, _ALL[:3], label="interpreted; not yet run on a GPU"),
    _dispatch.Backend("cpu", _run("cpu"), _cpu_why_not, _ALL, label="tested on CPU"),
    _dispatch.Backend("eager", _run_eager, lambda call: None, _ALL, label="reference"),
    make_call=_make_call,
)
