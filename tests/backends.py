"""Which backends a test runs over: whatever the dispatcher's own table says is implemented."""

import importlib.util
from typing import Any

import emulated
import pytest
import torch

import pyelastic.ops  # noqa: F401  (registers every op)
from pyelastic import _dispatch, _extension

# With no GPU, backend "cuda" runs under the emulator on CPU tensors.
GPU = torch.cuda.is_available()
EMULATOR = None if GPU else emulated.load()
if EMULATOR is not None:
    _extension.emulate(EMULATOR)

# And backend "triton" under the checked interpreter; conftest has set TRITON_INTERPRET.
INTERPRETED = not GPU and importlib.util.find_spec("triton") is not None
if INTERPRETED:
    import interpreted

    interpreted.install()


def implemented(op: str) -> list[str]:
    """Backends of `op` that have code, and a GPU or an emulator to run it on."""
    table = _dispatch.registry()[op]
    there = {"eager": True, "cpu": True, "triton": GPU or INTERPRETED, "cuda": GPU or EMULATOR is not None}
    return [name for name in there if there[name] and table[name].run is not None]


def device_of(backend: str) -> torch.device:
    """Where the inputs of a test of this backend live ("auto" is tested on the CPU)."""
    return torch.device("cuda" if GPU and backend in ("cuda", "triton") else "cpu")


def skip_unsupported(op: str, backend: str, dtype: torch.dtype) -> None:
    """Skip a test in a dtype that the backend does not have: the matrix shows that, and errors say it."""
    if backend != "auto" and str(dtype).removeprefix("torch.") not in _dispatch.registry()[op][backend].dtypes:
        pytest.skip(f"{op}: backend {backend} has no {dtype}")


def widest(op: str, backend: str) -> torch.dtype:
    """float64 where the backend has it, else float32: for tests of logic that no backend may be left out of."""
    return torch.float64 if "float64" in _dispatch.registry()[op][backend].dtypes else torch.float32


def half_operands(backend: str, *dtypes: torch.dtype) -> bool:
    """Whether a GPU backend multiplies in float16: where an input is 16-bit (docs/ops)."""
    return backend in ("cuda", "triton") and bool({torch.float16, torch.bfloat16} & set(dtypes))


def require(backend: str) -> str:
    """Skip only where the extension was honestly not built; a broken one must fail loudly."""
    if (backend == "cpu" or (backend == "cuda" and GPU)) and _extension.state().status == "not built":
        pytest.skip(f"extension not built: {_extension.state().reason}")
    return backend


def to_device(backend: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    device = device_of(backend)
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
