"""Launcher of maxsim's CUDA kernels: allocate on the current stream, one call for up to eight prefixes.

Two 16-bit sides of one dtype are multiplied on tensor cores with float32 sums; their rows are copied first if they are
not 16-byte aligned. Everything else is multiplied in float32, converted (or decoded, if quantised) inside the tiles.
Offsets, masks and pairs stay on the device: nothing here synchronises, so a step can be captured in a CUDA graph.
Contract of the kernels: csrc/maxsim.h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pyelastic import _extension
from pyelastic.ops._binding import DTYPES, pointer
from pyelastic.ops._maxsim_layout import Inputs

# Bytes of maxima (float32, one per query token and document) that scoring holds at once, and of winners that a
# recomputing backward pass does.
CHUNK_BYTES = 64 << 20
ALIGNMENT = 16  # bytes, of the rows that cp.async copies
STEP = 16  # elements that the tensor cores multiply at once
PLANES = 8  # prefixes that one kernel takes
HALVES = (torch.float16, torch.bfloat16)


def _aligned(x: Tensor, width: int) -> bool:
    stride = x.stride(0) * x.element_size() if x.shape[0] > 1 else 0
    return (x.data_ptr() | stride | width * x.element_size()) % ALIGNMENT == 0


def _padded(x: Tensor, width: int) -> Tensor:
    """The first ``width`` columns with rows that cp.async can copy; zeros in the columns that this adds."""
    if _aligned(x, width):
        return x[:, :width]
    out = x.new_zeros(x.shape[0], (width + 7) // 8 * 8)
    out[:, :width] = x[:, :width]
    return out


def _segmented(x: Tensor, prefixes: Sequence[int]) -> Tensor:
    """As ``_padded``, with zeros after each prefix so that the next columns begin at a multiple of STEP."""
    if _fits(prefixes):
        return _padded(x, prefixes[-1])
    ends = _ends(prefixes)
    out = x.new_zeros(x.shape[0], ends[-1])
    for n, end in enumerate(prefixes):
        begin, to = (prefixes[n - 1], ends[n - 1]) if n else (0, 0)
        out[:, to : to + end - begin] = x[:, begin:end]
    return out


def _fits(prefixes: Sequence[int]) -> bool:
    return all(end % STEP == 0 for end in prefixes[:-1])


def _ends(prefixes: Sequence[int]) -> list[int]:
    """Where prefixes end once what lies between them is a multiple of STEP."""
    ends = [0]
    for begin, end in zip((0, *prefixes), prefixes, strict=False):
        ends.append(ends[-1] + (end - begin + STEP - 1) // STEP * STEP)
    return ends[1:]


def _guard(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Kernels:
    """The module's functions, and a call's arguments as they take them."""

    def __init__(self, x: Inputs) -> None:
        self.module, emulated = _extension.load_cuda()
        self.x = x
        self.device = x.queries.device
        self.stream = 0 if emulated else torch.cuda.current_stream(self.device).cuda_stream
        self.smooth = x.temperature > 0
        self.listed = x.pair_q is not None
        self.queries, self.documents = (
            t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()
            for t in (x.queries.detach(), x.documents.detach())
        )
        self.weights = None if x.weights is None else x.weights.float().contiguous()
        self.d_scale = None if x.d_scale is None else x.d_scale.float().contiguous()
        tensors = (x.d_mask, x.floor, x.pair_q, x.pair_d, x.codes, x.centroids, x.buckets)
        self.d_mask, self.floor, self.pair_q, self.pair_d, self.codes, self.centroids, self.buckets = (
            None if t is None else t.contiguous() for t in tensors
        )
        self.offsets = x.q_offsets.contiguous(), x.d_offsets.contiguous()
        self.documents_count = self.offsets[1].shape[0] - 1
        self.mma = self.queries.dtype == self.documents.dtype and self.queries.dtype in HALVES
        self.operands: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # of prefixes, for the tensor cores
        self.share = None
        if x.topk > 1:
            self.share = 1.0 / self._kept().clamp(1, x.topk).float()

    def _kept(self) -> Tensor:
        """How many tokens of each document count [Nd]."""
        offsets = self.offsets[1]
        if self.d_mask is None:
            return offsets[1:] - offsets[:-1]
        running = torch.cat((offsets[:1], self.d_mask.to(torch.int64).cumsum(0)))
        return running[offsets[1:]] - running[offsets[:-1]]

    def call(self, name: str, *arguments: Any) -> None:
        getattr(self.module, f"cuda_maxsim_{name}")(*arguments, self.stream)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    # Sides and problems, as the binding takes them.

    def _side(self, tokens: Tensor, offsets: Tensor, of_queries: bool) -> tuple[int, ...]:
        bits = width = 0
        codec = (0, 0, 0)
        if not of_queries and self.d_scale is not None:
            bits = 8
        elif not of_queries and self.buckets is not None and self.centroids is not None:
            bits = 2 if self.buckets.shape[0] == 4 else 4
            codec = (pointer(self.codes), pointer(self.centroids), pointer(self.buckets))
            width = self.centroids.shape[1]
        dtype = DTYPES.get(tokens.dtype, 0)  # quantised: not looked at
        stride = tokens.stride(0) if tokens.shape[0] > 1 else tokens.shape[1]
        return (
            tokens.data_ptr(), dtype, stride, offsets.data_ptr(), offsets.shape[0] - 1, tokens.shape[0], bits, *codec,
            width,
        )  # fmt: skip

    def problem(
        self, planes: range, inverse: tuple[Tensor | None, Tensor | None], first: int, count: int, operands: bool
    ) -> tuple[Any, ...]:
        """Some planes against documents first .. first + count - 1; `operands`: as the tensor cores read them."""
        prefixes = tuple(self.x.prefixes[planes[0] : planes[-1] + 1])
        width = prefixes[-1]
        q, d = self.queries, self.documents
        if operands and self.mma:
            if prefixes not in self.operands:
                self.operands[prefixes] = _segmented(q, prefixes), _segmented(d, prefixes)
            q, d = self.operands[prefixes]
            width = q.shape[1]
        q_inv, d_inv = (None if t is None else t[planes[0]] for t in inverse)
        d_inv = self.d_scale if d_inv is None else d_inv
        offsets = self.offsets[1][first : first + count + 1]
        floor = None if self.floor is None else self.floor[first:]
        pairs = self.pair_q.shape[0] if self.pair_q is not None else 0
        return (
            self._side(q, self.offsets[0], True), self._side(d, offsets, False), width, pointer(self.d_mask),
            pointer(floor), pointer(self.pair_q), pointer(self.pair_d), pairs, self.x.max_q, self.x.topk,
            self.x.temperature, pointer(q_inv), pointer(d_inv),
        )  # fmt: skip

    def groups(self) -> list[range]:
        """The planes that each pass over the documents takes."""
        return [range(n, min(n + PLANES, self.x.planes)) for n in range(0, self.x.planes, PLANES)]

    def norms(self) -> tuple[Tensor | None, Tensor | None]:
        """1 / |x| [planes, tokens] of both sides, if the call normalises."""
        if not self.x.normalize:
            return None, None
        made = []
        for of_queries, tokens in ((True, self.queries), (False, self.documents)):
            out = self.empty(self.x.planes, tokens.shape[0])
            side = self._side(tokens, self.offsets[0 if of_queries else 1], of_queries)
            for plane, width in enumerate(self.x.prefixes):
                self.call("norms", side, width, pointer(out[plane]))
            made.append(out)
        return made[0], made[1]

    def chunks(self, bytes_each: int) -> Iterator[tuple[int, int]]:
        """(first document, how many): all of them for a list, else as many as CHUNK_BYTES hold."""
        count = self.documents_count
        most = count if self.listed else max(1, CHUNK_BYTES // max(1, bytes_each * self.queries.shape[0]))
        for first in range(0, count, max(most, 1)):
            yield first, min(most, count - first)

    def forward(self, problem: Any, first: int, planes: range, maxima: Tensor, winners: Tensor | None) -> None:
        """Maxima [planes, ...] and winners [planes or k, ...] of a problem of these planes and documents."""
        prefixes = self.x.prefixes[planes[0] : planes[-1] + 1]
        aligned = [
            self.mma or (t.dtype == torch.float32 and _aligned(t, prefixes[-1]))
            for t in (self.queries, self.documents)
        ]
        narrow = winners is not None and winners.dtype == torch.int16
        if len(planes) == 1:
            share = None if self.share is None else self.share[first:]
            self.call("forward", problem, self.mma, *aligned, pointer(share), pointer(maxima), pointer(winners), narrow)
            return
        ends = list(prefixes)
        if self.mma:
            ends = [*ends[:-1], problem[2]] if _fits(prefixes) else _ends(prefixes)
        normalize = self.x.normalize
        strides = (
            self.queries.shape[0] * normalize, self.documents.shape[0] * normalize, maxima.stride(0),
            0 if winners is None else winners.stride(0),
        )  # fmt: skip
        self.call(
            "forward_prefixes", problem, self.mma, *aligned, ends, strides, pointer(maxima), pointer(winners), narrow
        )

    def order(self, of_queries: bool) -> tuple[Tensor | None, Tensor | None]:
        """A list's pairs by query or by document, and where each one's begin."""
        index = self.pair_q if of_queries else self.pair_d
        if index is None:
            return None, None
        ordered, order = torch.sort(index, stable=True)
        count = self.offsets[0 if of_queries else 1].shape[0] - 1
        return order, torch.searchsorted(ordered, torch.arange(count + 1, device=self.device))


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The raw op ``maxsim_fwd.cuda``; results as ``maxsim_fwd.cpu``."""
    *rest, per_token, save = arguments
    x = Inputs(*rest)
    with _guard(x.queries.device):
        k = _Kernels(x)
        inverse = k.norms()
        scores = k.empty(0) if per_token else k.empty(*x.score_shape())
        keeps = per_token or (save and k.smooth)
        maxima = k.empty(*x.token_shape(x.planes)) if keeps else k.empty(0)
        winners = k.empty(0, dtype=x.winner_dtype)
        if save and not k.smooth:
            winners = k.empty(*x.token_shape(x.winner_planes), dtype=x.winner_dtype)
        if x.pair_q is None or x.pair_q.shape[0] > 0:
            _forward(k, inverse, scores, maxima, winners)
        if per_token and x.pair_q is not None:
            lengths = (x.q_offsets[1:] - x.q_offsets[:-1])[x.pair_q]
            maxima.masked_fill_(torch.arange(x.max_q, device=k.device) >= lengths[:, None], 0.0)
        q_inv, d_inv = (k.empty(0) if t is None else t for t in inverse)
        return scores, maxima, winners, q_inv, d_inv


