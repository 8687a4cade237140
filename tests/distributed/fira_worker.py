"""Fira over sharded parameters against one process with the whole ones, on each rank of a torchrun launch."""

from __future__ import annotations

from typing import Any

import launched
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pyelastic.optim import Apollo, Fira, GaLore

# Wide, tall, square, of rows that no world divides, of fewer rows than ranks, a convolution, and dense ones.
SHAPES = [(6, 15), (17, 7), (8, 8), (3, 10), (2, 5), (1, 9), (10, 3), (5, 3, 2, 2), (7,), (1,), ()]
LOW = 8  # of them are projected, to rank 2
STEPS = 7
ROWS = (Shard(0),)  # as fully_shard cuts
# Class, options of the optimizer, of the projected group; "svd" where a basis is to be the gradient's alone.
CASES: dict[str, tuple[type[Fira], dict[str, Any], dict[str, Any]]] = {
    "official": (Fira, {}, {}),
    "official, alpha 1": (Fira, {"projector": "svd"}, {"alpha": 1.0}),
    "left": (Fira, {}, {"proj_type": "left"}),
    "right": (Fira, {}, {"proj_type": "right", "alpha": 1.0}),
    "reverse": (Fira, {"projector": "eigh"}, {"proj_type": "reverse_std"}),
    "paper": (Fira, {"mode": "paper", "projector": "randomized"}, {"alpha": 0.5}),
    "galore": (GaLore, {}, {}),
    "apollo": (Apollo, {}, {}),
    "apollo, tensor": (Apollo, {}, {"scale_type": "tensor"}),
    "no limiter, no correction": (Fira, {"gamma": None, "correct_bias": False}, {}),
    "clipped": (Fira, {"max_grad_norm": 0.5}, {}),
    "clipped, maximize, collapse": (Fira, {"max_grad_norm": 3.0, "maximize": True, "collapse": True}, {}),
    "rotate, adaptive": (Fira, {"moment_transfer": "rotate", "adaptive_gap": True}, {"update_proj_gap": 2}),
    "rotate, random": (Fira, {"moment_transfer": "rotate", "projector": "random"}, {"update_proj_gap": 2}),
    "reset, stagger": (Fira, {"moment_transfer": "reset", "stagger": True}, {}),
    "8 bit": (Fira, {"state_dtype": "8bit"}, {}),
    "callable": (Fira, {"projector": lambda g, previous, rank, left: skewed(g, rank, left)}, {}),
    "fused": (Fira, {"fused": True}, {}),
}  # fmt: skip


def skewed(g: Tensor, rank: int, left: bool) -> Tensor:
    """A basis that is not orthonormal."""
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    return (u[:, :rank] if left else vh[:rank].mT) * torch.linspace(0.5, 1.5, rank, dtype=g.dtype)


def gradients(step: int, dtype: torch.dtype) -> list[Tensor]:
    """The same for the same step; a low-rank part, and at one step nothing at all for the first two."""
    generator = torch.Generator().manual_seed(50 + step)
    out = []
    for i, shape in enumerate(SHAPES):
        g = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            g = 0.3 * g + torch.randn(shape[0], 2, generator=generator) @ torch.randn(2, shape[1], generator=generator)
        out.append(torch.zeros(shape, dtype=dtype) if step == 3 and i < 2 else g.to(dtype))
    return out


def make(case: str, dtype: torch.dtype, mesh: DeviceMesh | None, placements: Any = ROWS, **more: Any) -> Any:
    """Parameters, whole or cut over the mesh as ``fully_shard`` cuts them, and the case's optimizer."""
    kind, options, keys = CASES[case]
    generator = torch.Generator().manual_seed(3)
    params = []
    for shape in SHAPES:
        whole = torch.randn(shape, generator=generator).to(dtype)
        cut = mesh is not None and len(shape) > 0  # a 0-d parameter is plain: fully_shard refuses them
        params.append(nn.Parameter(distribute_tensor(whole, mesh, placements) if cut else whole))
    low = {"params": params[:LOW], "rank": 2, "update_proj_gap": 3, "alpha": 0.25, **keys}
    return params, kind([low, {"params": params[LOW:]}], **{"lr": 0.02, "weight_decay": 0.1, **options, **more})


def give(params: list[nn.Parameter], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g.clone()


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x.detach()


def run(params: list[nn.Parameter], optimizer: Fira, dtype: torch.dtype, steps: range = range(STEPS)) -> list[Tensor]:
    for t in steps:
        give(params, gradients(t, dtype))
        optimizer.step()
    return [whole(p.detach()) for p in params]


def nothing_left(p: Tensor, state: dict[str, Any], case: str) -> bool:
    """The subspace is everything and a_r is 1: S is zero, and its norm the rounding of one way or the other."""
    across = p.shape[0] if bool(state["left"]) else p.shape[1:].numel()
    return across <= 2 and ("alpha 1" in case or case in ("right", "paper"))


def check(case: str, mesh: DeviceMesh, placements: Any = ROWS) -> None:
    """float64: within 1e-10 of one process, weights and state. float32: as far from it as one process is."""
    want, reference = make(case, torch.float64, None, backend="eager")
    truth = run(want, reference, torch.float64)
    params, optimizer = make(case, torch.float64, mesh, placements)
    got = run(params, optimizer, torch.float64)
    for i, (a, b) in enumerate(zip(got, truth, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, i=i: f"{case}, {i}: {m}")
        assert not torch.equal(b, make(case, torch.float64, None)[0][i])
    for i, (p, q) in enumerate(zip(params, want, strict=True)):
        assert optimizer.state[p].keys() == reference.state[q].keys()
        for key, value in reference.state[q].items():
            mine = whole(optimizer.state[p][key])
            if key == "scaling_grad" and nothing_left(p, optimizer.state[p], case):
                continue
            assert mine.shape == value.shape and mine.dtype == value.dtype, (case, i, key)
            where = f"{case}, {i}, {key}"
            torch.testing.assert_close(
                mine, value, rtol=1e-10, atol=1e-10, equal_nan=True, msg=lambda m, where=where: f"{where}: {m}"
            )
    if case == "8 bit":
        return  # a code that falls to the other side of a rounding is a difference of its own size
    errors = []
    for cut in (None, mesh):
        short = run(*make(case, torch.float32, cut, placements), torch.float32)
        errors.append([float((a.double() - b).abs().max()) for a, b in zip(short, truth, strict=True)])
    for i, (alone, sharded) in enumerate(zip(*errors, strict=True)):
        size = float(truth[i].abs().max())
        assert sharded <= 4 * alone + 2**-22 * size, (case, i, alone, sharded)


def main() -> None:
    _, world = launched.begin()
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (world,))
    for case in CASES:
        check(case, mesh)
    launched.end()


if __name__ == "__main__":
    main()
