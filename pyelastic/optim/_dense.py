"""Adam for the parameters that are not projected: the published package's, over lists of tensors at once.

``m, v`` as ever; ``W <- (1 - lr wd) (W - lr c m / (sqrt(v) + eps))``, c = sqrt(1 - b2^t) / (1 - b1^t). It differs from
``torch.optim.AdamW`` in that eps is not divided by sqrt(1 - b2^t) and in that decay acts on the stepped weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fused_step(params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any],
               grad_scale: Tensor | None, found_inf: Tensor | None) -> None:  # fmt: skip
    """torch's fused AdamW, with its own place for eps and decay."""
    beta1, beta2 = group["betas"]
    torch._foreach_add_([s["step"] for s in states], 1)
    torch._fused_adamw_(
        params, grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [],
        [s["step"] for s in states], lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
        eps=group["eps"], amsgrad=False, maximize=group["maximize"], grad_scale=grad_scale, found_inf=found_inf,
    )  # fmt: skip
    if found_inf is not None:
        torch._foreach_sub_([s["step"] for s in states], [found_inf] * len(states))


def step(params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any],
         grad_factor: Tensor | None, found_inf: Tensor | None) -> None:  # fmt: skip
    """``found_inf``: 0-d, where > 0 nothing changes; multiplies nothing, as inf times 0 is NaN."""
    beta1, beta2 = group["betas"]
    moments = [s["exp_avg"] for s in states]
    squares = [s["exp_avg_sq"] for s in states]
    steps = [s["step"] for s in states]
    grads = [g.to(m.dtype) for g, m in zip(grads, moments, strict=True)]
    if grad_factor is not None:
        grads = [g * grad_factor.to(g.dtype) for g in grads]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    before = None
    if found_inf is not None:
        before = [[t.clone() for t in tensors] for tensors in (params, moments, squares, steps)]
    torch._foreach_add_(steps, 1)
    torch._foreach_lerp_(moments, grads, 1.0 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1.0 - beta2)
    updates = torch._foreach_sqrt(squares)
    torch._foreach_add_(updates, group["eps"])
    updates = torch._foreach_div(moments, updates)
    lr, decay = group["lr"], group["weight_decay"]
    for p, update, s in zip(params, updates, states, strict=True):
        t = s["step"].to(torch.float64)
        rate = torch.as_tensor(lr, dtype=torch.float64, device=p.device)
        size = rate
        if group["correct_bias"]:
            size = rate * torch.sqrt(1.0 - beta2**t) / (1.0 - beta1**t)
        new = (p.to(update.dtype) - size.to(update.dtype) * update) * (1.0 - rate * decay).to(update.dtype)
        p.copy_(new)
    if before is not None and found_inf is not None:
        for tensors, olds in zip((params, moments, squares, steps), before, strict=True):
            for now, old in zip(tensors, olds, strict=True):
                now.copy_(torch.where(found_inf > 0, old, now))
