"""How tensors cross to the compiled module: what the launchers of several ops share."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=tuple[Any, ...])

# Numbers of csrc/common/dtype.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def pointer(x: Tensor | None) -> int:
    """The address of x's first element; 0 for none, and for an empty tensor."""
    return 0 if x is None or x.numel() == 0 else x.data_ptr()


def rows_of(x: Tensor) -> Tensor:
    """x [n, d] with columns one element apart, which the kernels expect; rows may lie at any distance."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def changed(inputs: T, **fields: Any) -> T:
    """A NamedTuple with other ``fields``: ``_replace``, through which torch.compile of torch 2.6 does not go."""
    kind: Any = type(inputs)
    made: T = kind(*[fields.get(name, value) for name, value in zip(kind._fields, inputs, strict=True)])
    return made
