"""Trains a model under fully_shard with Fira, saves it and goes on; or loads it on other numbers of ranks and goes on.

Arguments: "train", "killed" (after its checkpoint), "resume", or "plain" (in one process, without fully_shard), and
folders: of what training gave, and of the checkpoint.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
from pathlib import Path
from typing import Any

import launched
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pyelastic.optim import Apollo, Fira, divide_params

DIM, BATCH, STEPS = 6, 8, 5
# Bases that are warm, and found from the gradient alone, in 8 bits, from seeds; a step with a refresh follows the load.
CASES: dict[str, Any] = {
    "subspace": (Fira, {"max_grad_norm": 1.0}, {}),
    "alpha 1, adaptive": (Fira, {"adaptive_gap": True, "moment_transfer": "rotate"}, {"alpha": 1.0}),
    "8 bit": (Fira, {"state_dtype": "8bit"}, {"proj_type": "reverse_std"}),
    "apollo": (Apollo, {}, {}),
}


def build(case: str, sharded: bool) -> tuple[nn.Module, Fira]:
    """Layers of more outputs than inputs and the other way; the last one's weight is a row, on one rank alone."""
    kind, options, keys = CASES[case]
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(DIM, 11), nn.Tanh(), nn.Linear(11, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model[2], mesh=mesh)
        fully_shard(model, mesh=mesh)
    groups = divide_params(model, rank=2, update_proj_gap=3, **{"alpha": 0.25, **keys})
    return model, kind(groups, lr=0.02, weight_decay=0.05, **options)


def train(model: nn.Module, optimizer: Fira, steps: range, rank: int, world: int) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(BATCH, n, dtype=torch.float64, generator=generator).chunk(world)[rank] for n in (DIM, 1))
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def close(got: list[Tensor], want: list[Tensor], what: str) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-10, atol=1e-10, msg=lambda m: f"{what}: {m}")


def check(case: str, mode: str, folder: Path, checkpoints: Path, rank: int, world: int) -> None:
    name = case.replace(" ", "_").replace(",", "")
    model, optimizer = build(case, sharded=mode != "plain")
    if mode in ("train", "killed"):
        train(model, optimizer, range(STEPS), rank, world)
        saved, state = get_state_dict(model, optimizer)
        dcp.save({"model": saved, "optimizer": state}, checkpoint_id=checkpoints / name)
    if mode == "killed":
        train(model, optimizer, range(STEPS, STEPS + 2), rank, world)
    elif mode == "train":
        train(model, optimizer, range(STEPS, 2 * STEPS), rank, world)
        mine = weights(model)
        alone, reference = build(case, sharded=False)
        train(alone, reference, range(2 * STEPS), 0, 1)
        if case != "8 bit":  # whose codes turn differences of 1e-16 into ones of their own size
            close(mine, weights(alone), f"{case}, one process")
        if rank == 0:
            torch.save(mine, folder / f"{name}.pt")
    else:
        blank, state = get_state_dict(model, optimizer)  # of a step with no gradient, which fills the state
        dcp.load({"model": blank, "optimizer": state}, checkpoint_id=checkpoints / name)
        set_state_dict(model, optimizer, model_state_dict=blank, optim_state_dict=state)
        train(model, optimizer, range(STEPS, 2 * STEPS), rank, world)
        close(weights(model), torch.load(folder / f"{name}.pt"), f"{case}, {mode} on {world}")


def check_whole_state(case: str, rank: int, world: int) -> None:
    """A whole state, as ``full_state_dict`` gives it, is cut again by ``set_state_dict`` and ``load_state_dict``.

    And flattened states, as torchtitan saves them.
    """
    model, optimizer = build(case, sharded=True)
    train(model, optimizer, range(STEPS), rank, world)
    options = StateDictOptions(full_state_dict=True)
    saved, state = get_state_dict(model, optimizer, options=options)
    assert not any(isinstance(x, DTensor) for entry in state["state"].values() for x in entry.values())
    other, second = build(case, sharded=True)
    set_state_dict(other, second, model_state_dict=saved, optim_state_dict=state, options=options)
    third_model, third = build(case, sharded=True)
    third_model.load_state_dict(model.state_dict())
    plain = optimizer.state_dict()
    plain["state"] = {
        i: {key: x.full_tensor() if isinstance(x, DTensor) else x for key, x in entry.items()}
        for i, entry in plain["state"].items()
    }
    third.load_state_dict(plain)
    fourth_model, fourth = build(case, sharded=True)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    flat = get_optimizer_state_dict(model, optimizer, options=options)
    assert all(name.startswith(("state.", "param_groups.")) for name in flat)
    train(fourth_model, fourth, range(1), rank, world)  # a state to replace
    fourth_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(fourth_model, fourth, copy.deepcopy(flat), options=options)
    for m, o in ((model, optimizer), (other, second), (third_model, third), (fourth_model, fourth)):
        train(m, o, range(STEPS, 2 * STEPS), rank, world)
    close(weights(other), weights(model), f"{case}, full state")
    close(weights(third_model), weights(model), f"{case}, plain state")
    close(weights(fourth_model), weights(model), f"{case}, flattened state")


def main() -> None:
    rank, world = launched.begin()
    torch.set_num_threads(1)
    mode, folder, checkpoints = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    for case in CASES:
        check(case, mode, folder, checkpoints, rank, world)
        if mode == "train":
            check_whole_state(case, rank, world)
    if mode == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    launched.end()


if __name__ == "__main__":
    main()