def _forward(k: _Kernels, inverse: Any, scores: Tensor, maxima: Tensor, winners: Tensor) -> None:
    """Chunks of documents, whose maxima are kept only where they are asked for.

    Top-k takes one chunk, as the winners of a chunk would not be [k, documents, tokens] of the whole.
    """
    x = k.x
    for planes in k.groups():
        some = slice(planes[0], planes[-1] + 1)
        parts = [(0, k.documents_count)] if maxima.numel() or x.topk > 1 else k.chunks(4 * len(planes))
        room = None
        for first, count in parts:
            problem = k.problem(planes, inverse, first, count, True)
            if maxima.numel():
                of_chunk = maxima[some]
            else:
                shape = x.token_shape(1)[1:] if k.listed else (count, k.queries.shape[0])
                room = k.empty(len(planes), *shape) if room is None else room
                of_chunk = room[:, : shape[0]]
            won = winners if x.topk > 1 or not winners.numel() else winners[some]
            if not k.listed and x.topk <= 1 and winners.numel():
                won = won[:, first : first + count]
            k.forward(problem, first, planes, of_chunk, won if winners.numel() else None)
            for n, plane in enumerate(planes if scores.numel() else ()):
                out = scores[plane] if k.listed else scores[plane, :, first:]
                k.call("scores", problem, pointer(of_chunk[n]), pointer(k.weights), pointer(out), k.documents_count)


def backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The raw op ``maxsim_bwd.cuda``: dq and dd from the gradient of the scores or of the per-token values."""
    *rest, maxima, winners, q_inv, d_inv, grad, per_token, need_queries, need_documents = arguments
    x = Inputs(*rest)
    with _guard(x.queries.device):
        k = _Kernels(x)
        inverse = (q_inv, d_inv) if x.normalize else (None, None)
        sides = []
        for tokens, need in ((k.queries, need_queries), (k.documents, need_documents)):
            sides.append(tokens.new_empty(tokens.shape if need else (0, tokens.shape[1])))
        if x.pair_q is not None and x.pair_q.shape[0] == 0:
            return sides[0].zero_(), sides[1].zero_()
        saved = maxima if k.smooth else winners
        grad = grad.float().contiguous()
        query_of = None
        if not k.listed:
            count = k.offsets[0].shape[0] - 1
            lengths = k.offsets[0][1:] - k.offsets[0][:-1]
            each = torch.arange(count, device=k.device)
            query_of = torch.repeat_interleave(each, lengths, output_size=k.queries.shape[0])
        orders = [k.order(True), k.order(False)]
        itemsize = 4 if k.smooth else winners.element_size()
        whole = saved.numel() > 0 or k.queries.shape[0] == 0
        parts = [(0, k.documents_count)] if whole else list(k.chunks(itemsize * x.winner_planes)) or [(0, 0)]
        # Sums of several prefixes or chunks are added up in float32.
        sums = list(sides)
        for n, several in enumerate((x.planes > 1 or len(parts) > 1, x.planes > 1)):
            if several:
                sums[n] = torch.zeros_like(sides[n], dtype=torch.float32)
        for first, count in parts:
            all_won = saved if whole else _again(k, inverse, first, count, winners.dtype)
            for plane in range(x.planes):
                won = all_won[plane] if x.planes > 1 else all_won
                problem = k.problem(range(plane, plane + 1), inverse, first, count, False)
                per = grad[plane] if per_token else None
                if per is not None and not k.listed:
                    per = per[first:]
                of_scores = None if per_token else grad[plane] if k.listed else grad[plane, :, first:]
                gradient = (pointer(of_scores), pointer(k.weights), pointer(per))
                for n, need in ((0, need_queries), (1, need_documents)):
                    if not need:
                        continue
                    order, start = map(pointer, orders[n])
                    out = sums[n]
                    width = x.prefixes[plane]
                    room = None if k.module.cuda_maxsim_fits(width) else k.empty(out.shape[0], width)
                    target = (pointer(out), DTYPES[out.dtype], out.shape[1], out is not sides[n], pointer(room))
                    if k.smooth:
                        k.call("backward_smooth", problem, n == 0, gradient, k.documents_count, pointer(won), order,
                               start, target)  # fmt: skip
                        continue
                    share = None if k.share is None else k.share[first:]
                    k.call("backward", problem, n == 0, x.max_d, gradient, k.documents_count, pointer(query_of),
                           pointer(share), pointer(won), won.dtype == torch.int16, order, start,
                           target)  # fmt: skip
        return sums[0].to(sides[0].dtype), sums[1].to(sides[1].dtype)


def _again(k: _Kernels, inverse: Any, first: int, count: int, winner_dtype: torch.dtype) -> Tensor:
    """Winners (maxima, if smooth) [planes or k, ...] of some documents, computed again."""
    shape = k.x.token_shape(1)[1:] if k.listed else (count, k.queries.shape[0])
    maxima = k.empty(k.x.planes, *shape)
    won = None if k.smooth else k.empty(k.x.winner_planes, *shape, dtype=winner_dtype)
    for planes in k.groups():
        some = slice(planes[0], planes[-1] + 1)
        problem = k.problem(planes, inverse, first, count, True)
        k.forward(problem, first, planes, maxima[some], won if won is None or k.x.topk > 1 else won[some])
    return maxima if won is None else won
