"""MaxSim's negatives across ranks in both forms against one process, on each rank of a torchrun launch."""

from __future__ import annotations

from typing import Any

import launched
import oracle
import torch
import torch.distributed as dist
from torch import Tensor

import pyelastic
from pyelastic.distributed import maxsim as module
from pyelastic.distributed.maxsim import in_batch_maxsim_info_nce

QUERIES = ((3, 3, 3, 3), (4, 1, 2, 5), (0, 3, 2, 0))  # of each rank
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "two documents a query, packed": {"documents": 2, "packed": True, "temperature": 0.7},
    "masks, normalize, mean": {"masks": True, "normalize": True, "reduction": "mean", "temperature": 0.05},
    "smooth": {"masks": True, "smooth_temperature": 0.5},
    "top": {"topk": 2},
}
SINGLE = ("plain", "two documents a query, packed")  # also in float32, by the oracle
DIM, Q_LENGTH = 8, 5


def parts_of(queries: tuple[int, ...], each: int, masks: bool) -> list[dict[str, Tensor]]:
    """Every rank's tensors; documents of lengths that differ, also between ranks."""
    random = torch.Generator().manual_seed(3)
    made = []
    for rank, n in enumerate(queries):
        length = 4 + rank
        part = {
            "queries": torch.randn(n, Q_LENGTH, DIM, generator=random),
            "documents": torch.randn(n * each, length, DIM, generator=random),
        }
        if masks:
            part["query_mask"] = torch.rand(n, Q_LENGTH, generator=random) > 0.3
            part["document_mask"] = torch.rand(n * each, length, generator=random) > 0.3
        made.append(part)
    return made


def leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).clone().requires_grad_()


def whole_batch(parts: list[dict[str, Tensor]], dtype: torch.dtype, rank: int, **options: Any) -> list[Tensor]:
    """Loss of one process on the concatenation, and this rank's rows of its gradients."""
    q = leaf(torch.cat([p["queries"] for p in parts]), dtype)
    d = leaf(torch.cat([p["documents"].flatten(0, 1) for p in parts]), dtype)
    lengths = torch.cat([torch.full((len(p["documents"]),), p["documents"].shape[1]) for p in parts])
    cu = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    if "query_mask" in parts[0]:
        options["query_mask"] = torch.cat([p["query_mask"] for p in parts])
        options["document_mask"] = torch.cat([p["document_mask"].flatten() for p in parts])
    loss = pyelastic.maxsim_info_nce(q, d, cu_seqlens_d=cu, layout="cross", **options)
    (loss * 1.5).backward()
    d_q = q.grad.split([len(p["queries"]) for p in parts])[rank]
    d_d = d.grad.split([p["documents"].shape[0] * p["documents"].shape[1] for p in parts])[rank]
    return [loss.detach(), d_q, d_d.view_as(parts[rank]["documents"])]


def on_ranks(part: dict[str, Tensor], form: str, packed: bool, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    q, d = leaf(part["queries"], dtype), leaf(part["documents"], dtype)
    masks = {name: m for name, m in part.items() if name.endswith("mask")}
    given = d
    if packed:
        given, options["cu_seqlens_d"] = d.flatten(0, 1), torch.arange(len(d) + 1) * d.shape[1]
    loss = in_batch_maxsim_info_nce(q, given, form=form, **masks, **options)
    (loss * 1.5).backward()
    return [loss.detach(), q.grad, d.grad]


def check(name: str, queries: tuple[int, ...], rank: int, form: str, dtype: torch.dtype, backend: str) -> None:
    options = dict(OPTIONS[name]) | {"backend": backend}
    packed = options.pop("packed", False)
    parts = parts_of(queries, options.pop("documents", 1), options.pop("masks", False))
    got = on_ranks(parts[rank], form, packed, dtype, **options)
    again = on_ranks(parts[rank], form, packed, dtype, **options)
    want = whole_batch(parts, dtype, rank, **options)
    amounts = [] if dtype == torch.float64 else amounts_of(parts, rank, options["temperature"])
    truth = whole_batch(parts, torch.float64, rank, **options)
    for i, (a, repeated, b, c) in enumerate(zip(got, again, want, truth, strict=True)):
        assert torch.equal(a, repeated), (name, form, queries)
        if dtype == torch.float64:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m: f"{name} {form} {queries}: {m}")
        else:
            oracle.check(a, c, A=amounts[i], K=Q_LENGTH * DIM + 2 * sum(queries), name=f"{name} {form} {queries} {i}")


