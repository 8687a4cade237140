"""Loads the compiled module ``pyelastic._C`` and says what state it is in: built, not built, or broken.

``_build.json``, written by the build beside it, carries the reason where there is no module.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pyelastic._dispatch import BackendError

_MEND = "reinstall with a C++17 compiler: pip install --force-reinstall --no-deps pyelastic"


@dataclass(frozen=True)
class State:
    """``status`` is 'built', 'not built' or 'broken'; ``reason`` and the command that mends it unless built."""

    status: str
    reason: str = ""
    mend: str = ""


_loaded: tuple[ModuleType | None, State] | None = None


def build_metadata() -> dict[str, Any]:
    """What the build wrote down about itself, {} if nothing."""
    path = Path(__file__).with_name("_build.json")
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _share_openmp(module: ModuleType) -> None:
    """Hand the OpenMP entry point that torch's wheel loaded to our kernels (see csrc/common/parallel.h)."""
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return  # another OpenMP runtime: the kernels start threads of their own
    module.use_openmp(ctypes.cast(entry, ctypes.c_void_p).value)


def _load() -> tuple[ModuleType | None, State]:
    if importlib.util.find_spec("pyelastic._C") is None:
        reason = build_metadata().get("not_built") or "pyelastic was installed without its compiled module"
        return None, State("not built", reason, _MEND)
    try:
        module = importlib.import_module("pyelastic._C")
        module.isa()
        _share_openmp(module)
    except Exception as error:  # whatever a foreign loader raises is a reason, not a crash
        return None, State("broken", f"{type(error).__name__}: {error}", _MEND)
    return module, State("built")


def _once() -> tuple[ModuleType | None, State]:
    global _loaded
    if _loaded is None:
        _loaded = _load()
    return _loaded


def state() -> State:
    """The state of the compiled module; loads it at the first call."""
    return _once()[1]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # what a compiled region asks for while it is traced
def why_not() -> str | None:
    """One sentence, or None if the module is there."""
    current = state()
    if current.status == "built":
        return None
    return f"the compiled module is {current.status} ({current.reason}); {current.mend}"


_emulator: ModuleType | None = None


def emulate(module: ModuleType | None) -> None:
    """Let backend "cuda" run `module`, the CUDA kernels under the SIMT emulator, on CPU tensors (tests only)."""
    global _emulator
    _emulator = module


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def cuda_why_not(device: str) -> str | None:
    """One sentence, or None if the CUDA kernels can run on this device ("cuda:0")."""
    if _emulator is not None:
        return None if device == "cpu" else "the emulator of the CUDA kernels takes CPU tensors"
    if not device.startswith("cuda"):
        return f"the tensors are on {device}; the kernel runs on NVIDIA GPUs"
    missing = why_not()
    if missing is not None:
        return missing
    if not hasattr(load(), "cuda_mma_gemm"):
        reason = build_metadata().get("cuda", "not built")
        return f"the CUDA kernels are {reason}; reinstall with PYELASTIC_CUDA=ON and nvcc on the PATH"
    if torch.version.hip is not None:
        return "this is an AMD GPU; backend 'triton' runs there"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"{device} has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0"
    built = str(build_metadata().get("cuda", "")).removeprefix("built for ")
    if not _has_code(built.split(","), capability):
        arch = f"{capability[0]}{capability[1]}"
        cure = f"reinstall with PYELASTIC_CUDA_ARCHS={arch}"
        return f"{device} is sm_{arch} and the CUDA kernels are built for {built}; {cure}"
    return None


def _has_code(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether a build for ``archs`` ("80", "90a") runs: machine code of the major version, or PTX of the newest."""
    pairs = []
    for arch in archs:
        match = re.fullmatch(r"(\d+)(\d)([af]?)", arch.strip())
        if match is None:
            return True  # the build said nothing: the first launch will
        pairs.append(((int(match[1]), int(match[2])), match[3] == "a"))
    ptx = max(pair for pair, _ in pairs)
    return capability >= ptx or any(
        capability == pair if exact else capability[0] == pair[0] and capability >= pair for pair, exact in pairs
    )


def load_cuda() -> tuple[Any, bool]:
    """The module with the CUDA launchers, and whether it is the emulator. Raises BackendError as `load`."""
    return (load(), False) if _emulator is None else (_emulator, True)


def load() -> Any:
    """The module. Raises BackendError with the reason and the command that mends it."""
    module, _ = _once()
    if module is None:
        raise BackendError(f"pyelastic: {why_not()}")
    return module
