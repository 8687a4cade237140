"""Checks of arguments that read no data, with one wording for all ops: what was expected, what was got."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_rank(op: str, name: str, tensor: Tensor, ndim: int, shape: str) -> None:
    """TypeError unless a tensor, ValueError unless of ``ndim`` dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is {type(tensor).__name__}; expected a tensor {shape}")
    if tensor.ndim != ndim:
        raise ValueError(f"{op}: {name} is {list(tensor.shape)}; expected {ndim} dimensions {shape}")


def check_floating(op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """TypeError unless the dtype is one of ``allowed``."""
    if tensor.dtype not in allowed:
        text = ", ".join(_name(dtype) for dtype in allowed)
        raise TypeError(f"{op}: {name} is {_name(tensor.dtype)}; expected one of {text}")


def check_same_device(op: str, **tensors: Tensor) -> None:
    """ValueError unless all tensors are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    first = next(iter(devices.values()))
    for device in devices.values():
        if device != first:
            text = ", ".join(f"{name} is on {device}" for name, device in devices.items())
            raise ValueError(f"{op}: expected all tensors on one device; {text}")


def check_choice(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    """ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{op}: {name} is {value!r}; choose from {', '.join(choices)}")


def refuse_dtensor(op: str, **tensors: object) -> None:
    """TypeError for a DTensor, whose shards the op would read as if they were the whole."""
    for name, tensor in tensors.items():
        if type(tensor).__name__ == "DTensor" or hasattr(tensor, "_local_tensor"):
            raise TypeError(
                f"{op}: {name} is a DTensor, which this op does not take. Pass {name}.to_local(), or run the op on "
                "the shards with torch.distributed.tensor.experimental.local_map."
            )
