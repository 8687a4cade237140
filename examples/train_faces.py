"""Train an embedding with ElasticArcFace and with plain softmax, and compare them on classes neither has seen.

    python examples/train_faces.py [--epochs N] [--seeds N]

Data: scikit-learn's handwritten digits (1797 real 8 x 8 images, shipped with the package), standing in for faces: the
digits 0-6 are the identities to train on, 7-9 are strangers. As in face verification, pairs of images are judged
"same" or "different" by the cosine of their embeddings; the threshold is chosen on one half of the pairs and the
accuracy counted on the other. Two sets of pairs: strangers, and images of known identities held out from training.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyelastic

KNOWN, DIM, BATCH, PAIRS = 7, 32, 128, 8000


def data() -> tuple[Tensor, Tensor]:
    """Images [N, 1, 8, 8] in [0, 1] and labels [N]."""
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 16, DIM), nn.BatchNorm1d(DIM),
    )  # fmt: skip


class Softmax(nn.Module):
    """The usual classifier: a linear layer and cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, KNOWN)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(embeddings), labels)


def verification(embed: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> float:
    """Accuracy of same/different on balanced random pairs, threshold from one half, counted on the other."""
    embed.eval()
    with torch.no_grad():
        e = F.normalize(embed(images))
    first, second = torch.triu_indices(len(e), len(e), 1)
    same = labels[first] == labels[second]
    chosen = []
    for group in (same.nonzero()[:, 0], (~same).nonzero()[:, 0]):
        chosen.append(group[torch.randperm(len(group), generator=generator)[: PAIRS // 2]])
    pairs = torch.cat(chosen)
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]
    cosine, truth = (e[first[pairs]] * e[second[pairs]]).sum(1), same[pairs]
    half = len(pairs) // 2
    thresholds = torch.linspace(-1, 1, 401)
    right = (cosine[:half, None] > thresholds) == truth[:half, None]
    best = thresholds[right.float().mean(0).argmax()]
    return float(((cosine[half:] > best) == truth[half:]).float().mean())


def train(head: nn.Module, epochs: int, seed: int, progress: Progress, name: str) -> list[tuple[float, float]]:
    """Verification accuracy (strangers, known) before training and after each epoch."""
    torch.manual_seed(seed)
    images, labels = data()
    known = labels < KNOWN
    held_out = known & (torch.rand(len(labels), generator=torch.Generator().manual_seed(0)) < 0.25)
    fit = (known & ~held_out).nonzero()[:, 0]
    embed = network()
    optimizer = torch.optim.AdamW([*embed.parameters(), *head.parameters()], lr=2e-3, weight_decay=5e-4)

    def verify() -> tuple[float, float]:
        pairs = torch.Generator().manual_seed(0)
        return tuple(verification(embed, images[part], labels[part], pairs) for part in (~known, held_out))

    accuracy = [verify()]
    task = progress.add_task(name, total=epochs)
    for _ in range(epochs):
        embed.train()
        for rows in fit[torch.randperm(len(fit))].split(BATCH):
            loss = head(embed(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy.append(verify())
        progress.update(task, advance=1, description=f"{name}: loss {loss.item():.3f}, accuracy {accuracy[-1][0]:.3f}")
    return accuracy


def main(arguments: list[str] | None = None) -> dict[str, list[list[tuple[float, float]]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each loss, from seed 0 on")
    options = parser.parse_args(arguments)
    console = Console()
    # A scale of 16 is enough for seven classes; 64 is for tens of thousands.
    heads = {"softmax": Softmax, "ElasticArcFace": lambda: pyelastic.nn.ElasticArcFace(DIM, KNOWN, s=16.0, m=0.3)}
    results: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in heads}
    with Progress(console=console) as progress:
        for name, make in heads.items():
            for seed in range(options.seeds):
                torch.manual_seed(seed)
                results[name].append(train(make(), options.epochs, seed, progress, f"{name}, seed {seed}"))
    table = Table("loss", "pairs of", "untrained", f"after {options.epochs} epochs", "each seed")
    table.title = "verification accuracy"
    for name, runs in results.items():
        for which, pairs in enumerate(("strangers", "known")):
            first, last = ([run[at][which] for run in runs] for at in (0, -1))
            each = " ".join(f"{x:.3f}" for x in last)
            table.add_row(name, pairs, f"{sum(first) / len(first):.3f}", f"{sum(last) / len(last):.3f}", each)
    console.print(table)
    return results


if __name__ == "__main__":
    main()
