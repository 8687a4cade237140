"""Class-sharded margin softmax of every kind against the single-process result, on each rank of a torchrun launch."""

from __future__ import annotations

from typing import Any

import launched
import torch
import torch.distributed as dist
from torch import Tensor

import pyelastic
from pyelastic import margins
from pyelastic.distributed import class_sharded_margin_softmax

AUX = ("loss", "lse", "cos_target", "margin", "rank", "max_negative_cos", "el2n", "entropy")
# Options of the call; classes of each rank; rows of each rank.
EVEN, RAGGED, EMPTY = ((5, 5, 5, 5), (4, 4, 4, 4)), ((7, 2, 4, 1), (3, 6, 1, 2)), ((6, 0, 5, 3), (4, 3, 0, 2))
CASES: dict[str, tuple[dict[str, Any], tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "arcface": ({}, EVEN),
    "ragged": ({"return_aux": AUX}, RAGGED),
    "an empty shard, an empty batch": ({"return_aux": AUX, "reduction": "sum"}, EMPTY),
    "none": ({"reduction": "none", "z_loss": 0.01, "return_aux": True}, RAGGED),
    "smoothing": ({"label_smoothing": 0.1, "margin": margins.CosFace()}, RAGGED),
    "elastic": ({"margin": margins.ElasticArcFace(), "seed": 11}, RAGGED),
    "elastic plus": ({"margin": margins.ElasticCosFace(plus="rank"), "seed": 12}, EMPTY),
    "magface": ({"margin": margins.MagFace(), "scale": 20.0}, RAGGED),
    "adaface": ({"margin": margins.AdaFace(), "return_aux": AUX}, EVEN),
    "curricular": ({"margin": margins.CurricularFace(t=0.3), "return_aux": AUX, "label_smoothing": 0.1}, RAGGED),
    "sv": ({"margin": margins.SVSoftmax()}, EMPTY),
    "subcenters": ({"subcenters": 3, "return_aux": AUX}, RAGGED),
    "weights, given margins": ({"sample_weight": True, "margins": True}, RAGGED),
    "large scale": ({"scale": 700.0, "return_aux": ("lse", "entropy")}, RAGGED),
    "all positives on rank 0": ({"only": 0}, EVEN),
    "ignored": ({"ignored": True, "return_aux": AUX}, RAGGED),
}


def part(x: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    return x.split(sizes)[rank]


def check(name: str, rank: int, world: int, dtype: torch.dtype, backend: str) -> None:
    given, layout = CASES[name]
    options = dict(given)
    shards, batches = (sizes[:world] for sizes in layout)
    k, dim = options.get("subcenters", 1), 6
    torch.manual_seed(len(name))
    e, w = torch.randn(sum(batches), dim, dtype=dtype), torch.randn(sum(shards) * k, dim, dtype=dtype)
    high = shards[0] if "only" in options else sum(shards)
    labels = torch.randint(0, high, (sum(batches),))
    if options.pop("ignored", False):
        labels[::3] = -100
    options.pop("only", None)
    each = {n: torch.rand(len(labels), dtype=dtype) + 0.5 for n in ("sample_weight", "margins") if options.pop(n, None)}
    upstream = torch.randn(len(labels), dtype=dtype) if options.get("reduction") == "none" else torch.ones(())

    def run(f: Any, e: Tensor, w: Tensor, labels: Tensor, each: Any, upstream: Tensor) -> list[Tensor]:
        e, w = e.clone().requires_grad_(), w.clone().requires_grad_()
        out = f(e, w, labels, backend=backend, **each, **options)
        aux = [t for t in out[1] if t is not None] if "return_aux" in options else []
        loss = out[0] if "return_aux" in options else out
        loss.backward(upstream.to(loss.dtype))
        return [loss.detach(), e.grad, w.grad, *(t.detach() for t in aux)]

    want = run(pyelastic.margin_softmax, e, w, labels, each, upstream)
    wide = {n: t.double() for n, t in each.items()}
    truth = run(pyelastic.margin_softmax, e.double(), w.double(), labels, wide, upstream.double())
    mine = [part(x, batches, rank) for x in (e, labels)]
    own = {n: part(t, batches, rank) for n, t in each.items()}
    up = part(upstream, batches, rank) if upstream.ndim else upstream
    weight = w.split([n * k for n in shards])[rank]
    got = run(class_sharded_margin_softmax, mine[0], weight, mine[1], own, up)
    for n, (a, b, c) in enumerate(zip(got, want, truth, strict=True)):
        error = (b.double() - c).nan_to_num(0, 0, 0).abs().amax()  # of one process, in the same dtype; inf is inf
        if n == 2:
            b, c = (t.split([n * k for n in shards])[rank] for t in (b, c))
        elif b.ndim:
            b, c = part(b, batches, rank), part(c, batches, rank)
        if dtype == torch.float64:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, n=n: f"{name}, {n}: {m}")
            continue
        assert a.shape == b.shape and a.dtype == b.dtype
        # A stand-in's logit is made of its angle, up to pi in units of 2^-22, and what is made of logits has their
        # error times its size: scale 2^-22, and some of them for sums of differences of logits (entropy).
        most = c.abs().nan_to_num(0, 0, 0).amax().clamp(min=1) if c.numel() else 0.0
        rounding = 4 * options.get("scale", 64.0) * 2.0**-22 * most
        close = ((a.double() - c).abs() <= 4 * error + rounding) | (a.double() == c)
        assert close.all(), (name, n, a, b, c)


def check_sampling(rank: int, world: int) -> None:
    """The classes that each shard samples, in one process."""
    shards, batches = ((n[:world]) for n in RAGGED)
    e = torch.randn(sum(batches), 6, dtype=torch.float64)
    w = torch.randn(sum(shards), 6, dtype=torch.float64, requires_grad=True)
    labels, first, classes = torch.randint(0, sum(shards), (len(e),)), 0, []
    for n in shards:
        local = torch.where((labels >= first) & (labels < first + n), labels - first, -1)
        classes.append(first + pyelastic.sample_classes(local, n, 0.5, seed=3, ignore_index=-1))
        first += n
    options = {"label_smoothing": 0.1, "backend": "cpu"}
    want = pyelastic.margin_softmax(e, w, labels, classes=torch.cat(classes), **options)
    want.backward()
    mine = part(w.detach(), shards, rank).clone().requires_grad_()
    got = class_sharded_margin_softmax(
        part(e, batches, rank), mine, part(labels, batches, rank), sample_rate=0.5, sample_seed=3, **options
    )
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mine.grad, part(w.grad, shards, rank), rtol=1e-10, atol=1e-10)


