"""A small NaLaFormer on scikit-learn's digits, against the same model with softmax attention in every stage.

    python examples/train_nalaformer.py [--epochs N] [--seeds N]

Data: 1,797 images of digits, 8 x 8, that ship with scikit-learn, enlarged to 64 x 64; a fifth is held out. Both models
have the same parameters: attention has none of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from pyelastic.nn import NaLaFormer

MODELS = {"norm-aware linear, stages 1-2": (True, True, False, False), "softmax, all stages": (False,) * 4}
SIZE, BATCH = 64, 64


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 1, 64, 64] and labels, for training and held out."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=SIZE, mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(data.target)[order]
    cut = len(images) * 4 // 5
    return images[:cut], labels[:cut], images[cut:], labels[cut:]


def accuracy(model: NaLaFormer, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in images.split(128)]) == labels
    model.train()
    return float(right.float().mean())


def train(linear: tuple[bool, ...], epochs: int, seed: int, data: tuple[Tensor, ...], tick: object) -> dict[str, float]:
    """Accuracy on what is held out, before and after, parameters, and seconds an epoch."""
    images, labels, held_out, held_labels = data
    torch.manual_seed(seed)
    model = NaLaFormer(
        num_classes=10,
        in_chans=1,
        widths=(32, 32, 64, 64),
        depths=(1, 1, 1, 1),
        heads=(1, 1, 2, 2),
        mlp_ratio=2.0,
        projection=64,
        drop_path_rate=0.0,
        linear=linear,
    )
    found = {"before": accuracy(model, held_out, held_labels), "parameters": sum(p.numel() for p in model.parameters())}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches)
    begin = time.perf_counter()
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(BATCH)[:batches]:
            loss = F.cross_entropy(model(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            tick(float(loss.detach()))  # type: ignore[operator]
    found["seconds"] = (time.perf_counter() - begin) / epochs
    return found | {"after": accuracy(model, held_out, held_labels)}


def main(arguments: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args(arguments)
    data, console = digits(), Console()
    results: dict[str, list[dict[str, float]]] = {}
    total = options.epochs * (len(data[0]) // BATCH)
    with Progress(console=console) as progress:
        for name, linear in MODELS.items():
            for seed in range(options.seeds):
                task = progress.add_task(f"{name}, seed {seed}", total=total)

                def tick(loss: float, task: object = task, text: str = f"{name}, seed {seed}") -> None:
                    progress.update(task, advance=1, description=f"{text}: loss {loss:.3f}")  # type: ignore[arg-type]

                results.setdefault(name, []).append(train(linear, options.epochs, seed, data, tick))
    table = Table("attention", "parameters", "accuracy before", "after", "seconds an epoch", title="held-out digits")
    for name, runs in results.items():
        mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        row = (f"{mean['parameters']:,.0f}", f"{mean['before']:.3f}", f"{mean['after']:.3f}", f"{mean['seconds']:.1f}")
        table.add_row(name, *row)
    console.print(table)
    return results


if __name__ == "__main__":
    main()
