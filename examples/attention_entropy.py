"""How spread attention is against the norm of the query: softmax, plain linear, and norm-aware linear attention.

    python examples/attention_entropy.py [--out FILE]

The claim of NaLaFormer (Meng et al., arXiv 2506.21137): softmax sharpens as the query grows, linear attention cannot,
since its normaliser cancels the norm, and a norm-dependent power restores it. Weights are read out of the op itself:
with the identity for values, its output is the weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import pyelastic

TOKENS, DIM, QUERIES = 128, 64, 256


def entropies(norm: float, generator: torch.Generator) -> dict[str, float]:
    """Mean entropy of the weights in nats, for queries of one norm; ln 128 = 4.85 is uniform."""
    make = lambda n: torch.randn(1, n, 1, DIM, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k = F.normalize(make(QUERIES), dim=-1) * norm, make(TOKENS)
    identity = torch.eye(TOKENS, dtype=torch.float64)[None, :, None]
    aware = pyelastic.norm_linear_attention(q, k, identity, eps=0.0)
    scaled = pyelastic.norm_linear_attention(q, k, identity, eps=0.0, norm_scale=DIM**-0.5)
    scores = (q[0, :, 0] @ k[0, :, 0].T) / DIM**0.5
    plain = F.relu(q[0, :, 0]) @ F.relu(k[0, :, 0]).T
    assert isinstance(aware, Tensor) and isinstance(scaled, Tensor)
    weights = {
        "softmax": scores.softmax(-1),
        "linear (ReLU)": plain / plain.sum(-1, keepdim=True),
        "norm-aware": aware[0, :, 0],
        "norm-aware, norm_scale 1/8": scaled[0, :, 0],
    }
    return {name: float(torch.special.entr(w).sum(-1).mean()) for name, w in weights.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("attention_entropy.svg"))
    out = parser.parse_args().out
    norms = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    generator = torch.Generator().manual_seed(0)
    rows = {norm: entropies(norm, generator) for norm in norms}
    names = list(rows[norms[0]])
    table = Table("query norm", *names, title=f"entropy of the attention weights, {TOKENS} tokens, d = {DIM}")
    for norm, row in rows.items():
        table.add_row(f"{norm:g}", *(f"{row[n]:.3f}" for n in names))
    Console().print(table)
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5))
    for name in names:
        axes.semilogx(norms, [rows[n][name] for n in norms], marker="o", label=name)
    axes.set_xlabel("norm of the query")
    axes.set_ylabel("entropy of the weights, nats")
    axes.legend()
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    print(f"plot: {out}")


if __name__ == "__main__":
    main()