def check_seeds_ddp_and_16_bits(rank: int, world: int) -> None:
    """A seed that nobody gave is one for all; gradients times the ranks; unit rows of 16 bits are near."""
    e, w = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8)
    labels = torch.randint(0, 5 * world, (4,))
    torch.manual_seed(rank)  # ranks whose generators differ
    drawn = class_sharded_margin_softmax(e, w, labels, margin=margins.ElasticArcFace())
    everyone = [torch.empty(()) for _ in range(world)]
    dist.all_gather(everyone, drawn.detach())
    assert all(torch.equal(x, drawn) for x in everyone)
    grads = []
    for options in ({}, {"ddp_world_compensation": True}, {"gather_dtype": torch.float16}):
        e.grad = None
        class_sharded_margin_softmax(e, w, labels, **options).backward()
        grads.append(e.grad)
    torch.testing.assert_close(grads[1], grads[0] * world)
    assert 0 < (grads[2] - grads[0]).abs().max() < 0.02 * grads[0].abs().max()


def check_dtensor(rank: int, world: int) -> None:
    """A DTensor is its shard, ragged as DTensor cuts it, and its gradient a DTensor of the same."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world,))
    w = torch.randn(2 * world + 1, 6, dtype=torch.float64, requires_grad=True)
    e, labels = torch.randn(3, 6, dtype=torch.float64), torch.randint(0, len(w), (3,))
    sharded = distribute_tensor(w.detach(), mesh, [Shard(0)]).requires_grad_()
    class_sharded_margin_softmax(e, sharded, labels).backward()
    pyelastic.margin_softmax(e.repeat(world, 1), w, labels.repeat(world)).backward()
    assert sharded.grad.placements == (Shard(0),)
    torch.testing.assert_close(sharded.grad.full_tensor(), w.grad, rtol=1e-10, atol=1e-10)
    try:
        class_sharded_margin_softmax(e, distribute_tensor(w.detach(), mesh, [Replicate()]), labels)
    except ValueError as error:
        assert "expected Shard(0)" in str(error)
    else:
        raise AssertionError("a replicated weight was taken")


def check_bytes(rank: int, world: int) -> None:
    """What docs/distributed.md says a step moves: bytes of the gathered and reduced tensors, by collective."""
    scatter = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    counted = {"all_gather_into_tensor": 0, scatter: 0, "all_reduce": 0}
    originals = {name: getattr(dist, name) for name in counted}

    def counting(name: str) -> Any:
        def call(*tensors: Any, **options: Any) -> Any:
            whole = max((t for t in tensors if isinstance(t, Tensor)), key=lambda t: t.numel())
            counted[name] += whole.numel() * whole.element_size()
            return originals[name](*tensors, **options)

        return call

    b, dim = 3, 8
    batch = b * world
    e, w, labels = torch.randn(b, dim, requires_grad=True), torch.randn(5, dim), torch.randint(0, 5 * world, (b,))
    for name in counted:
        setattr(dist, name, counting(name))
    try:
        class_sharded_margin_softmax(e, w, labels, gather_dtype=torch.float16).backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    assert counted["all_gather_into_tensor"] == batch * dim * 2 + batch * 8 + 2 * world * 8  # and labels, and sizes
    assert counted[scatter] == batch * dim * 2
    assert counted["all_reduce"] == 3 * batch * 4  # theta, and the largest and the sum of lse


def main() -> None:
    rank, world = launched.begin()
    for name in CASES:
        check(name, rank, world, torch.float64, "cpu")
        check(name, rank, world, torch.float64, "eager")
        check(name, rank, world, torch.float32, "cpu")
    check_sampling(rank, world)
    check_seeds_ddp_and_16_bits(rank, world)
    check_dtensor(rank, world)
    check_bytes(rank, world)
    launched.end()


if __name__ == "__main__":
    main()
