"""Memory layouts a caller may pass, and the wrappers that make gradients arrive in all of them."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

KINDS = ("contiguous", "transposed", "sliced", "offset", "expanded", "permuted")


def _carrier(x: Tensor, *shape: int) -> Tensor:
    """A buffer whose padding shows up in any result that reads it."""
    poison = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
    return torch.full(shape, poison, dtype=x.dtype, device=x.device)


def lay(x: Tensor, kind: str) -> Tensor:
    """x's values in another layout (1-D or 2-D); "expanded" repeats the first row at stride 0.

    The result is detached: take the reference from what is returned, not from x.
    """
    x = x.detach()
    if kind == "contiguous" or x.ndim == 0:
        return x.clone(memory_format=torch.contiguous_format)
    if kind == "expanded":
        return x[:1].clone().expand_as(x) if x.shape[0] else x.clone()
    if kind == "offset":  # one element in: breaks any assumed vector alignment
        out = _carrier(x, x.numel() + 1)[1:].view(x.shape)
    elif x.ndim == 1:  # transposed, sliced, permuted: what is left is a stride
        out = _carrier(x, 2 * len(x) + 1)[1::2]
    elif kind == "transposed":
        out = _carrier(x, x.shape[1], x.shape[0]).mT
    elif kind == "sliced":
        out = _carrier(x, x.shape[0] + 2, x.shape[1] + 5)[1:-1, 2:-3]
    elif kind == "permuted":  # no dimension has stride 1 in order: rows 1, columns 3 n
        out = _carrier(x, x.shape[1], 3, x.shape[0]).permute(2, 1, 0)[:, 1]
    else:
        raise ValueError(f"unknown layout {kind!r}; choose from {KINDS}")
    return out.copy_(x)


def layouts(f: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """f with its gradient arriving contiguous, expanded, flipped, sliced and strided.

    Plain gradcheck always sends contiguous gradients, so a backward may assume them unnoticed.
    """

    def beside(join: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """f's output next to a constant, so that its gradient is a strided view of a larger one."""

        def wrapped(*a: Any) -> Tensor:
            out = f(*a)
            return join([out, torch.zeros_like(out)], -1)

        return wrapped

    yield "contiguous", f
    yield "expanded", lambda *a: f(*a).sum()
    yield "flipped", lambda *a: f(*a).flip(0)
    yield "sliced", beside(torch.cat)
    yield "strided", beside(torch.stack)


def pairwise(**axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """A small list of combinations in which every pair of values of two axes occurs together.

    Greedy and deterministic; tuples follow the order of the keywords.
    """
    values = list(axes.values())
    missing = {
        (a, i, b, j)
        for a, b in combinations(range(len(values)), 2)
        for i, j in product(range(len(values[a])), range(len(values[b])))
    }

    def pairs(row: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(a, row[a], b, row[b]) for a, b in combinations(range(len(row)), 2)}

    rows: list[tuple[int, ...]] = []
    candidates = list(product(*(range(len(v)) for v in values)))
    while missing:
        best = max(candidates, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        rows.append(best)
    return [tuple(v[i] for v, i in zip(values, row, strict=True)) for row in rows]
