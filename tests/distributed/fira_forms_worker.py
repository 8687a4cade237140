"""What else Fira has to do on several ranks: bytes moved, 16 bits, loss scaling, HSDP, DDP, refusals."""

from __future__ import annotations

import math
from typing import Any

import fira_worker as base
import launched
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pyelastic.distributed import fira as sharded
from pyelastic.optim import Fira, divide_params

LAYERS = [(6, 9), (9, 4), (4, 3)]


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in LAYERS)).to(dtype)


def loss_of(net: nn.Module, step: int, rank: int, world: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, LAYERS[0][0], dtype=torch.float64, generator=generator)
    return net(x.chunk(world)[rank]).square().mean()


def fira(net: nn.Module, **options: Any) -> Fira:
    return Fira(divide_params(net, rank=2, update_proj_gap=3, alpha=0.25), lr=0.02, weight_decay=0.1, **options)


# --- bytes ----------------------------------------------------------------------------------------------------------


def counted(call: Any) -> dict[str, int]:
    """Bytes of the tensors that collectives move: of the whole one where that is cut or put together."""
    scatter = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    names = {"all_gather_into_tensor": "all_gather", scatter: "reduce_scatter"}
    names |= {name: name for name in ("all_reduce", "broadcast", "gather")}
    originals = {name: getattr(dist, name) for name in names}
    out = dict.fromkeys(names.values(), 0) | {"calls": 0}

    def counting(name: str) -> Any:
        def instead(*tensors: Any, **options: Any) -> Any:
            whole = max((t for t in tensors if isinstance(t, Tensor)), key=lambda t: t.numel())
            ranks = dist.get_world_size(options.get("group")) if name == "gather" else 1
            out[names[name]] += ranks * whole.numel() * whole.element_size()
            out["calls"] += 1
            return originals[name](*tensors, **options)

        return instead

    for name in names:
        setattr(dist, name, counting(name))
    try:
        call()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return out


