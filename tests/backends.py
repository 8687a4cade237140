"""Which backends a test runs over: whatever the dispatcher's own table says is implemented."""

from typing import Any

import pytest
import torch

import pyelastic.ops  # noqa: F401  (registers every op)
from pyelastic import _dispatch, _extension


def implemented(op: str) -> list[str]:
    """Backends of `op` that have code and, for GPU backends, a GPU to run it on."""
    table = _dispatch.registry()[op]
    gpu = torch.cuda.is_available()
    return [
        name
        for name in ("eager", "cpu", "triton", "cuda")
        if table[name].run is not None and (gpu or name in ("eager", "cpu"))
    ]


def device_of(backend: str) -> torch.device:
    """Where the inputs of a test of this backend live ("auto" is tested on the CPU)."""
    return torch.device("cuda" if backend in ("cuda", "triton") else "cpu")


def require(backend: str) -> str:
    """Skip only where the extension was honestly not built; a broken one must fail loudly."""
    if backend in ("cpu", "cuda") and _extension.state().status == "not built":
        pytest.skip(f"extension not built: {_extension.state().reason}")
    return backend


def to_device(backend: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    device = device_of(backend)
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