def amounts_of(parts: list[dict[str, Tensor]], rank: int, temperature: float) -> list[Tensor]:
    """The oracle's A of loss, dq and dd, from the formulas: what a rounding of the scores makes of them included."""
    q = torch.cat([p["queries"] for p in parts]).double()
    documents = [d for p in parts for d in p["documents"].double()]
    winners = [d[torch.einsum("isd,td->ist", q, d).argmax(-1)] for d in documents]  # [Nq, Lq, d] each
    z = torch.stack([(q * w).sum((1, 2)) for w in winners], 1) / temperature
    size = torch.stack([(q * w).abs().sum((1, 2)) for w in winners], 1) / temperature
    positive = torch.zeros_like(z).scatter(1, (torch.arange(len(q)) * (z.shape[1] // len(q)))[:, None], 1.0)
    p = z.softmax(1)
    loss = (size * (p + positive)).sum(1) + z.logsumexp(1).abs() + 1
    g = (p * (size + (p * size).sum(1, keepdim=True) + 1) + (p - positive).abs()) * (1.5 / temperature / len(q))
    d_q = sum(g[:, j, None, None] * w.abs() for j, w in enumerate(winners))
    d_d = []
    for j, d in enumerate(documents):
        hit = torch.einsum("isd,td->ist", q, d).argmax(-1).flatten()
        d_d.append(torch.zeros_like(d).index_add(0, hit, (g[:, j, None, None] * q.abs()).flatten(0, 1)))
    first = sum(len(p["documents"]) for p in parts[:rank])
    own = d_d[first : first + len(parts[rank]["documents"])]
    d_q = d_q.split([len(p["queries"]) for p in parts])[rank]
    return [loss.mean(), d_q, torch.stack(own) if own else parts[rank]["documents"].double()]


def check_bytes(world: int) -> None:
    """What docs/distributed_sequences.md says that document tokens move, forward and backward."""
    moved: list[int] = []
    sending, names = module._Send, ("all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor")
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    class Counting(sending):
        def __init__(self, out: Tensor, *more: Any) -> None:
            moved.append(out.numel() * out.element_size())
            super().__init__(out, *more)

    def counting(name: str) -> Any:
        def call(*tensors: Tensor, **options: Any) -> Any:
            if tensors[0].is_floating_point():
                moved.append(max(t.numel() * t.element_size() for t in tensors[:2]))
            return originals[name](*tensors, **options)

        return call

    n, length = 3, 4
    block = n * length * DIM  # numbers of a rank's document tokens
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        part = {"queries": torch.randn(n, Q_LENGTH, DIM), "documents": torch.randn(n, length, DIM)}
        for form, want in (
            ("gather", 2 * world * block * width),
            ("ring", 2 * (world - 1) * block * width + world * block * 4),
        ):
            moved.clear()
            module._Send = Counting
            for name in originals:
                setattr(dist, name, counting(name))
            try:
                on_ranks(part, form, False, dtype)
            finally:
                module._Send = sending
                for name, original in originals.items():
                    setattr(dist, name, original)
            assert sum(moved) == want, (form, dtype, moved, want)


def main() -> None:
    rank, world = launched.begin()
    for queries in QUERIES:
        for name in OPTIONS:
            for form in ("gather", "ring"):
                for dtype, backend in ((torch.float64, "cpu"), (torch.float32, "cpu"), (torch.float64, "eager")):
                    if dtype == torch.float64 or name in SINGLE:
                        check(name, queries[:world], rank, form, dtype, backend)
    check_bytes(world)
    launched.end()


if __name__ == "__main__":
    main()
