"""Trains a class-sharded head, saves it and goes on; or loads it on another number of ranks, and goes on alike.

Arguments: "train" or "resume", and a folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import launched
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import pyelastic
from pyelastic.distributed import ClassShardedMarginSoftmax

CLASSES, DIM, BATCH, STEPS = 11, 6, 8, 3


def batch(step: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    e = torch.randn(BATCH, DIM, dtype=torch.float64, generator=generator)
    return e.chunk(world)[rank], torch.randint(0, CLASSES, (BATCH,), generator=generator).chunk(world)[rank]


def main() -> None:
    rank, world = launched.begin()
    mode, folder = sys.argv[1], Path(sys.argv[2])
    torch.manual_seed(100 * world + rank)
    head = ClassShardedMarginSoftmax(DIM, CLASSES, pyelastic.margins.ElasticArcFace(), seed=5).double()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)

    def train(first: int) -> list[float]:
        losses = []
        for step in range(first, first + STEPS):
            loss = head(*batch(step, rank, world))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    if mode == "train":
        before = train(0)
        model, state = get_state_dict(head, optimizer)
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder / "checkpoint")
        after, weight = train(STEPS), head.weight.full_tensor()
        assert after[-1] < before[0]
        if rank == 0:
            (folder / "losses.json").write_text(json.dumps(after))
            torch.save(weight, folder / "weight.pt")
    else:
        model, state = get_state_dict(head, optimizer)
        dcp.load({"model": model, "optimizer": state}, checkpoint_id=folder / "checkpoint")
        set_state_dict(head, optimizer, model_state_dict=model, optim_state_dict=state)
        after = train(STEPS)
        want = torch.tensor(json.loads((folder / "losses.json").read_text()), dtype=torch.float64)
        torch.testing.assert_close(torch.tensor(after, dtype=torch.float64), want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(head.weight.full_tensor(), torch.load(folder / "weight.pt"), rtol=1e-10, atol=1e-10)
        plain = pyelastic.nn.MarginSoftmax(DIM, CLASSES, pyelastic.margins.ArcFace()).double()
        loaded = {"model": plain.state_dict()}
        dcp.load(loaded, checkpoint_id=folder / "checkpoint")  # the whole weight, in a head of one process
        assert (loaded["model"]["weight"] != 0).all() and not loaded["model"]["weight"].isnan().any()
    launched.end()


if __name__ == "__main__":
    main()
