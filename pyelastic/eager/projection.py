"""projection in plain PyTorch: the specification, a backend, and the oracle of the kernels' gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def statistics_dtype(x: Tensor) -> torch.dtype:
    """What products and norms are computed in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    normalize: bool,
) -> Tensor:
    """y [N, d_out] of x [N, d_in]; formula: ops/projection.py."""
    dtype = statistics_dtype(x)
    z = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if residual is not None:
        r = residual.to(dtype)
        z = z + (r if residual_weight is None else F.linear(r, residual_weight.to(dtype)))
    return (F.normalize(z, dim=-1) if normalize else z).to(x.dtype)
