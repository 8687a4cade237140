"""Train a small late-interaction retriever on Python's own documentation, with each kind of projection head.

    python examples/train_retrieval.py [--steps N] [--seeds N]

Data: docstrings in the source files of the standard library and of torch. The first paragraph is the query, the rest
the document it has to find; 500 pairs are held out. Tokens are words, hashed into a table of embeddings; an encoder of
one transformer layer gives each a state, a head projects the states (Simple Projection Variants, arXiv 2510.12327),
MaxSim scores them, and every other document of a batch is a negative. Nothing is pretrained.
"""

from __future__ import annotations

import argparse
import inspect
import re
import statistics
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from pyelastic.nn import LateInteraction, ProjectionHead
from pyelastic.nn.projection import PRESETS

WORDS, DIM, OUT = 1 << 14, 128, 64  # size of the hashed vocabulary, of a token's state and of its projection
QUERY, DOCUMENT, BATCH, HELD_OUT = 16, 64, 64, 500
HEADS = {
    "linear": {"kind": "linear"},
    "GLU, upscaled": {"kind": "glu", "layers": 2},
    "FFN, upscaled, residual": PRESETS["paper"],
    "FFN, upscaled, residual, GELU": {**PRESETS["paper"], "activation": "gelu"},
}
Metrics = tuple[float, float]  # MRR, nDCG@10


def docstrings() -> Iterator[str]:
    """What opens modules, classes and functions in the source files of the standard library and of torch."""
    opening = re.compile(r'(?:\A|:[ \t]*\n)\s*[rR]?"""(.+?)"""', re.DOTALL)
    for root in (Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent):
        for path in sorted(root.rglob("*.py")):
            if not {"site-packages", "test", "tests", "testing", "idlelib"} & set(path.relative_to(root).parts):
                yield from map(inspect.cleandoc, opening.findall(path.read_text(encoding="utf-8", errors="ignore")))


def tokens(text: str, length: int) -> tuple[Tensor, Tensor]:
    """Hashed words [length], 0 behind the end, and which of them are words."""
    words = re.findall(r"[a-z]+|\d+", re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower())[:length]
    ids = torch.zeros(length, dtype=torch.int64)
    ids[: len(words)] = torch.tensor([1 + zlib.crc32(word.encode()) % (WORDS - 1) for word in words], dtype=torch.int64)
    return ids, ids > 0


def pairs() -> tuple[Tensor, Tensor]:
    """Queries [N, QUERY] and documents [N, DOCUMENT], each once, shuffled."""
    found: dict[str, str] = {}
    for text in docstrings():
        query, _, document = text.partition("\n\n")
        query = " ".join(query.split())
        if len(query.split()) >= 3 and len(document.split()) >= 12:
            found.setdefault(query, document)
    queries = torch.stack([tokens(query, QUERY)[0] for query in found])
    documents = torch.stack([tokens(document, DOCUMENT)[0] for document in found.values()])
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(0))
    return queries[order], documents[order]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, DIM, padding_idx=0)
        self.places = nn.Parameter(0.02 * torch.randn(DOCUMENT, DIM))
        self.layer = nn.TransformerEncoderLayer(DIM, 4, 2 * DIM, dropout=0.1, batch_first=True, norm_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        """Word ids [N, L] -> states [N, L, DIM]."""
        return self.layer(self.words(ids) + self.places[: ids.shape[1]], src_key_padding_mask=ids == 0)


@torch.no_grad()
def evaluate(encoder: Encoder, model: LateInteraction, queries: Tensor, documents: Tensor) -> Metrics:
    """Each query against all documents; only its own counts as found."""
    encoder.eval()
    states = encoder(queries), encoder(documents)
    scores = model.score(*states, query_mask=queries > 0, document_mask=documents > 0)
    rank = (scores > scores.diagonal()[:, None]).sum(1) + 1.0
    gain = torch.where(rank <= 10, 1 / torch.log2(rank + 1), 0.0)
    encoder.train()
    return float((1 / rank).mean()), float(gain.mean())


def train(name: str, steps: int, seed: int, data: tuple[Tensor, Tensor], progress: Progress) -> list[Metrics]:
    """Metrics on the held-out pairs before and after."""
    torch.manual_seed(seed)
    encoder, model = Encoder(), LateInteraction(ProjectionHead(DIM, OUT, **HEADS[name]), temperature=1.0)
    held_out, fit = [x[:HELD_OUT] for x in data], [x[HELD_OUT:] for x in data]
    optimizer = torch.optim.AdamW([*encoder.parameters(), *model.parameters()], lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps + 1)
    metrics = [evaluate(encoder, model, *held_out)]
    task = progress.add_task(f"{name}, seed {seed}", total=steps)
    for _ in range(steps):
        rows = torch.randint(len(fit[0]), (BATCH,))
        q, d = fit[0][rows], fit[1][rows]
        loss = model(encoder(q), encoder(d), query_mask=q > 0, document_mask=d > 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(task, advance=1, description=f"{name}, seed {seed}: loss {loss.item():.3f}")
    return [*metrics, evaluate(encoder, model, *held_out)]


def main(arguments: list[str] | None = None) -> dict[str, list[list[Metrics]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each head, from seed 0 on")
    options = parser.parse_args(arguments)
    console, data = Console(), pairs()
    with Progress(console=console) as progress:
        runs = {
            name: [train(name, options.steps, seed, data, progress) for seed in range(options.seeds)] for name in HEADS
        }
    table = Table("head", "metric", "untrained", f"after {options.steps} steps", "each seed")
    table.title = f"retrieval of {HELD_OUT} held-out documents; trained on {len(data[0]) - HELD_OUT} pairs"
    for name, results in runs.items():
        for which, metric in enumerate(("MRR", "nDCG@10")):
            first, last = ([run[at][which] for run in results] for at in (0, -1))
            each = " ".join(f"{x:.3f}" for x in last)
            table.add_row(name, metric, f"{statistics.mean(first):.3f}", f"{statistics.mean(last):.3f}", each)
    console.print(table)
    return runs


if __name__ == "__main__":
    main()
