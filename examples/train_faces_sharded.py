"""Train ElasticArcFace with its classes sharded over processes (Partial FC), on the data of train_faces.py.

    torchrun --nproc-per-node 2 examples/train_faces_sharded.py [--epochs N]

Every process trains its part of each batch; DistributedDataParallel averages the backbone's gradients, and each process
holds some identities' rows of the head alone. The metric is train_faces.py's verification of images held out.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from train_faces import BATCH, DIM, KNOWN, data, network, verification

import pyelastic
from pyelastic.distributed import ClassShardedMarginSoftmax


def backbone(device: torch.device) -> nn.Module:
    """The network with batch norm's statistics of all ranks where that exists: sync-BN is for GPUs."""
    torch.manual_seed(0)
    model = network().to(device)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if device.type == "cuda" else model


def main(arguments: list[str] | None = None) -> list[float]:
    """Verification accuracy before training and after each epoch; the same on every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args(arguments)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    images, labels = (t.to(device) for t in data())
    known = labels < KNOWN
    held_out = known & (torch.rand(len(labels), generator=torch.Generator().manual_seed(0)) < 0.25).to(device)
    fit = (known & ~held_out).nonzero()[:, 0]

    embed = DistributedDataParallel(backbone(device))
    torch.manual_seed(rank)  # each rank draws its own classes' rows
    margin = pyelastic.margins.ElasticArcFace(0.3)
    head = ClassShardedMarginSoftmax(DIM, KNOWN, margin, s=16.0, ddp_world_compensation=True)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=2e-3, weight_decay=5e-4) for m in (embed, head)]

    def verify() -> float:
        accuracy = verification(embed.module, images[held_out], labels[held_out], torch.Generator().manual_seed(0))
        return float(accuracy)

    accuracies, order = [verify()], torch.Generator().manual_seed(0)  # the same batches on all ranks
    console = Console(quiet=rank > 0)
    with Progress(console=console, disable=rank > 0) as progress:
        task = progress.add_task("train", total=options.epochs)
        for _ in range(options.epochs):
            embed.train()
            for rows in fit[torch.randperm(len(fit), generator=order).to(device)].split(BATCH):
                mine = rows.tensor_split(world)[rank]
                loss = head(embed(images[mine]), labels[mine])
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
            accuracies.append(verify())
            progress.update(task, advance=1, description=f"loss {loss.item():.3f}, accuracy {accuracies[-1]:.3f}")
    table = Table("rank", "identities held")
    for other in range(world):
        each = -(-KNOWN // world)
        table.add_row(str(other), str(max(0, min(each, KNOWN - other * each))))
    console.print(table)
    first, last = accuracies[0], accuracies[-1]
    console.print(f"verification accuracy of held-out images: {first:.3f} untrained, {last:.3f} trained")
    dist.destroy_process_group()
    return accuracies


if __name__ == "__main__":
    main()
