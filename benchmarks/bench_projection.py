"""projection: a dense layer and its rows' L2 normalisation, as ColBERT heads end in; forward, and a step with the
gradients of x, weight and bias (``skip``: and of the projected residual's weight).

The loss is <y, t>, so t is y's gradient. In a ``sparse`` case one row in ten of t is not zero, as of document rows when
each query has documents of its own (k negatives). The floor is the products alone, in a sparse case those of the rows
with a gradient.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyelastic
from benchmarks.harness import Variant, compiled

OP = "projection"
OURS = ("pyelastic cuda", "pyelastic triton", "pyelastic cpu", "pyelastic eager")
# Relative RMS error admitted. float32: 1.3e-6 (compiled torch); one wrong row of 5,760 is 1e-2. bfloat16: results and
# gradients are rounded to it and gradients are made from a rounded y, 2.4e-3. HALF: torch rounds z to it too, 6.1e-3.
FLOAT32, BFLOAT16, HALF = 2e-6, 4e-3, 1e-2
SPARSE = 10  # one row in so many has a gradient


@dataclass(frozen=True)
class Case:
    """``dense``, ``sparse`` or ``skip``."""

    kind: str
    rows: int
    d_in: int
    d_out: int

    @property
    def leaves(self) -> int:
        return 4 if self.kind == "skip" else 3

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.rows}-{self.d_in}to{self.d_out}"

    @property
    def kept(self) -> int:
        """Rows with a gradient."""
        return -(-self.rows // SPARSE) if self.kind == "sparse" else self.rows

    def flops(self) -> float:
        """One product forward, those of dx and dW backward; with a skip, two forward, and dR and what R adds to dx."""
        each = 2.0 * self.d_in * self.d_out * (2 if self.kind == "skip" else 1)
        return each * (self.rows + 2 * self.kept)

    def bytes(self) -> float:
        """x read in each direction, y written, its gradient read, dx written; the weights are small."""
        forward = self.rows * (self.d_in + self.d_out)
        return 4.0 * (forward + self.kept * (self.d_in + self.d_out) + self.rows * self.d_in)

    def tiny(self) -> Case:
        return Case(self.kind, 40, self.d_in, self.d_out)

    def inputs(self, seed: int, device: str) -> tuple[Tensor, ...]:
        """x, weight, bias, (residual weight,) t; t lies towards y, so that terms of the loss do not cancel."""
        generator = torch.Generator(device).manual_seed(seed)
        make = partial(torch.randn, generator=generator, device=device)
        x, bias = make(self.rows, self.d_in), 0.1 * make(self.d_out)
        weights = [make(self.d_out, self.d_in) / self.d_in**0.5 for _ in range(self.leaves - 2)]
        t = F.normalize(F.linear(x, weights[0]), dim=1) + make(self.rows, self.d_out) / self.d_out**0.5
        if self.kind == "sparse":
            keep = torch.randperm(self.rows, generator=generator, device=device)[: self.kept]
            t = torch.zeros_like(t).index_copy_(0, keep, t[keep])
        return (x, weights[0], bias, *weights[1:], t)


def case(case_id: str) -> Case:
    """The case of an id such as ``dense-5760-768to128``."""
    kind, *numbers = re.findall(r"dense|sparse|skip|\d+", case_id)
    return Case(kind, *map(int, numbers))


def cases(full: bool, device: str) -> list[Case]:
    if not full:
        return [Case("dense", 2880, 768, 128)]
    kinds = [("dense", 5760), ("dense", 38_400), ("sparse", 5760), ("sparse", 38_400), ("skip", 5760)]
    return [Case(kind, rows, 768, 128) for kind, rows in kinds]


def memory_only(full: bool) -> list[Case]:
    return []


# --- formulations ----------------------------------------------------------------------------------------------

Project = Callable[..., Tensor]


def linear_normalize(x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None = None) -> Tensor:
    z = F.linear(x, weight, bias)
    return F.normalize(z if skip is None else z + F.linear(x, skip), dim=-1)


def _ours(backend: str, x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None = None) -> Tensor:
    residual = None if skip is None else x
    return pyelastic.projection(x, weight, bias, residual=residual, residual_weight=skip, backend=backend)


def loss(project: Project, *inputs: Tensor) -> Tensor:
    """<y, t>, summed in float32."""
    *arguments, t = inputs
    return (project(*arguments).float() * t.float()).sum()


def bfloat16(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.bfloat16() for x in inputs)


def variants(case: Case, device: str) -> dict[str, Variant]:
    """Ours first."""
    found = {}
    for backend in ("cuda", "triton", "eager") if device == "cuda" else ("cpu", "eager"):
        run = partial(loss, partial(_ours, backend))
        found[f"pyelastic {backend}"] = Variant(run, FLOAT32)
        if backend != "eager":
            found[f"pyelastic {backend}, bf16"] = Variant(run, BFLOAT16, bfloat16)
    plain = partial(loss, linear_normalize)
    found["F.linear, F.normalize"] = Variant(plain, FLOAT32)
    found["F.linear, F.normalize, compiled"] = Variant(partial(loss, compiled(linear_normalize)), FLOAT32)
    found["F.linear, F.normalize, bf16"] = Variant(plain, HALF, bfloat16)
    return found


def floor(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> None:
    """The products of a step; t stands in for dz, of which a sparse case multiplies the rows that are not zero."""
    *skips, t = rest
    count = int((t[:, 0] != 0).sum())
    for w in (weight, *skips):
        torch.mm(x, w.T)
        torch.mm(t[:count], w)
        torch.mm(t[:count].T, x[:count])


def truth(*inputs: Any) -> tuple[Tensor, ...]:
    """The loss and the gradients of all inputs but t, by the formula with autograd in float64."""
    *leaves, t = [tensor.detach().double() for tensor in inputs]
    for leaf in leaves:
        leaf.requires_grad_()
    x, weight, bias, *skip = leaves
    z = x @ weight.T + bias
    for w in skip:
        z = z + x @ w.T
    value = (z / z.norm(dim=1, keepdim=True) * t).sum()
    return (value.detach(), *torch.autograd.grad(value, leaves))
