"""maxsim's layouts, all turned into one: packed tokens with offsets, and which query meets which document.

| layout | queries | documents | scores |
|---|---|---|---|
| single | [Lq, d] | [Nd, Ld, d] or packed | [Nd] |
| cross | [Nq, Lq, d] or packed | [Nd, Ld, d] or packed | [Nq, Nd] |
| grouped | [Nq, Lq, d] | [Nq, K, Ld, d] | [Nq, K] |
| pairs | [B, Lq, d] or packed | [B, Ld, d] or packed | [B] |
| list | any | any, and ``pairs`` [P, 2] | [P] |

Packed: [tokens, d] with ``cu_seqlens`` [N + 1], the first token of each sequence and the end of the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyelastic import _dispatch, _errors
from pyelastic.eager.maxsim import statistics_dtype
from pyelastic.quantized import Int8Tokens, ResidualTokens

OP = "maxsim"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("single", "cross", "grouped", "pairs", "list")


class Inputs(NamedTuple):
    """Arguments of the raw ops, in their schema's order; the contract is csrc/maxsim.h.

    queries [Tq, d]; documents [Td, d], or int8 values [Td, d] with d_scale [Td], or uint8 buckets [Td, d bits / 8] with
    codes [Td], centroids [., d] and buckets [2^bits]. weights [Tq]: 0 drops a token; per-token values
    are not multiplied by them.
    """

    queries: Tensor
    documents: Tensor
    q_offsets: Tensor
    d_offsets: Tensor
    d_mask: Tensor | None
    floor: Tensor | None
    pair_q: Tensor | None
    pair_d: Tensor | None
    weights: Tensor | None
    d_scale: Tensor | None
    codes: Tensor | None
    centroids: Tensor | None
    buckets: Tensor | None
    prefixes: list[int]
    topk: int
    temperature: float
    normalize: bool
    max_q: int
    max_d: int

    @property
    def planes(self) -> int:
        """Scores per pair: prefixes of the dimension."""
        return planes_of(self)

    @property
    def winner_planes(self) -> int:
        return winner_planes_of(self)

    def token_shape(self, planes: int) -> tuple[int, ...]:
        """Shape of the per-token arrays."""
        if self.pair_q is not None:
            return planes, self.pair_q.shape[0], self.max_q
        return planes, self.d_offsets.shape[0] - 1, self.queries.shape[0]

    def score_shape(self) -> tuple[int, ...]:
        if self.pair_q is not None:
            return self.planes, self.pair_q.shape[0]
        return self.planes, self.q_offsets.shape[0] - 1, self.d_offsets.shape[0] - 1

    @property
    def winner_dtype(self) -> torch.dtype:
        """int16 holds unsigned 16 bits; 0xffff is -1."""
        return winner_dtype_of(self)


# Functions, as torch.compile of torch 2.6 reads no property of a NamedTuple.
def planes_of(x: Inputs) -> int:
    return len(x.prefixes)


def winner_planes_of(x: Inputs) -> int:
    return x.topk if x.topk > 1 else len(x.prefixes)


def winner_dtype_of(x: Inputs) -> torch.dtype:
    return torch.int16 if x.max_d <= 0xFFFE else torch.int32


@dataclass(frozen=True)
class Side:
    """Queries or documents: tokens [T, d], offsets [N + 1] int64, mask [T] bool or None, length of the longest.

    ``dense``: all sequences have that length.
    """

    tokens: Tensor
    offsets: Tensor
    mask: Tensor | None
    longest: int
    dense: bool

    @property
    def count(self) -> int:
        return self.offsets.shape[0] - 1


@dataclass(frozen=True)
class Problem:
    """A call of maxsim in the kernels' terms; pair_q and pair_d are [P] int64, None for all pairs."""

    queries: Side
    documents: Side
    pair_q: Tensor | None
    pair_d: Tensor | None
    layout: str

    def shape(self) -> tuple[int, ...]:
        """Shape of the scores."""
        nq, nd = self.queries.count, self.documents.count
        if self.layout == "grouped":
            return nq, nd // max(nq, 1)
        if self.pair_q is not None:
            return (self.pair_q.shape[0],)
        return (nd,) if self.layout == "single" else (nq, nd)


def _offsets(name: str, cu: Tensor, tokens: int) -> Tensor:
    _errors.check_rank(OP, name, cu, 1, "[N + 1]")
    if cu.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{OP}: {name} is {str(cu.dtype).removeprefix('torch.')}; expected int32 or int64")
    if cu.shape[0] < 1:
        raise ValueError(f"{OP}: {name} is [0]; expected [N + 1]")
    if _dispatch.may_read(cu.device):
        ends = cu[0] == 0 and cu[-1] == tokens
        if not bool(ends) or bool((cu[1:] < cu[:-1]).any()):
            raise ValueError(
                f"{OP}: {name} must rise from 0 to {tokens}, the number of tokens; got {cu.tolist()[:8]}"
            )
    return cu.to(torch.int64)


