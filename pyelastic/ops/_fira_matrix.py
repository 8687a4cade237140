"""One matrix of a step of fira as the GPU launchers hand it to their kernels, and how many share a launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")

# Scratch of the matrices of one launch, which the next group takes over: at rank 1024 one of 4096 x 11008 needs 45 to
# 70 MB, so that a model's matrices together would need gigabytes.
SCRATCH_BYTES = 256 << 20


class Matrix:
    """Tensors, sizes and addresses; what is not laid out for the kernels is stepped in a copy.

    ``state``: both moments, their scales if they are 8-bit, the remainder if there is one. ``gram``: None, or of no
    numbers, for none.
    """

    __slots__ = (
        "copies", "dim", "g", "gram", "left", "norm", "p", "rank", "seed", "step", "strides", "vectors", "work"
    )  # fmt: skip

    def __init__(
        self, w: Tensor, g: Tensor, p: Tensor, state: Sequence[Tensor], gram: Tensor | None, norm: Tensor, step: Tensor,
        left: bool, seed: int,
    ) -> None:  # fmt: skip
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.work = [w if w.stride(1) == 1 else self._laid_out(w)]
        self.work += [x if x.is_contiguous() else self._laid_out(x) for x in state]
        self.g = g if g.stride(1) == 1 else g.contiguous()
        self.p = (p if p.dtype == w.dtype else p.to(w.dtype)).contiguous()
        self.gram = gram.float().contiguous() if gram is not None and gram.numel() else None
        self.norm, self.step, self.left, self.seed = norm, step, left, seed
        self.vectors, self.dim = (w.shape[1], w.shape[0]) if left else w.shape
        self.rank = p.shape[1 if left else 0]
        self.strides = (self.work[0].stride(0), self.g.stride(0))

    def _laid_out(self, x: Tensor) -> Tensor:
        copy = x.contiguous()
        if copy is not x:
            self.copies.append((x, copy))
        return copy

    def tensors(self) -> list[Tensor]:
        """All that kernels read or write, without scratch."""
        return [*self.work, self.g, self.p, self.norm, self.step, *([] if self.gram is None else [self.gram])]

    def finish(self) -> None:
        """What was stepped in a copy goes back."""
        for original, copy in self.copies:
            original.copy_(copy)


def matrices(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    moment_scales: Sequence[Tensor], projectors: Sequence[Tensor], grams: Sequence[Tensor],
    limiter_norms: Sequence[Tensor], steps: Sequence[Tensor], remainders: Sequence[Tensor], found_inf: Tensor | None,
    left: Sequence[bool], seeds: Sequence[int],
) -> list[Matrix]:  # fmt: skip
    """Arguments of the raw op as matrices for kernels; one without elements only has its step counted."""
    made = []
    for i, w in enumerate(params):
        if w.numel() == 0:
            steps[i].add_(1 if found_inf is None else (found_inf.view(()) <= 0).to(steps[i].dtype))
            continue
        state = [exp_avgs[i], exp_avg_sqs[i], *moment_scales[2 * i : 2 * i + 2], *remainders[i : i + 1]]
        gram = grams[i] if grams else None
        made.append(Matrix(w, grads[i], projectors[i], state, gram, limiter_norms[i], steps[i], left[i], seeds[i]))
    return made


def parts(items: Sequence[T], floats: Sequence[int], most: int) -> Iterator[tuple[list[T], int]]:
    """Successive groups of at most ``most`` matrices and SCRATCH_BYTES of scratch, with that scratch in floats.

    ``floats``: what each matrix needs; one that needs more than SCRATCH_BYTES is a group of its own.
    """
    group: list[T] = []
    total = 0
    for item, need in zip(items, floats, strict=True):
        if group and (len(group) == most or 4 * (total + need) > SCRATCH_BYTES):
            yield group, total
            group, total = [], 0
        group.append(item)
        total += need
    if group:
        yield group, total
