"""Small models and training loops for the tests of the optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyelastic.optim import Fira


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Wide, tall and square matrices and a vector."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(24, 40), (40, 24), (16, 16), (9,)]
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def groups(params: list[nn.Parameter], **keys: Any) -> list[dict[str, Any]]:
    keys = {"rank": 4, "update_proj_gap": 5, "alpha": 0.25, "proj_type": "std"} | keys
    return [{"params": params[:-1], **keys}, {"params": params[-1:]}]


def gradients(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    """The same for the same step, whatever came before."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        noise = torch.randn(p.shape, generator=generator)
        low = torch.randn(p.shape[0], 3, generator=generator) if p.ndim == 2 else None
        if low is not None:
            noise = noise * 0.3 + low @ torch.randn(3, p.shape[1], generator=generator)
        p.grad = (noise * (1 + 0.2 * torch.randn((), generator=generator)) * scale).to(p.dtype)


def train(
    optimizer: Any, params: list[nn.Parameter], steps: range, also: Callable[[int], None] = lambda t: None
) -> None:
    for t in steps:
        gradients(params, t)
        also(t)
        optimizer.step()


def state_of(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    """Every tensor of an optimizer's state, cloned."""
    return {
        (i, key): value.clone()
        for i, entry in enumerate(optimizer.state.values())
        for key, value in entry.items()
        if isinstance(value, Tensor)
    }


def fresh(
    seed: int = 0, dtype: torch.dtype = torch.float32, group: dict[str, Any] | None = None, **options: Any
) -> Any:
    """Parameters and a Fira over them."""
    params = parameters(seed, dtype)
    return params, Fira(groups(params, **(group or {})), lr=0.01, weight_decay=0.1, **options)


def regression(dtype: torch.dtype, steps: int, lr: float, **options: Any) -> float:
    """Loss of fitting a linear map from correlated inputs; the last 20 steps' mean."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(48, 32, generator=generator)
    w = nn.Parameter(torch.zeros(48, 32, dtype=dtype))
    optimizer = Fira([{"params": [w], "rank": 8, "update_proj_gap": 20, "alpha": 0.5}], lr=lr, **options)
    losses = []
    for t in range(steps):
        x = torch.randn(64, 32, generator=generator)
        loss = (x @ (w.float() - target).T).square().mean()
        w.grad = None
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - t / steps)
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-20:]) / 20