def _side(  # name: of the mask
    name: str, x: Tensor, mask: Tensor | None, cu: Tensor | None, longest: int | None, letter: str
) -> Side:
    tokens = x.flatten(0, -2) if x.ndim != 2 else x
    if cu is not None:
        _errors.check_rank(OP, "queries" if letter == "q" else "documents", x, 2, "[tokens, d] with cu_seqlens")
        offsets = _offsets(f"cu_seqlens_{letter}", cu, tokens.shape[0])
        if longest is None:
            longest = int((offsets[1:] - offsets[:-1]).max()) if offsets.shape[0] > 1 else 0
        dense = False
    else:
        length = x.shape[-2]
        count = tokens.shape[0] // length if length else x.shape[:-2].numel()
        offsets = torch.arange(count + 1, device=x.device) * length
        longest, dense = length, True
    if mask is not None:
        if mask.shape != x.shape[:-1]:
            raise ValueError(f"{OP}: {name} is {list(mask.shape)}; expected {list(x.shape[:-1])}, one per token")
        mask = (mask != 0).flatten()
    return Side(tokens, offsets, mask, longest, dense)


def _infer(queries: Tensor, documents: Tensor, pairs: Tensor | None, cu_q: Tensor | None) -> str:
    if pairs is not None:
        return "list"
    if documents.ndim == 4:
        return "grouped"
    return "single" if queries.ndim == 2 and cu_q is None else "cross"


