"""Launcher of norm_linear_attention's CUDA kernels. Contract: csrc/norm_linear_attention.h."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyelastic import _extension
from pyelastic.ops import _norm_linear_attention_gpu as gpu
from pyelastic.ops._binding import pointer
from pyelastic.ops._norm_linear_attention import Inputs
from pyelastic.ops._norm_linear_attention_gpu import Pair, Pieces, Read

# Sequences x kv heads from which a block for each, with the state kept in it, beats parts: two for each of an H100's or
# H200's 132 multiprocessors, an estimate, not measured; the same on every device, so that no bit depends on it.
WHOLE_HEADS = 256


class _Problem(gpu.GpuProblem):
    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.module, emulated = _extension.load_cuda()
        self.stream = 0 if emulated else torch.cuda.current_stream(self.device).cuda_stream
        self.problem = self.x.problem()
        self.tile = self.module.cuda_norm_linear_attention_tile(self.problem)
        many = self.x.sequences * self.kv_heads >= WHOLE_HEADS
        self.whole = many and not self.alone and self.module.cuda_norm_linear_attention_whole(self.problem)

    def call(self, name: str, *arguments: Any) -> None:
        plain = (pointer(a) if a is None or isinstance(a, Tensor) else a for a in arguments)
        getattr(self.module, f"cuda_norm_linear_attention_{name}")(self.problem, *plain, self.stream)

    @staticmethod
    def places(pieces: Pieces) -> tuple[int, int, int, int]:
        return (pieces.total, pieces.each, pointer(pieces.sequence), pointer(pieces.place))

    def run_whole_forward(self, o: Tensor, whole: Pair) -> None:
        self.problem = self.x.problem(o)
        self.call("whole_forward", *whole)

    def run_whole_backward(self, grad: Tensor, made: Sequence[Tensor | None], *tensors: Tensor | None) -> None:
        self.problem = self.x.problem(grad, made)
        self.call("whole_backward", *tensors)

    def run_state(self, pieces: Pieces, parts: Pair) -> None:
        self.call("state", self.places(pieces), self.part, *parts)

    def run_scan(
        self, tokens: int, each: int, width: int, initial: Tensor | None, reverse: bool, parts: Tensor, total: Tensor
    ) -> None:
        self.call("scan", tokens, self.part, each, width, initial, self.x.causal, reverse, parts, total)

    def run_forward(self, pieces: Pieces, read: Read, o: Tensor) -> None:
        self.problem = self.x.problem(o)
        self.call("forward", self.places(pieces), self.part, self.parts_of(self.m), *read)

    def run_queries(self, pieces: Pieces, read: Read, *tensors: Tensor | None) -> None:
        grad, dq, dgate, *results = tensors
        self.problem = self.x.problem(grad, (dq, None, None, dgate))
        self.call("queries", self.places(pieces), self.part, self.parts_of(self.m), *read, *results)

    def run_grad_state(self, pieces: Pieces, grad: Tensor, d: Tensor, dd: Tensor, last: Tensor, parts: Pair) -> None:
        self.problem = self.x.problem(grad)
        self.call("grad_state", self.places(pieces), self.part, d, dd, last, *parts)

    def run_keys(self, pieces: Pieces, *tensors: Tensor | None) -> None:
        grad, d, dd, ds, dz, dk, dv, dpowers = tensors
        self.problem = self.x.problem(grad, (None, dk, dv, None))
        self.call("keys", self.places(pieces), self.part, self.parts_of(self.n), d, dd, ds, dz, dpowers)


# The raw ops' implementations.
forward: Any = partial(gpu.forward, _Problem)
backward: Any = partial(gpu.backward, _Problem)
advance: Any = partial(gpu.advance, _Problem)
quadratic = gpu.quadratic
why_not = gpu.why_not