def predicted(case: str, dtype: torch.dtype, world: int, when: str) -> dict[str, int]:
    """docs/distributed_fira.md's table; ``when``: at the first refresh, at a later one, or between."""
    size = dtype.itemsize
    full = max(size, 4)
    out = dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce", "broadcast", "gather"), 0)
    lefts, rights = 0, 0
    for shape in base.SHAPES[: base.LOW]:
        m, n = shape[0], math.prod(shape[1:])
        left, rank = m < n, min(2, m, n)
        across, down = -(-n // world) * world, -(-m // world) * world
        lefts, rights = lefts + left, rights + (not left)
        norms = case != "galore"
        if left:
            out["reduce_scatter"] += (rank + norms) * across * full
            if size == 2:
                out["all_gather"] += (rank + 2 * norms) * across * 2
            else:
                rows = {"apollo": 1, "apollo, tensor": 0, "galore": rank}
                out["all_gather"] += rows.get(case, rank + 1) * across * full
        out["all_reduce"] += {"galore": 0, "apollo, tensor": 24}.get(case, 8)
        if when != "between" and "apollo" not in case:
            out["gather"] += down * (n + (rank if left and when == "later" else 0)) * size
            out["broadcast"] += (1 + (m if left else n) * rank) * full
    out["all_reduce"] += 8 * (case == "clipped")
    collectives = 3 + (case == "clipped") - (case in ("galore", "apollo, tensor"))  # scatter, gather, limiter, norm
    refreshes = 2 * (lefts + rights) if when != "between" and "apollo" not in case else 0
    return out | {"calls": collectives + refreshes}


def check_bytes(mesh: DeviceMesh) -> None:
    for case in ("official", "clipped", "galore", "apollo", "apollo, tensor"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            if dtype == torch.bfloat16 and "apollo" in case:
                continue
            params, optimizer = base.make(case, dtype, mesh)
            for t in (0, 1, 2, 4):  # the fourth call refreshes; 3 is the step of the zero gradients
                base.give(params, base.gradients(t, dtype))
                got = counted(optimizer.step)
                when = "first" if t == 0 else "later" if t == 4 else "between"
                want = predicted(case, dtype, mesh.size(), when)
                assert got == want, (case, dtype, t, got, want)


# --- numbers --------------------------------------------------------------------------------------------------------


def exact(params: list[nn.Parameter], optimizer: Fira) -> Tensor:
    """All projected weights in one vector, with what rounding cut off where that is kept."""
    parts = []
    for p in params[: base.LOW]:
        kept = optimizer.state[p].get("remainder")
        parts.append(base.whole(p.detach()).double().flatten())
        if kept is not None:
            parts[-1] = parts[-1] + base.whole(kept).double().flatten()
    return torch.cat(parts)


def check_16_bits(mesh: DeviceMesh) -> None:
    """As far from float64 as one process is; and stochastic bits are those of one process."""
    for rounding in ("nearest", "compensated", "stochastic"):
        for case in ("official", "paper", "apollo, tensor"):
            options = {"weight_rounding": rounding, "state_dtype": "bfloat16", "backend": "eager"}
            out = []
            for dtype, where in ((torch.float64, None), (torch.bfloat16, None), (torch.bfloat16, mesh)):
                params, optimizer = base.make(case, dtype, where, **(options if dtype == torch.bfloat16 else {}))
                base.run(params, optimizer, dtype)
                out.append(exact(params, optimizer))
            assert optimizer.state[params[0]]["exp_avg"].dtype == torch.bfloat16
            assert ("remainder" in optimizer.state[params[0]]) == (rounding == "compensated")
            truth, alone, many = out
            errors = [float((x - truth).square().mean().sqrt()) for x in (alone, many)]
            assert errors[1] <= 1.1 * errors[0], (rounding, case, errors)
            if rounding == "stochastic":  # the same bits but where the sums' order decides
                assert float((alone == many).double().mean()) > 0.9, case


def check_loss_scaling(mesh: DeviceMesh, rank: int, world: int) -> None:
    """An inf that one rank alone has seen stops all; a scale is taken out; through GradScaler too."""
    params, optimizer = base.make("official", torch.float64, mesh)
    base.run(params, optimizer, torch.float64, range(2))
    before = [base.whole(p.detach()).clone() for p in params]
    moments = base.whole(optimizer.state[params[0]]["exp_avg"]).clone()
    base.give(params, base.gradients(2, torch.float64))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(float(rank == world - 1))
    optimizer.step()
    assert all(torch.equal(base.whole(p.detach()), old) for p, old in zip(params, before, strict=True))
    assert torch.equal(base.whole(optimizer.state[params[0]]["exp_avg"]), moments)
    assert float(optimizer.state[params[0]]["step"]) == 2

    def train(net: nn.Module, rank: int, world: int) -> list[Tensor]:
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**8), fira(net, max_grad_norm=0.1)
        for step in range(6):
            loss = loss_of(net, step, rank, world) * (math.inf if step == 2 and rank == 0 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 2.0**7  # the inf halved it
        return [base.whole(p.detach()) for p in net.parameters()]

    cut = model()
    fully_shard(cut[1], mesh=mesh)
    fully_shard(cut, mesh=mesh)
    for a, b in zip(train(cut, rank, world), train(model(), 0, 1), strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def check_buckets(mesh: DeviceMesh) -> None:
    """Left matrices that travel one by one, or a few together."""
    before = sharded.BUCKET
    for bucket in (1, 100):
        sharded.BUCKET = bucket
        params, optimizer = base.make("official", torch.float32, mesh)
        base.give(params, base.gradients(0, torch.float32))
        optimizer.step()
        base.give(params, base.gradients(1, torch.float32))
        lefts = sum(shape[0] < math.prod(shape[1:]) for shape in base.SHAPES[: base.LOW])
        calls = counted(optimizer.step)["calls"]
        assert calls == 2 * lefts + 1 if bucket == 1 else 3 < calls < 2 * lefts + 1, calls
        base.check("official", mesh)
    sharded.BUCKET = before


def check_hybrid() -> None:
    """Replicas of shards: HSDP's placements, and parameters that every rank has whole."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for case in ("official", "clipped", "apollo, tensor", "rotate, adaptive"):
        base.check(case, mesh, (Replicate(), Shard(0)))
    base.check("clipped", mesh, (Replicate(), Replicate()))


def check_ddp(rank: int, world: int) -> None:
    """Averaged gradients are the same bits on every rank, and so is all that follows: weights and state."""
    for dtype in (torch.float64, torch.float32):
        net = model(dtype)
        wrapped = DistributedDataParallel(net)
        optimizer = fira(net, max_grad_norm=0.1)
        for step in range(8):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, LAYERS[0][0], dtype=torch.float64, generator=generator).to(dtype)
            wrapped(x.chunk(world)[rank]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        mine = [p.detach() for p in net.parameters()]
        mine += [x for p in net.parameters() for x in optimizer.state[p].values()]
        for x in mine:
            everyone = [torch.empty_like(x) for _ in range(world)]
            dist.all_gather(everyone, x.contiguous())
            assert all(y.numpy().tobytes() == x.contiguous().numpy().tobytes() for y in everyone)  # NaN too
        if dtype == torch.float64:
            alone = model()
            reference = fira(alone, max_grad_norm=0.1)
            for step in range(8):
                loss_of(alone, step, 0, 1).backward()
                reference.step()
                reference.zero_grad()
            for a, b in zip(net.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# --- refusals -------------------------------------------------------------------------------------------------------


def message_of(call: Any, kind: type[Exception]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError("nothing was raised")


def check_refusals(mesh: DeviceMesh, rank: int, world: int) -> None:
    def one(placement: Any, grad_placement: Any = None, **keys: Any) -> Fira:
        p = nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, [placement]))
        p.grad = distribute_tensor(torch.randn(8, 8), mesh, [grad_placement or placement])
        return Fira([{"params": [p], **keys}])

    assert "Shard(1), tensor parallelism" in message_of(one(Shard(1), rank=2).step, ValueError)
    one(Shard(1)).step()  # Adam takes any
    assert "expected them" in message_of(one(Shard(0), Replicate(), rank=2).step, ValueError)

    offloaded = nn.Parameter(DTensor.from_local(torch.ones(4, 8, device="meta"), mesh, [Shard(0)], run_check=False))
    offloaded.grad = torch.ones_like(offloaded)
    optimizer = Fira([{"params": [offloaded], "rank": 2}])
    assert "CPU offload" in message_of(optimizer.step, ValueError)

    def fails(g: Tensor, previous: Any, rank: int, left: bool) -> Tensor:
        raise KeyError("no basis")

    def narrow(g: Tensor, previous: Any, rank: int, left: bool) -> Tensor:
        return g[:, :1].clone()

    for projector, own, text in ((fails, KeyError, "no basis"), (narrow, ValueError, "gave [8, 1]; expected [8, 2]")):
        optimizer = one(Shard(0), rank=2, projector=projector)
        if rank == 0:  # the owner of the only matrix
            assert text in message_of(optimizer.step, own)
        else:
            assert "failed on rank 0" in message_of(optimizer.step, RuntimeError)


def check_official_form(mesh: DeviceMesh) -> None:
    """Whole tensors, whatever the ranks have."""

    class Projector:
        def __init__(self, rank: int, **options: Any) -> None:
            self.options = options

    from pyelastic.optim._checkpoint import to_official_state_dict

    out = []
    for where in (None, mesh):
        params, optimizer = base.make("official", torch.float64, where)
        base.run(params, optimizer, torch.float64)
        out.append(to_official_state_dict(optimizer, Projector)["state"])
    for i, entry in out[0].items():
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(out[1][i][key], entry[key], rtol=1e-10, atol=1e-10)
            assert not isinstance(out[1][i][key], DTensor)


def main() -> None:
    rank, world = launched.begin()
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (world,))
    check_bytes(mesh)
    check_buckets(mesh)
    check_16_bits(mesh)
    check_loss_scaling(mesh, rank, world)
    check_refusals(mesh, rank, world)
    check_official_form(mesh)
    check_ddp(rank, world)
    if world == 4:
        check_hybrid()
    launched.end()


if __name__ == "__main__":
    main()