def arrange(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    layout: str | None,
    pairs: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_d: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_d: int | None,
    dim: int,
) -> Problem:
    """Check a call's shapes, dtypes and devices, and turn its layout into the kernels'.

    documents: the stored values if quantised; dim: what they stand for.
    """
    given = {
        "query_mask": query_mask,
        "document_mask": document_mask,
        "pairs": pairs,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_d": cu_seqlens_d,
    }
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    _errors.refuse_dtensor(OP, queries=queries, documents=documents, **tensors)
    _errors.check_floating(OP, "queries", queries, DTYPES)
    _errors.check_floating(OP, "documents", documents, (*DTYPES, torch.int8, torch.uint8))
    if documents.is_floating_point() and (queries.dtype == torch.float64) != (documents.dtype == torch.float64):
        raise TypeError(f"{OP}: queries is {queries.dtype} and documents is {documents.dtype}; float64 needs both")
    _errors.check_same_device(OP, queries=queries, documents=documents, **tensors)
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_d", max_seqlen_d)):
        # A 0-dimensional tensor here would synchronise, and recompile a compiled region for every value.
        if value is not None and not isinstance(value, int):
            raise TypeError(f"{OP}: {name} is {type(value).__name__}; expected int")
    layout = _infer(queries, documents, pairs, cu_seqlens_q) if layout is None else layout
    _errors.check_choice(OP, "layout", layout, LAYOUTS)
    if (layout == "list") != (pairs is not None):
        got = f"layout={layout!r}, pairs={type(pairs).__name__}"
        raise ValueError(f"{OP}: layout 'list' and pairs go together; got {got}")
    if cu_seqlens_q is None:
        rank, shape = (2, "[Lq, d]") if layout == "single" else (3, "[Nq, Lq, d]")
        _errors.check_rank(OP, "queries", queries, rank, shape)
    if cu_seqlens_d is None:
        rank, named = (4, "[Nq, K, Ld, d]") if layout == "grouped" else (3, "[Nd, Ld, d]")
        _errors.check_rank(OP, "documents", documents, rank, named)
    if queries.shape[-1] != dim or dim == 0:
        decoded = [*documents.shape[:-1], dim]
        raise ValueError(
            f"{OP}: queries is {list(queries.shape)} and documents is {decoded}; expected the same last size d >= 1"
        )
    q = _side("query_mask", queries, query_mask, cu_seqlens_q, max_seqlen_q, "q")
    d = _side("document_mask", documents, document_mask, cu_seqlens_d, max_seqlen_d, "d")
    if layout == "grouped":
        if documents.shape[0] != queries.shape[0] or cu_seqlens_q is not None:
            raise ValueError(
                f"{OP}: queries is {list(queries.shape)} and documents is {list(documents.shape)}; expected "
                "[Nq, Lq, d] and [Nq, K, Ld, d]"
            )
        pair_d = torch.arange(d.count, device=queries.device)
        return Problem(q, d, pair_d // max(documents.shape[1], 1), pair_d, layout)
    if layout == "pairs":
        if q.count != d.count:
            raise ValueError(f"{OP}: {q.count} queries and {d.count} documents; layout 'pairs' needs as many of both")
        both = torch.arange(d.count, device=queries.device)
        return Problem(q, d, both, both, layout)
    if pairs is None:
        return Problem(q, d, None, None, layout)
    return Problem(q, d, *_pairs(pairs, q.count, d.count), layout)


def stored(documents: Tensor | Int8Tokens | ResidualTokens) -> tuple[Tensor, int]:
    """What the tokens are stored as [.., bytes or d], and their dimension d."""
    if isinstance(documents, ResidualTokens):
        return documents.residuals, documents.centroids.shape[1]
    if isinstance(documents, Int8Tokens):
        return documents.values, documents.values.shape[-1]
    if not isinstance(documents, Tensor):
        raise TypeError(
            f"{OP}: documents is {type(documents).__name__}; expected a tensor, Int8Tokens or ResidualTokens"
        )
    _errors.check_floating(OP, "documents", documents, DTYPES)
    return documents, documents.shape[-1] if documents.ndim else 0


def _pairs(pairs: Tensor, queries: int, documents: int) -> tuple[Tensor, Tensor]:
    _errors.check_rank(OP, "pairs", pairs, 2, "[P, 2]")
    if pairs.dtype not in (torch.int32, torch.int64) or pairs.shape[1] != 2:
        raise TypeError(f"{OP}: pairs is {pairs.dtype} {list(pairs.shape)}; expected int64 [P, 2]: query, document")
    if _dispatch.may_read(pairs.device) and pairs.shape[0]:
        limits = torch.tensor([queries, documents], device=pairs.device)
        bad = ((pairs < 0) | (pairs >= limits)).any(1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{OP}: pairs[{row}] is {pairs[row].tolist()}; expected a query below {queries} and a document below "
                f"{documents}"
            )
    columns = pairs.to(torch.int64)
    return columns[:, 0].contiguous(), columns[:, 1].contiguous()


# --- the raw ops' arguments ----------------------------------------------------------------------------------


def make_prefixes(dims: Sequence[int] | None, dim: int) -> list[int]:
    prefixes = [dim] if dims is None else list(dims)
    if not prefixes or prefixes[0] < 1 or prefixes[-1] > dim or prefixes != sorted(set(prefixes)):
        raise ValueError(f"{OP}: dims is {prefixes}; expected rising sizes from 1 to d = {dim}")
    return prefixes


def document_counts(side: Side) -> Tensor:
    """How many tokens of each sequence count [N]."""
    if side.mask is None:
        return side.offsets[1:] - side.offsets[:-1]
    running = torch.cat((side.offsets[:1], side.mask.to(torch.int64).cumsum(0)))
    return running[side.offsets[1:]] - running[side.offsets[:-1]]


def make_weights(queries: Tensor, side: Side, token_weights: Tensor | None, reduction: str) -> Tensor | None:
    """w [Tq], or None where all are 1."""
    dtype = statistics_dtype(queries)
    weights = None if side.mask is None else side.mask.to(dtype)
    if token_weights is not None:
        if token_weights.shape != queries.shape[:-1]:
            raise ValueError(
                f"{OP}: token_weights is {list(token_weights.shape)}; expected {list(queries.shape[:-1])}: one a token"
            )
        given = token_weights.flatten().to(dtype)
        weights = given if side.mask is None else torch.where(side.mask, given, 0.0)
    if reduction == "mean":
        counts = document_counts(side).clamp(min=1)
        lengths = side.offsets[1:] - side.offsets[:-1]
        each = torch.repeat_interleave(counts, lengths, output_size=side.tokens.shape[0]).to(dtype)
        weights = 1.0 / each if weights is None else weights / each
    return weights


def make_inputs(
    problem: Problem,
    documents: Tensor | Int8Tokens | ResidualTokens,
    mask_mode: str,
    topk: int,
    temperature: float,
    prefixes: list[int],
    normalize: bool,
) -> Inputs:
    """The raw ops' arguments, without weights."""
    q, d = problem.queries, problem.documents
    tokens, mask, floor = d.tokens, d.mask, None
    scale = codes = centroids = buckets = None
    if isinstance(documents, Int8Tokens):
        scale = documents.scale.flatten()
    elif isinstance(documents, ResidualTokens):
        codes, centroids, buckets = documents.codes.flatten(), documents.centroids, documents.buckets
        if prefixes[-1] < centroids.shape[1]:
            raise ValueError(f"{OP}: dims is {prefixes}; with ResidualTokens it must end at d = {centroids.shape[1]}")
    if codes is None:
        tokens = tokens[:, : prefixes[-1]]
    if mask_mode == "zero" and mask is not None:
        if topk == 1 and temperature == 0:
            # A masked token's similarity of 0 is a floor under the maximum, and has no gradient.
            floor = document_counts(d) < d.offsets[1:] - d.offsets[:-1]
        elif isinstance(documents, Tensor):
            tokens, mask = torch.where(mask[:, None], tokens, 0.0), None
        else:
            raise ValueError(
                f"{OP}: mask_mode='zero' with topk or temperature needs documents that are not quantised"
            )
    return Inputs(
        q.tokens[:, : prefixes[-1]],
        tokens,
        q.offsets,
        d.offsets,
        mask,
        floor,
        problem.pair_q,
        problem.pair_d,
        None,
        scale,
        codes,
        centroids,
        buckets,
        prefixes,
        topk,
        float(temperature),
        normalize,
        q.longest,
        d.longest,
    )
