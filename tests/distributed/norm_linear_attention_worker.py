"""Sequence-parallel norm-aware attention of every kind against one process, on each rank of a torchrun launch."""

from __future__ import annotations

from typing import Any

import launched
import torch
import torch.distributed as dist
from torch import Tensor

import pyelastic
from pyelastic.distributed import sequence_parallel_norm_linear_attention

PARTS = ((7, 7, 7, 7), (9, 1, 14, 3), (0, 11, 0, 5))  # tokens of each rank
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rope": {"rope": "num"},
    # Slow turns: with fast ones denominators come near 0, and float32 has no digits left to compare.
    "rope in both, gate": {"rope": "both", "gate": True, "turn": 0.02},
    "cos, learned, sum": {"mode": "cos", "learned": True, "eps_mode": "sum"},
}


def check(name: str, causal: bool, parts: tuple[int, ...], rank: int, dtype: torch.dtype, backend: str) -> None:
    options = dict(OPTIONS[name]) | {"causal": causal, "backend": backend}
    n, heads, kv_heads, dim, v_dim = sum(parts), 4, 2, 6, 5
    torch.manual_seed(1)
    shapes = {"q": (heads, dim), "k": (kv_heads, dim), "v": (kv_heads, v_dim)}
    whole = {name: torch.randn(2, n, *shape) for name, shape in shapes.items()}
    if options.pop("gate", False):
        whole["gate"] = torch.randn(2, n, heads, v_dim)
    learned = {"lam": torch.rand(heads) + 2, "tau": torch.rand(heads)} if options.pop("learned", False) else {}
    if turn := options.pop("turn", None):
        angles = turn * torch.arange(n, dtype=torch.float64)[:, None].expand(n, dim // 2)
        options["rope_tables"] = (angles.sin(), angles.cos())
    upstream = torch.randn(2, n, heads, v_dim)

    def run(f: Any, of: torch.dtype, part: Any) -> tuple[list[Tensor], list[Tensor]]:
        tensors = {key: part(t).to(of).clone().requires_grad_() for key, t in whole.items()}
        numbers = {key: t.to(of).clone().requires_grad_() for key, t in learned.items()}
        o = f(**tensors, **numbers, **options)
        o.backward(part(upstream).to(of))
        return [o.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in tensors.values())], [
            torch.zeros_like(t) if t.grad is None else t.grad for t in numbers.values()
        ]

    def mine(t: Tensor) -> Tensor:
        return t.split(parts, 1)[rank]

    got, got_numbers = run(sequence_parallel_norm_linear_attention, dtype, mine)
    want, want_numbers = run(pyelastic.norm_linear_attention, dtype, lambda t: t)
    truth, true_numbers = run(pyelastic.norm_linear_attention, torch.float64, lambda t: t)
    for g in got_numbers:
        dist.all_reduce(g)
    of_rows = [(a, mine(b), mine(c), (b.double() - c).abs().max()) for a, b, c in zip(got, want, truth, strict=True)]
    summed = zip(got_numbers, want_numbers, true_numbers, strict=True)
    for a, b, c, error in [*of_rows, *((a, b, c, (b.double() - c).abs().max()) for a, b, c in summed)]:
        if dtype == torch.float64:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m: f"{name} {causal} {parts}: {m}")
        else:  # four times the error of one process, and a rounding of sums in another order
            scale = c.abs().max() if c.numel() else 0.0
            assert ((a.double() - c).abs() <= 4 * error + 2.0**-20 * scale).all(), (name, causal, parts, error)


def check_bytes(world: int) -> None:
    """A step moves states, whatever the number of tokens."""
    counted = []
    originals = {name: getattr(dist, name) for name in ("all_gather_into_tensor", "all_reduce")}

    def counting(name: str) -> Any:
        def call(*tensors: Tensor, **options: Any) -> Any:
            counted.append(max(t.numel() * t.element_size() for t in tensors))
            return originals[name](*tensors, **options)

        return call

    for causal in (False, True):
        for n in (3, 30):
            q, k, v = (torch.randn(1, n, 2, 4, requires_grad=True) for _ in range(3))
            counted.clear()
            for name in originals:
                setattr(dist, name, counting(name))
            try:
                sequence_parallel_norm_linear_attention(q, k, v, causal=causal).sum().backward()
            finally:
                for name, original in originals.items():
                    setattr(dist, name, original)
            state = 2 * 8 * (4 + 1) * 4  # heads, 2 d, dv + 1, float32
            assert sum(counted) == 2 * state * (world if causal else 1) + 8 * world  # and sizes


def main() -> None:
    rank, world = launched.begin()
    for parts in PARTS:
        for causal in (False, True):
            for name in OPTIONS:
                for dtype, backend in ((torch.float64, "cpu"), (torch.float32, "cpu"), (torch.float64, "eager")):
                    check(name, causal, parts[:world], rank, dtype, backend)
    check_bytes(world)
    q = torch.randn(1, 3, 2, 4)
    try:
        sequence_parallel_norm_linear_attention(q, q, q, position=3)
    except ValueError as error:
        assert "position is given" in str(error)
    else:
        raise AssertionError("position was taken")
    launched.end()


if __name__ == "__main__":
    main()
