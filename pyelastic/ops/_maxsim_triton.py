"""Launcher of maxsim's Triton kernels (triton_kernels/maxsim*.py): [tokens]-sized preparation, grids and scratch.

Same raw ops as _maxsim_cpu. Nothing here synchronises: offsets, pairs and masks stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pyelastic.ops._binding import rows_of
from pyelastic.ops._maxsim_cpu import CHUNK_BYTES
from pyelastic.ops._maxsim_layout import Inputs

LOG2E = 1.4426950408889634
LOOP_K = 64  # columns at a time where rows are too wide to be held
PROGRAMS = 264  # two for each multiprocessor of an H200: an estimate, not measured
SPLIT_ROWS = 16  # documents that a share of a tile of query tokens has at least


def _kernels() -> tuple[ModuleType, ModuleType, ModuleType, ModuleType]:
    from pyelastic.triton_kernels import maxsim, maxsim_backward, maxsim_several, maxsim_smooth

    return maxsim, maxsim_backward, maxsim_smooth, maxsim_several


def _guard(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def pieces(dim: int, block: int) -> dict[str, Any]:
    """The dimension as three powers of two at most, the last with room to spare, or as a loop of ``block`` columns."""
    if block:
        while block > 16 and -dim % block > dim / 8:  # what padding may add
            block //= 2
        return {"W0": block, "W1": 0, "W2": 0, "HOLD": False}
    widths, rest = [], dim
    for _ in range(2):
        widths.append(max(16, 1 << (rest.bit_length() - 1)) if rest > 0 else 0)
        rest -= widths[-1]
    widths.append(max(16, 1 << (rest - 1).bit_length()) if rest > 0 else 0)
    return dict(zip(("W0", "W1", "W2"), widths, strict=True)) | {"HOLD": True}


def prefix_constants(kernels: ModuleType, prefixes: Sequence[int], bits: int) -> dict[str, Any]:
    """Constexpr arguments of ``forward_prefixes``; steps pad the segments between prefixes by an eighth at most."""
    block_q, block_d, step, warps, stages = kernels.MAXSIM_PREFIX_CONFIGS[bits]
    segments = [end - begin for begin, end in zip((0, *prefixes), prefixes, strict=False)]
    while step > 16 and sum(-n % step for n in segments) > prefixes[-1] / 8:
        step //= 2
    unroll = sum(-(-n // step) for n in segments) <= kernels.UNROLLED_STEPS[bits]
    return {
        "PLANES": 1 << max(1, (len(prefixes) - 1).bit_length()), "STEP": step, "UNROLL": unroll,
        "PREFIXES": digits((0, *prefixes)) if unroll else 0, "ALIGNED": all(end % 16 == 0 for end in prefixes),
        "BLOCK_Q": block_q, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def digits(prefixes: Sequence[int]) -> int:
    """As one integer, the first in the lowest 16 bits, as a signed 64-bit one if there are four."""
    packed = sum(end << (16 * n) for n, end in enumerate(prefixes))
    return packed - (1 << 64) if len(prefixes) == 4 and packed >> 63 else packed


def _plane_stride(factors: Tensor) -> int:
    """From plane to plane of [planes, tokens]; int8 scales [tokens] are those of every plane."""
    return factors.stride(0) if factors.ndim == 2 else 0


class _Problem:
    """A call's tensors as the kernels take them, and their configurations."""

    def __init__(self, x: Inputs) -> None:
        import triton
        import triton.language as tl

        self.x, self.cdiv, self.power = x, triton.cdiv, triton.next_power_of_2
        self.forward_kernels, self.backward_kernels, self.smooth_kernels, self.several_kernels = _kernels()
        self.queries, self.documents = rows_of(x.queries.detach()), rows_of(x.documents.detach())
        self.device = self.queries.device
        self.bits = 8 if x.d_scale is not None else 0
        if x.buckets is not None:
            self.bits = 2 if x.buckets.shape[0] == 4 else 4
        # int8 is exact in every floating type; decoded residuals are not in 16 bits.
        same = self.queries.dtype == self.documents.dtype or self.bits == 8
        half = same and self.queries.dtype != torch.float32
        self.operand_bits = 16 if half else 32
        types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
        self.operand = types[self.queries.dtype] if half else tl.float32
        self.listed = x.pair_q is not None
        self.levels = max(1, min(x.topk, x.max_d))  # of topk
        self.rows = x.pair_q.shape[0] if x.pair_q is not None else x.d_offsets.shape[0] - 1
        self.tokens = self.queries.shape[0]
        self.width = x.max_q if self.listed else self.tokens
        none = self.queries  # where a kernel looks at nothing
        self.pair_q = none if x.pair_q is None else x.pair_q.contiguous()
        self.pair_d = none if x.pair_d is None else x.pair_d.contiguous()
        self.mask = none if x.d_mask is None else x.d_mask.contiguous().view(torch.uint8)
        self.floor = none if x.floor is None else x.floor.contiguous().view(torch.uint8)
        self.weights = none if x.weights is None else x.weights.float().contiguous()
        self.scale = None if x.d_scale is None else x.d_scale.contiguous()
        codec = (x.codes, x.centroids, x.buckets)
        self.codec = tuple(none if t is None else t.contiguous() for t in codec)
        self.strides = (self.queries.stride(0), self.documents.stride(0), self.codec[1].stride(0))

    def inverse_norms(self) -> tuple[Tensor, Tensor]:
        """1 / |x| [planes, tokens] of both sides."""
        made = []
        for tokens, codec, bits in ((self.queries, (self.queries,) * 3, 0), (self.documents, self.codec, self.bits)):
            n = tokens.shape[0]
            out = torch.empty(self.x.planes, n, device=self.device)
            for plane, width in enumerate(self.x.prefixes if n else ()):
                self.forward_kernels.inverse_norms[(self.cdiv(n, 16),)](
                    tokens, *codec, out[plane], n, tokens.stride(0), codec[1].stride(0), D=width, BITS=bits, BLOCK=16,
                    BLOCK_K=min(256, self.power(width)), num_warps=4,
                )  # fmt: skip
            made.append(out)
        return made[0], made[1]

    def factors(
        self, q_inv: Tensor | None, d_inv: Tensor | None, plane: int | slice
    ) -> tuple[Tensor, Tensor, dict[str, bool]]:
        """The tokens' factors and which there are; int8 tokens that are not normalised have their scales."""
        q = None if q_inv is None else q_inv[plane]
        d = self.scale if d_inv is None else d_inv[plane]
        there = {"Q_INV": q is not None, "D_INV": d is not None}
        return self.queries if q is None else q, self.queries if d is None else d, there

    def configure(self, dim: int) -> tuple[int, dict[str, Any]]:
        """Tiles of query tokens, and the constexpr arguments of a kernel that computes similarities."""
        bits, newer = self.operand_bits, False
        if self.device.type == "cuda":
            newer = torch.cuda.get_device_capability(self.device) >= (9, 0)
        table = self.forward_kernels.MAXSIM_CONFIGS_SM90 if newer else self.forward_kernels.MAXSIM_CONFIGS
        held = [width for b, width in table if b == bits and width >= dim]
        block_q, block_d, block_k, warps, stages = table[bits, min(held, default=0)]
        block_q = min(block_q, max(16, self.power(self.width)))
        return self.cdiv(self.width, block_q), {
            **self.flags(),
            **pieces(dim, block_k),
            "D": dim,
            "BITS": self.bits,
            "OPERAND": self.operand,
            "BLOCK_Q": block_q,
            "BLOCK_D": min(block_d, max(16, self.power(self.x.max_d))),
            "num_warps": warps if block_q > 32 else min(warps, 4),
            "num_stages": stages,
        }

    def flags(self) -> dict[str, bool]:
        return {"LIST": self.listed, "HAS_MASK": self.x.d_mask is not None}

    def forward(
        self, q_inv: Tensor | None, d_inv: Tensor | None, maxima: Tensor | None, winners: Tensor | None,
        first: int = 0, offsets: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Maxima [planes, rows, width], winners [planes or k, rows, width]; `offsets`: of documents first .. alone."""
        x = self.x
        offsets = x.d_offsets if offsets is None else offsets
        rows = self.rows if self.listed else offsets.shape[0] - 1
        if rows * self.width == 0:
            return
        floor = self.floor if x.floor is None else self.floor[first:]
        if x.planes > 1:
            return self._prefixes(rows, offsets, floor, q_inv, d_inv, maxima, winners)
        tiles, constants = self.configure(x.prefixes[0])
        q, d, there = self.factors(q_inv, d_inv, 0)
        inputs = (self.queries, self.documents, *self.codec, q, d, x.q_offsets, offsets, self.mask)
        pairs = self.pair_q, self.pair_d
        if x.temperature > 0:
            self.smooth_kernels.forward_smooth[(rows * tiles,)](
                *inputs, *pairs, maxima, self.tokens, self.width, tiles, *self.strides, x.temperature,
                LOG2E / x.temperature, **there, **constants,
            )  # fmt: skip
            return
        outputs, which = self._outputs(maxima, winners)
        if x.topk > 1:
            slots = max(2, self.power(self.levels))
            table = self.several_kernels.MAXSIM_TOPK_TILES
            block_q, block_d = table[min(n for n in table if n >= slots)]
            for name, most in (("BLOCK_Q", block_q), ("BLOCK_D", block_d)):
                constants[name] = min(constants[name], most)
            tiles = self.cdiv(self.width, constants["BLOCK_Q"])
            self.several_kernels.forward_topk[(rows * tiles,)](
                *inputs, *pairs, *outputs, self.tokens, rows, self.width, tiles, *self.strides, TOPK=self.levels,
                SLOTS=slots, **which, **there, **constants,
            )  # fmt: skip
            return
        self.forward_kernels.forward[(rows * tiles,)](
            *inputs, floor, *pairs, *outputs, self.tokens, self.width, tiles, *self.strides,
            HAS_FLOOR=x.floor is not None, **which, **there, **constants,
        )  # fmt: skip

    def _outputs(self, maxima: Tensor | None, winners: Tensor | None) -> tuple[tuple[Tensor, Tensor], dict[str, bool]]:
        nothing = self.queries
        both = nothing if maxima is None else maxima, nothing if winners is None else winners
        return both, {"MAXIMA": maxima is not None, "WINNERS": winners is not None}

    def _prefixes(
        self, rows: int, offsets: Tensor, floor: Tensor, q_inv: Tensor | None, d_inv: Tensor | None,
        maxima: Tensor | None, winners: Tensor | None,
    ) -> None:  # fmt: skip
        """As many prefixes in one pass as a kernel's registers hold; each pass starts at the first column again."""
        x, kernels = self.x, self.several_kernels
        for begin in range(0, x.planes, kernels.MAX_PLANES):
            prefixes = x.prefixes[begin : begin + kernels.MAX_PLANES]
            q, d, there = self.factors(q_inv, d_inv, slice(begin, None))
            some = slice(begin, begin + len(prefixes))
            outputs, which = self._outputs(
                None if maxima is None else maxima[some], None if winners is None else winners[some]
            )
            constants = prefix_constants(kernels, prefixes, self.operand_bits)
            constants["BLOCK_Q"] = min(constants["BLOCK_Q"], max(16, self.power(self.width)))
            constants["BLOCK_D"] = min(constants["BLOCK_D"], max(16, self.power(x.max_d)))
            tiles = self.cdiv(self.width, constants["BLOCK_Q"])
            kernels.forward_prefixes[(rows * tiles,)](
                self.queries, self.documents, *self.codec, q, d, x.q_offsets, offsets, self.mask, floor, self.pair_q,
                self.pair_d, *outputs, self.tokens, rows, self.width, tiles, len(prefixes),
                digits(prefixes[:4]), digits(prefixes[4:]), *self.strides, *map(_plane_stride, (q, d)),
                HAS_FLOOR=x.floor is not None, BITS=self.bits, OPERAND=self.operand, **self.flags(), **which, **there,
                **constants,
            )  # fmt: skip

    def sum_tokens(self, maxima: Tensor, scores: Tensor) -> None:
        """Scores [Nq, Nd] or [P] from one plane of maxima."""
        count = self.rows if self.listed else self.x.q_offsets.shape[0] - 1
        rows = 1 if self.listed else self.rows
        if count * rows == 0:
            return
        block = max(1, min(16, self.power(count)))
        blocks = self.cdiv(count, block)
        self.forward_kernels.sum_tokens[(rows * blocks,)](
            maxima, self.weights, self.x.q_offsets, self.pair_q, scores, count, blocks, rows, self.width, self.x.max_q,
            LIST=self.listed, HAS_WEIGHTS=self.x.weights is not None, BLOCK_N=block,
            BLOCK=max(1, min(64, self.power(self.x.max_q))), num_warps=4,
        )  # fmt: skip

    def order(self, of_queries: bool) -> tuple[Tensor, Tensor]:
        """A list's pairs by query or by document, and where each one's begin."""
        if not self.listed:
            return self.queries, self.queries
        index = self.pair_q if of_queries else self.pair_d
        count = (self.x.q_offsets if of_queries else self.x.d_offsets).shape[0]
        ordered, order = torch.sort(index, stable=True)
        return order, torch.searchsorted(ordered, torch.arange(count, device=self.device))


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The raw op ``maxsim_fwd.triton``; results as ``maxsim_fwd.cpu``."""
    *rest, per_token, save = arguments
    x = Inputs(*rest)
    with _guard(x.queries.device):
        p = _Problem(x)
        q_inv, d_inv = p.inverse_norms() if x.normalize else (None, None)
        smooth = x.temperature > 0
        keeps = per_token or (save and smooth)
        scores = torch.empty((0,) if per_token else x.score_shape(), device=p.device)
        maxima = torch.empty(x.token_shape(x.planes), device=p.device)
        there = save and not smooth
        winners = torch.empty(x.token_shape(x.winner_planes) if there else (0,), dtype=x.winner_dtype, device=p.device)
        if there and x.topk > p.levels:
            winners[p.levels :].fill_(-1)
        p.forward(q_inv, d_inv, maxima, winners if there else None)
        for plane in range(0 if per_token else x.planes):
            p.sum_tokens(maxima[plane], scores[plane])
        # Outputs that are absent are tensors of their own: torch.compile refuses results that are one another.
        maxima, q_inv, d_inv = (
            torch.empty(0, device=p.device) if t is None else t for t in (maxima if keeps else None, q_inv, d_inv)
        )
        return scores, maxima, winners, q_inv, d_inv


class _Backward:
    """The launches of a backward pass."""

    def __init__(self, p: _Problem, q_inv: Tensor | None, d_inv: Tensor | None, per_token: bool) -> None:
        self.p, self.q_inv, self.d_inv, self.per_token = p, q_inv, d_inv, per_token
        x = p.x
        self.query_of = torch.searchsorted(x.q_offsets, torch.arange(p.tokens, device=p.device), right=True) - 1
        self.by_query, self.by_document = p.order(True), p.order(False)

    def flags(self, plane: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        q, d, there = self.p.factors(self.q_inv, self.d_inv, plane)
        weights = self.p.x.weights is not None and not self.per_token
        return q, d, there | {"LIST": self.p.listed, "PER_TOKEN": self.per_token, "HAS_WEIGHTS": weights}

    def splits(self, programs: int, rows: int) -> int:
        """Programs that share a tile of query tokens: enough to fill a GPU, from shapes alone."""
        return max(1, min(PROGRAMS // programs, self.p.cdiv(self.each(rows), SPLIT_ROWS)))

    def each(self, rows: int) -> int:
        """Rows of a query, on average."""
        return self.p.cdiv(rows, max(1, self.p.x.q_offsets.shape[0] - 1)) if self.p.listed else rows

    def accumulating(self, dim: int, of_queries: bool) -> dict[str, Any]:
        """Constexpr arguments of a kernel that owns rows with WIDTH of their columns; small problems shrink it."""
        p, x = self.p, self.p.x
        smooth = x.temperature > 0
        table = p.smooth_kernels.MAXSIM_SMOOTH_CONFIGS if smooth else p.backward_kernels.MAXSIM_BACKWARD_CONFIGS
        table = {width: config for (bits, width), config in table.items() if bits == p.operand_bits}
        width = min(max(table), max(16, p.power(dim)))
        own, other, *block_k, warps, stages = table[min(w for w in table if w >= width)]
        block_q, block_d = (own, other) if of_queries else (other, own)
        block_q = min(block_q, 32) if smooth and p.listed else block_q  # 64 spill: the loop over pairs takes registers
        made = {
            "D": dim,
            "WIDTH": width,
            "BLOCK_Q": min(block_q, max(16, p.power(x.max_q if p.listed else p.tokens))),
            "BLOCK_D": min(block_d, max(16, p.power(x.max_d))),
            "num_warps": warps,
            "num_stages": stages,
        }
        if smooth:
            made |= pieces(dim, LOOP_K if dim > max(table) else block_k[0])
            made |= {"OPERAND": p.operand, "HAS_MASK": x.d_mask is not None}
        return made

    def queries(self, plane: int, grad: Tensor, saved: Tensor, offsets: Tensor, out: Tensor, add: bool) -> None:
        """dQ of one plane into out; offsets: of the documents that the rows of grad and saved are."""
        p, x = self.p, self.p.x
        dim, rows = x.prefixes[plane], p.rows if p.listed else offsets.shape[0] - 1
        q, d, flags = self.flags(plane)
        smooth = x.temperature > 0
        if smooth:
            constants = self.accumulating(dim, True) | {"BITS": p.bits}
        else:
            width, elements = max(16, p.power(dim)), p.backward_kernels.GATHER_ELEMENTS
            if dim % 16 or x.documents.stride(0) % 16:
                elements //= 4  # rows that are read in pieces: four times as many numbers in flight spill registers
            block = max(1, min(elements // width, p.power(p.width)))
            constants = {
                "TOPK": p.levels, "D": dim, "BITS": p.bits, "BLOCK_Q": block, "WIDTH": width,
                "UNROLL": min(p.backward_kernels.GATHER_UNROLL, p.power(max(1, self.each(rows)))), "num_warps": 4,
            }  # fmt: skip
            del flags["Q_INV"]
        tiles = p.cdiv(p.width, constants["BLOCK_Q"])
        programs = tiles * (x.q_offsets.shape[0] - 1 if p.listed else 1)
        if programs == 0:
            return
        splits, chunks = self.splits(programs, rows), p.cdiv(dim, constants["WIDTH"])
        # Rows of which one program has only a part are finished by another kernel.
        whole, jacobian = splits == 1 and chunks == 1, self.q_inv is not None
        parts = out if whole else torch.empty(splits, p.tokens, dim, device=p.device)
        flags |= {"JACOBIAN": jacobian and whole, "ADD": add and whole}
        inputs = (p.queries, p.documents, *p.codec, q, d, x.q_offsets, offsets)
        order = (p.pair_d, *self.by_query)
        shared = (grad, p.weights, self.query_of, saved, parts, p.tokens, rows, p.width, tiles, splits, *p.strides,
                  *_strides(grad), parts.stride(-2))  # fmt: skip
        if smooth:
            p.smooth_kernels.grad_queries_smooth[(programs, splits, chunks)](
                *inputs, p.mask, *order, *shared, LOG2E / x.temperature, **flags, **constants
            )
        else:
            p.backward_kernels.grad_queries[(programs, splits)](*inputs, *order, *shared, **flags, **constants)
        if not whole:
            self.finish(parts, p.queries, q, out, jacobian, add)

    def documents(self, plane: int, grad: Tensor, saved: Tensor, offsets: Tensor, out: Tensor, add: bool) -> None:
        """dD of one plane, of the documents with these offsets, into their rows of out."""
        p, x = self.p, self.p.x
        dim, count = x.prefixes[plane], offsets.shape[0] - 1
        rows = p.rows if p.listed else count
        q, d, flags = self.flags(plane)
        constants = self.accumulating(dim, False)
        tiles, chunks = p.cdiv(x.max_d, constants["BLOCK_D"]), p.cdiv(dim, constants["WIDTH"])
        if count * tiles == 0:
            return
        jacobian = self.d_inv is not None
        whole = chunks == 1 or not jacobian
        # Zeros: other chunks of documents have rows there too.
        parts = out if whole else torch.zeros(1, out.shape[0], dim, device=p.device)
        flags |= {"JACOBIAN": jacobian and whole, "ADD": add and whole}
        shared = (p.pair_q, *self.by_document, grad, p.weights, self.query_of, saved, parts, p.tokens, rows, p.width,
                  *p.strides[:2], *_strides(grad), parts.stride(-2))  # fmt: skip
        grid = (count, tiles, chunks)
        if x.temperature > 0:
            p.smooth_kernels.grad_documents_smooth[grid](
                p.queries, p.documents, q, d, x.q_offsets, offsets, p.mask, *shared, LOG2E / x.temperature, **flags,
                **constants,
            )  # fmt: skip
        else:
            del flags["D_INV"]
            p.backward_kernels.grad_documents[grid](
                p.queries, p.documents, q, d, x.q_offsets, offsets, *shared, TOPK=p.levels, **flags, **constants
            )
        if not whole:
            self.finish(parts, p.documents, d, out, jacobian, add)

    def finish(self, parts: Tensor, tokens: Tensor, inverse: Tensor, out: Tensor, jacobian: bool, add: bool) -> None:
        p, (count, n, dim) = self.p, parts.shape
        width = max(16, p.power(dim))
        block = max(1, p.backward_kernels.GATHER_ELEMENTS // width)
        p.backward_kernels.finish_rows[(p.cdiv(n, block),)](
            parts, tokens, inverse, out, n, count, tokens.stride(0), out.stride(0), D=dim, INV=jacobian, ADD=add,
            BLOCK=block, WIDTH=width, num_warps=4,
        )  # fmt: skip


def _strides(grad: Tensor) -> tuple[int, int]:
    """Of one plane: queries, or pairs, and documents; rows and columns if per token."""
    return grad.stride(0), grad.stride(1) if grad.ndim > 1 else 0


def backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The raw op ``maxsim_bwd.triton``: dq and dd as ``maxsim_bwd.cpu``."""
    *rest, maxima, winners, q_inv, d_inv, grad, per_token, need_queries, need_documents = arguments
    x = Inputs(*rest)
    with _guard(x.queries.device):
        p = _Problem(x)
        q_inv, d_inv = (q_inv, d_inv) if x.normalize else (None, None)
        steps = _Backward(p, q_inv, d_inv, per_token)
        smooth = x.temperature > 0
        saved = maxima if smooth else winners
        count = x.d_offsets.shape[0] - 1
        chunk = max(1, count)
        if saved.numel() == 0 and not p.listed:
            planes, _, tokens = x.token_shape(x.winner_planes)
            chunk = min(chunk, max(1, CHUNK_BYTES // max(1, planes * tokens * (4 if smooth else winners.itemsize))))
        grad = _shared(x, grad.float(), per_token)
        # What several launches add to is float32 until the end.
        several_q, several_d = x.planes > 1 or chunk < count, x.planes > 1 or (chunk < count and x.normalize)
        like_q, like_d = p.queries[: p.tokens * need_queries], p.documents[: p.documents.shape[0] * need_documents]
        d_q = torch.zeros_like(like_q, dtype=torch.float32) if several_q else torch.empty_like(like_q)
        d_d = torch.zeros_like(like_d, dtype=torch.float32) if several_d else torch.empty_like(like_d)
        for first in range(0, max(1, count), chunk):
            offsets = x.d_offsets[first : first + chunk + 1]
            g = grad
            if chunk < count:
                g = grad.narrow(1 if per_token else 2, first, offsets.shape[0] - 1)
            won = saved
            if saved.numel() == 0:
                shape = list(x.token_shape(x.winner_planes))
                shape[1] = shape[1] if p.listed else offsets.shape[0] - 1
                won = torch.empty(shape, dtype=torch.float32 if smooth else x.winner_dtype, device=p.device)
                p.forward(q_inv, d_inv, won if smooth else None, None if smooth else won, first, offsets)
            for plane in range(x.planes):
                mine = won[plane] if smooth else won[plane : plane + x.topk]
                if need_queries:
                    steps.queries(plane, g[plane], mine, offsets, d_q, several_q)
                if need_documents:
                    steps.documents(plane, g[plane], mine, offsets, d_d, several_d)
        return d_q.to(p.queries.dtype), d_d.to(p.documents.dtype)


def _shared(x: Inputs, grad: Tensor, per_token: bool) -> Tensor:
    """The gradient of each of the k winners of a mean, of which there may be fewer than topk."""
    if x.topk == 1:
        return grad
    counts = x.d_offsets[1:] - x.d_offsets[:-1]
    if x.d_mask is not None:
        running = torch.cat((x.d_offsets[:1], x.d_mask.to(torch.int64).cumsum(0)))
        counts = running[x.d_offsets[1:]] - running[x.d_offsets[:-1]]
    counts = counts.clamp(1, x.topk)
    if x.pair_d is not None:
        counts = counts[x.pair_d]
    return grad / (counts[:, None] if per_token else counts)
