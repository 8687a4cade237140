"""A character-level language model with causal norm-aware linear attention, against softmax attention of equal size.

    python examples/train_character_lm.py [--steps N]

Data: the help texts of Python's own documentation, which ship with it, as bytes; the last tenth is held out. After
training the model writes a line: token by token, from a state whose size does not grow with the text.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tiny_llama import BATCH, read_text
from torch import Tensor, nn

from pyelastic.nn import CausalNormAwareLinearAttention
from pyelastic.nn.norm_linear_attention import rotate

WIDTH, LAYERS, HEADS, CONTEXT = 128, 2, 4, 256


class SoftmaxLayer(nn.Module):
    """The same projections and gate around softmax attention."""

    def __init__(self) -> None:
        super().__init__()
        self.own = CausalNormAwareLinearAttention(WIDTH, HEADS, max_positions=CONTEXT, learned_power=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        heads, _ = self.own._arguments(x)
        q, k, v = (h.transpose(1, 2) for h in heads[:3])
        tables = (self.own.sin[: x.shape[1]], self.own.cos[: x.shape[1]])
        o = F.scaled_dot_product_attention(rotate(q, *tables), rotate(k, *tables), v, is_causal=True)
        return self.own._finish(o.transpose(1, 2), heads), None


class Model(nn.Module):
    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, 256, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2 * LAYERS + 1))
        make = lambda: CausalNormAwareLinearAttention(WIDTH, HEADS) if linear else SoftmaxLayer()  # noqa: E731
        self.mixers = nn.ModuleList(make() for _ in range(LAYERS))
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.downs = nn.ModuleList(nn.Linear(3 * WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, tokens: Tensor, states: list[Any] | None = None) -> Tensor:
        """Logits; with ``states`` the tokens follow those of the states, which are changed in place."""
        x = self.embedding(tokens)
        for i, mixer in enumerate(self.mixers):
            y = self.norms[2 * i](x)
            x = x + (mixer(y)[0] if states is None else mixer.step(y, states[i]))
            x = x + self.downs[i](F.gelu(self.ups[i](self.norms[2 * i + 1](x))))
        return self.head(self.norms[-1](x))


def bits(model: Model, tokens: Tensor) -> Tensor:
    """Bits per character."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()) / 0.6931471805599453


def train(linear: bool, steps: int, texts: tuple[Tensor, Tensor], tick: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Model(linear)
    held_out = texts[1][: len(texts[1]) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)[:64]
    with torch.no_grad():
        before = float(bits(model, held_out))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator, begin = torch.Generator().manual_seed(0), time.perf_counter()
    for _ in range(steps):
        start = torch.randint(0, len(texts[0]) - CONTEXT - 1, (BATCH, 1), generator=generator)
        loss = bits(model, texts[0][start + torch.arange(CONTEXT + 1)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tick(float(loss.detach()))
    seconds = (time.perf_counter() - begin) / steps
    with torch.no_grad():
        after = float(bits(model, held_out))
    size = sum(p.numel() for p in model.parameters())
    return {"model": model, "before": before, "after": after, "parameters": size, "ms": 1e3 * seconds}


@torch.no_grad()
def write(model: Model, prompt: str, length: int) -> str:
    """The likeliest next characters, one at a time."""
    states = [mixer.empty_state(1) for mixer in model.mixers]
    text = list(prompt.encode())
    logits = model(torch.tensor([text]), states)
    for _ in range(length):
        text.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([text[-1:]]), states)
    return bytes(text).decode(errors="replace")


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args(arguments).steps
    texts, console, results = read_text(), Console(), {}
    with Progress(console=console) as progress:
        for name, linear in (("norm-aware linear", True), ("softmax", False)):
            task = progress.add_task(name, total=steps)

            def tick(loss: float, task: Any = task, name: str = name) -> None:
                progress.update(task, advance=1, description=f"{name}: {loss:.3f} bits")

            results[name] = train(linear, steps, texts, tick)
    title = f"held-out bits per character, {steps} steps of {BATCH} x {CONTEXT}"
    table = Table("attention", "parameters", "before", "after", "ms a step", title=title)
    for name, run in results.items():
        row = (f"{run['parameters']:,}", f"{run['before']:.3f}", f"{run['after']:.3f}", f"{run['ms']:.0f}")
        table.add_row(name, *row)
    console.print(table)
    console.print(write(results["norm-aware linear"]["model"], "The ", 60), markup=False)
    return results


if __name__ == "__main__":
    main()
