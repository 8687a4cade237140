"""Values in float64 that carry how far arithmetic of lower precision may be off, to first order, in roundings.

The error of a sum of products is one rounding of each term plus what the factors carry. ``noise`` 1: every operation
rounds. ``noise`` 0: only what is marked by ``stored`` does, for operands of fewer bits than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Running:
    """x, and its error e >= 0."""

    x: Tensor
    e: Tensor
    noise: float

    def _made(self, x: Tensor, e: Tensor) -> Running:
        return Running(x, e + self.noise * x.abs(), self.noise)

    def exact(self, x: Tensor | float) -> Running:
        """A number without error, of this kind."""
        x = torch.as_tensor(x, dtype=torch.float64)
        return Running(x, torch.zeros_like(x), self.noise)

    def _other(self, other: Running | Tensor | float) -> Running:
        return other if isinstance(other, Running) else self.exact(other)

    def __add__(self, other: Running | Tensor | float) -> Running:
        b = self._other(other)
        return self._made(self.x + b.x, self.e + b.e)

    def __sub__(self, other: Running | Tensor | float) -> Running:
        b = self._other(other)
        return self._made(self.x - b.x, self.e + b.e)

    def __mul__(self, other: Running | Tensor | float) -> Running:
        b = self._other(other)
        return self._made(self.x * b.x, self.x.abs() * b.e + b.x.abs() * self.e)

    def __truediv__(self, other: Running | Tensor | float) -> Running:
        b = self._other(other)
        x = self.x / b.x
        return self._made(x, (self.e + x.abs() * b.e) / b.x.abs())

    def map(self, f: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Running:
        return self._made(f(self.x), slope(self.x).abs() * self.e)

    def sum(self, dim: int | tuple[int, ...], keepdim: bool = False) -> Running:
        return self._made(
            self.x.sum(dim, keepdim), self.e.sum(dim, keepdim) + self.noise * self.x.abs().sum(dim, keepdim)
        )

    def where(self, mask: Tensor) -> Running:
        """Zero elsewhere."""
        return Running(torch.where(mask, self.x, 0.0), torch.where(mask, self.e, 0.0), self.noise)

    def stored(self) -> Running:
        """Rounded as an operand (noise 0)."""
        return self if self.noise else Running(self.x, self.e + self.x.abs(), self.noise)

    def view(self, f: Callable[[Tensor], Tensor]) -> Running:
        """f moves elements and does no arithmetic."""
        return Running(f(self.x), f(self.e), self.noise)

    def __neg__(self) -> Running:
        return Running(-self.x, self.e, self.noise)


def product(equation: str, a: Running, b: Running) -> Running:
    """einsum of two."""
    p, q = a.x.abs(), b.x.abs()
    size = torch.einsum(equation, p, b.e) + torch.einsum(equation, a.e, q)
    x = torch.einsum(equation, a.x, b.x)
    return Running(x, size + a.noise * torch.einsum(equation, p, q), a.noise)


def cat(parts: list[Running], dim: int) -> Running:
    return Running(torch.cat([p.x for p in parts], dim), torch.cat([p.e for p in parts], dim), parts[0].noise)
