"""Launcher of maxsim's CPU kernels: allocate, group the queries into blocks of lanes, call.

Contract of the kernels: csrc/maxsim.h.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyelastic import _extension
from pyelastic.eager.maxsim import statistics_dtype
from pyelastic.ops._binding import DTYPES, pointer, rows_of
from pyelastic.ops._maxsim_layout import Inputs

# Blocks of query tokens that one unit of work holds: their running maxima stay in L2.
GROUP_BLOCKS = 256
# Bytes of winners that a recomputing backward pass holds at once.
CHUNK_BYTES = 64 << 20


class _Kernels:
    """The module's functions for one compute type, and a call's arguments as they take them."""

    def __init__(self, x: Inputs) -> None:
        self.x = x
        self.dtype = statistics_dtype(x.queries)
        self.suffix = "_f64" if self.dtype == torch.float64 else "_f32"
        self.extension = _extension.load()
        self.threads = torch.get_num_threads()
        self.queries, self.documents = rows_of(x.queries.detach()), rows_of(x.documents.detach())
        self.dim = x.prefixes[-1]
        self.prefixes = torch.tensor(
            [self.dim] * x.winner_planes if x.topk > 1 else list(x.prefixes), dtype=torch.int64
        )
        self.d_scale = None if x.d_scale is None else x.d_scale.to(self.dtype)
        self.weights = None if x.weights is None else x.weights.to(self.dtype).contiguous()
        tensors = (x.d_mask, x.floor, x.pair_q, x.pair_d, x.codes, x.centroids, x.buckets)
        self.d_mask, self.floor, self.pair_q, self.pair_d, self.codes, self.centroids, self.buckets = (
            None if t is None else t.contiguous() for t in tensors
        )

    def call(self, name: str, *arguments: Any) -> Any:
        return getattr(self.extension, f"maxsim_{name}{self.suffix}")(*arguments)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)

    def q_side(self) -> tuple[int, ...]:
        return self._side(self.queries, self.x.q_offsets, 0)

    def d_side(self, offsets: Tensor | None = None) -> tuple[int, ...]:
        bits = 8 if self.x.d_scale is not None else 0
        if self.buckets is not None:
            bits = 2 if self.buckets.shape[0] == 4 else 4
        offsets = self.x.d_offsets if offsets is None else offsets
        return self._side(self.documents, offsets, bits)

    def _side(self, tokens: Tensor, offsets: Tensor, bits: int) -> tuple[int, ...]:
        codec = (0, 0, 0) if bits in (0, 8) else tuple(map(pointer, (self.codes, self.centroids, self.buckets)))
        stride = tokens.stride(0) if tokens.shape[0] > 1 else tokens.shape[1]
        dtype = DTYPES.get(tokens.dtype, 0)  # quantised: not looked at
        return (
            tokens.data_ptr(),
            dtype,
            stride,
            offsets.data_ptr(),
            offsets.shape[0] - 1,
            tokens.shape[0],
            bits,
            *codec,
        )

    def inverse_norms(self) -> tuple[Tensor, Tensor]:
        """1 / |x| [planes, tokens] of both sides."""
        made = []
        for side, tokens in ((self.q_side(), self.queries), (self.d_side(), self.documents)):
            out = self.empty(self.x.planes, tokens.shape[0])
            self.call("norms", side, self.prefixes.data_ptr(), self.x.planes, out.data_ptr(), self.threads)
            made.append(out)
        return made[0], made[1]

    def problem(
        self, q_inv: Tensor | None, d_inv: Tensor | None, first: int = 0, offsets: Tensor | None = None
    ) -> Any:
        """The binding's problem; `offsets`: of documents first .. alone."""
        if d_inv is None and self.d_scale is not None:
            self.scales = self.d_scale.expand(self.x.planes, -1).contiguous()
            d_inv = self.scales
        floor = self.floor if self.floor is None or first == 0 else self.floor[first:]
        pairs = 0 if self.pair_q is None else self.pair_q.shape[0]
        return (
            self.q_side(),
            self.d_side(offsets),
            self.dim,
            pointer(self.d_mask),
            pointer(floor),
            pointer(self.pair_q),
            pointer(self.pair_d),
            pairs,
            self.x.max_q,
            self.prefixes.data_ptr(),
            len(self.prefixes),
            self.x.topk,
            self.x.temperature,
            pointer(q_inv),
            pointer(d_inv),
        )

    @property
    def pairs(self) -> bool:
        """Whether products take bfloat16 pairs."""
        documents = self.x.documents.dtype == torch.bfloat16 or self.x.d_scale is not None
        even = all(width % 2 == 0 for width in self.x.prefixes)
        return self.queries.dtype == torch.bfloat16 and documents and even and bool(self.call("pairs"))

    def pack(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries in blocks of lanes, and the groups' first queries and blocks."""
        width = int(self.call("block"))
        offsets, count = self.x.q_offsets, self.x.q_offsets.shape[0] - 1
        if self.pair_q is not None:
            groups = torch.arange(count + 1)
        else:
            # As few groups as keep every thread busy: each passes over the documents once.
            documents = self.x.d_offsets.shape[0] - 1
            wanted = max(4 * self.threads // max(documents, 1), self.queries.shape[0] // (width * GROUP_BLOCKS) + 1)
            groups = torch.linspace(0, count, min(count, wanted) + 1, dtype=torch.float64).round().long()
        tokens = offsets[groups[1:]] - offsets[groups[:-1]]
        blocks = torch.cat((tokens.new_zeros(1), ((tokens + width - 1) // width).cumsum(0)))
        dtype = torch.bfloat16 if self.pairs else self.dtype
        packed = torch.empty(int(blocks[-1]), self.dim, width, dtype=dtype)
        self.call(
            "pack",
            self.q_side(),
            self.dim,
            groups.data_ptr(),
            blocks.data_ptr(),
            len(groups) - 1,
            packed.data_ptr(),
            self.pairs,
            self.threads,
        )
        return packed, groups, blocks

    def forward(
        self,
        problem: Any,
        queries: tuple[Tensor, Tensor, Tensor],
        scores: Tensor | None,
        maxima: Tensor | None,
        winners: Tensor | None,
    ) -> None:
        packed, groups, blocks = queries
        narrow = winners is not None and winners.dtype == torch.int16
        self.call(
            "forward",
            problem,
            packed.data_ptr(),
            self.pairs,
            groups.data_ptr(),
            blocks.data_ptr(),
            len(groups) - 1,
            pointer(self.weights),
            pointer(scores),
            pointer(maxima),
            pointer(winners),
            narrow,
            self.threads,
        )

    def order(self, of_queries: bool) -> tuple[Tensor | None, Tensor | None]:
        """A list's pairs by query or by document, and where each one's begin."""
        index = self.pair_q if of_queries else self.pair_d
        if index is None:
            return None, None
        count = (self.x.q_offsets if of_queries else self.x.d_offsets).shape[0] - 1
        first = torch.zeros(count + 1, dtype=torch.int64)
        first[1:] = torch.bincount(index, minlength=count).cumsum(0)
        return torch.argsort(index, stable=True), first


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The raw op ``maxsim_fwd.cpu``: scores, per-token values, winners, and inverse norms of both sides."""
    *rest, per_token, save = arguments
    k = _Kernels(Inputs(*rest))
    x, smooth = k.x, k.x.temperature > 0
    q_inv, d_inv = k.inverse_norms() if x.normalize else (None, None)
    scores = k.empty(0) if per_token else k.empty(*x.score_shape())
    maxima = k.empty(*x.token_shape(x.planes)) if per_token or (save and smooth) else k.empty(0)
    winners = torch.empty(0, dtype=x.winner_dtype)
    if save and not smooth:
        winners = torch.empty(x.token_shape(x.winner_planes), dtype=x.winner_dtype)
    if x.pair_q is None or x.pair_q.shape[0] > 0:  # an empty list's null pointer would mean all pairs
        k.forward(k.problem(q_inv, d_inv), k.pack(), scores, maxima, winners)
    if per_token and x.pair_q is not None:
        _zero_beyond(x, maxima)
    return scores, maxima, winners, k.empty(0) if q_inv is None else q_inv, k.empty(0) if d_inv is None else d_inv


def _zero_beyond(x: Inputs, maxima: Tensor) -> None:
    """Zeros beyond the end of each pair's query."""
    lengths = (x.q_offsets[1:] - x.q_offsets[:-1])[x.pair_q]
    maxima.masked_fill_(torch.arange(x.max_q) >= lengths[:, None], 0.0)


def backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The raw op ``maxsim_bwd.cpu``: dq and dd from the gradient of the scores or of the per-token values."""
    *rest, maxima, winners, q_inv, d_inv, grad, per_token, need_queries, need_documents = arguments
    k = _Kernels(Inputs(*rest))
    x, smooth = k.x, k.x.temperature > 0
    q_inv, d_inv = (q_inv, d_inv) if x.normalize else (None, None)
    d_q = k.empty(*(k.queries.shape if need_queries else (0, k.dim)))
    d_d = torch.empty(k.documents.shape if need_documents else (0, k.dim), dtype=k.documents.dtype)
    if x.pair_q is not None and x.pair_q.shape[0] == 0:
        return d_q.zero_().to(x.queries.dtype), d_d.zero_()
    saved = maxima if smooth else winners
    count = x.d_offsets.shape[0] - 1
    chunk = count
    if saved.numel() == 0:
        planes, _, tokens = x.token_shape(x.winner_planes)
        each = planes * tokens * (k.dtype.itemsize if smooth else winners.dtype.itemsize)
        chunk = count if x.pair_q is not None else max(1, CHUNK_BYTES // max(each, 1))
    grad = grad.to(k.dtype)
    queries = k.pack() if saved.numel() == 0 else None
    part = d_q if chunk >= count else torch.empty_like(d_q)
    for first in range(0, max(count, 1), max(chunk, 1)):
        offsets = x.d_offsets[first : first + chunk + 1]
        problem = k.problem(q_inv, d_inv, first, offsets)
        g = grad if chunk >= count else grad.narrow(1 if per_token else 2, first, len(offsets) - 1)
        g = g.contiguous()
        won = saved
        if queries is not None:
            shape = list(x.token_shape(x.planes if smooth else x.winner_planes))
            if x.pair_q is None:
                shape[1] = len(offsets) - 1
            won = torch.empty(shape, dtype=k.dtype if smooth else x.winner_dtype)
            k.forward(problem, queries, None, won if smooth else None, None if smooth else won)
        gradient = (0, 0, g.data_ptr()) if per_token else (g.data_ptr(), pointer(k.weights), 0)
        for of_queries, out in ((True, part), (False, d_d)):
            if not (need_queries if of_queries else need_documents):
                continue
            order, start = k.order(of_queries)
            k.call(
                "backward",
                problem,
                of_queries,
                *gradient,
                pointer(won),
                won.dtype == torch.int16,
                pointer(order),
                pointer(start),
                out.data_ptr(),
                DTYPES[out.dtype],
                k.threads,
            )
        if need_queries and part is not d_q:
            d_q = part.clone() if first == 0 else d_q.add_(part)
    return d_q.to(x.queries.dtype), d_d
