"""Fused training kernels for PyTorch. Names load on first use: importing the package imports no kernel."""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "BackendError": "pyelastic._dispatch",
    "FiraState": "pyelastic.ops.fira",
    "MarginSoftmaxAux": "pyelastic.ops.margin_softmax",
    "LinearAttentionState": "pyelastic.ops.norm_linear_attention",
    "Int8Tokens": "pyelastic.quantized",
    "ResidualTokens": "pyelastic.quantized",
    "backends": "pyelastic._dispatch",
    "fira": "pyelastic.ops.fira",
    "fira_state": "pyelastic.ops.fira",
    "mala_attention": "pyelastic.ops.linear_attention_maps",
    "margin_softmax": "pyelastic.ops.margin_softmax",
    "maxsim": "pyelastic.ops.maxsim",
    "maxsim_info_nce": "pyelastic.ops.maxsim_losses",
    "maxsim_kl_distill": "pyelastic.ops.maxsim_losses",
    "maxsim_margin_mse": "pyelastic.ops.maxsim_losses",
    "maxsim_xtr": "pyelastic.ops.maxsim_losses",
    "norm_linear_attention": "pyelastic.ops.norm_linear_attention",
    "norm_linear_attention_step": "pyelastic.ops.norm_linear_attention_step",
    "polaformer_attention": "pyelastic.ops.linear_attention_maps",
    "projection": "pyelastic.ops.projection",
    "quantize_int8": "pyelastic.quantized",
    "quantize_residual": "pyelastic.quantized",
    "rope_tables": "pyelastic.rope",
    "sample_classes": "pyelastic.ops.margin_softmax",
    "use_backend": "pyelastic._dispatch",
}
_MODULES = ("margins", "nn", "ops", "optim")

__all__ = ["__version__", *_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"pyelastic.{name}")
    elif name == "__version__":
        value = importlib.import_module("importlib.metadata").version("pyelastic")
    else:
        raise AttributeError(f"module 'pyelastic' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
