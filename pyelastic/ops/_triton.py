"""Whether Triton can run an op's kernels on a device: the part of ``why_not`` that ops share."""

from __future__ import annotations

import importlib

import torch

# 3.3 compiles 203 of 245 kernels, 3.2 fewer, and takes the process down over some; from 3.4 on all (sm_90).
OLDEST = (3, 4)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_not(device: str, argument: str, module: str, kernel: str) -> str | None:
    """One sentence, or None if ``kernel`` of ``pyelastic.triton_kernels.<module>`` can run on ``device`` ("cuda:0")."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < OLDEST:
        return f"triton is {triton.__version__}; the kernels need 3.4 or newer, which torch 2.8 brings"
    try:
        kernels = importlib.import_module(f"pyelastic.triton_kernels.{module}")
    except ImportError as error:
        return f"{error}: a source tree that was not installed; pip install -e ."
    if device.startswith("cpu"):
        if type(getattr(kernels, kernel)).__name__ == "InterpretedFunction":
            return None
        return f"{argument} is on cpu; Triton runs on GPUs (or with TRITON_INTERPRET=1)"
    if device.startswith("cuda") and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{device} has a compute capability below 8.0"
    return None if device.startswith(("cuda", "xpu")) else f"{argument} is on {device}; Triton has no driver for it"
