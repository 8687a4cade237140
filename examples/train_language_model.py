"""Train a small LLaMA-shaped language model with AdamW, GaLore and Fira, and compare loss, memory and time.

    python examples/train_language_model.py [--steps N] [--minutes M] [--out DIR]

Data: the help texts of Python's own documentation that ship with it (pydoc_data), as bytes; the last tenth is held out.
All runs see the same batches. At the end Fira goes on from its last weights and meets one gradient 100 times too large,
with the norm-growth limiter and without.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tiny_llama import Model, batches, loss_of, read_text
from torch import Tensor, nn

from pyelastic.optim import Fira, GaLore, divide_params

RANK, GAP = 32, 100


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(x.nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor))


def optimizers() -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    def groups(model: nn.Module) -> Any:
        return divide_params(model, ["blocks"], rank=RANK, update_proj_gap=GAP, alpha=0.25)

    return {
        "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0),
        "GaLore": lambda model: GaLore(groups(model), lr=1e-2, projector="svd"),
        "Fira, svd": lambda model: Fira(groups(model), lr=1e-2, projector="svd"),
        "Fira, subspace": lambda model: Fira(groups(model), lr=1e-2),
    }


def train(make: Any, steps: int, seconds: float, texts: tuple[Tensor, Tensor], tick: Callable[..., None]) -> Any:
    """Loss of each step, held-out loss, the optimizer's bytes and seconds a step, and the trained pair."""
    torch.manual_seed(0)
    model, draw, losses, spent = Model(), batches(texts[0], 0), [], 0.0
    optimizer, begin = make(model), time.perf_counter()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 50))
    while len(losses) < steps and time.perf_counter() - begin < seconds:
        loss = loss_of(model, draw())
        optimizer.zero_grad()
        loss.backward()
        before = time.perf_counter()
        optimizer.step()
        spent += time.perf_counter() - before
        schedule.step()
        losses.append(float(loss.detach()))
        tick(len(losses), losses[-1])
    held_out = batches(texts[1], 1)
    with torch.no_grad():
        final = sum(float(loss_of(model, held_out())) for _ in range(20)) / 20
    return losses, final, state_bytes(optimizer), spent / max(len(losses), 1), (model, optimizer)


def spike(model: nn.Module, optimizer: Any, gamma: float | None, text: Tensor) -> list[float]:
    """30 steps, the gradient of the 6th multiplied by 100."""
    model = copy.deepcopy(model)
    again = Fira(divide_params(model, ["blocks"], rank=RANK, update_proj_gap=GAP, alpha=0.25), lr=1e-2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    draw, losses = batches(text, 2), []
    for t in range(30):
        again.param_groups[0]["gamma"] = gamma
        loss = loss_of(model, draw())
        again.zero_grad()
        loss.backward()
        for p in model.parameters():
            p.grad *= 100 if t == 5 else 1
        again.step()
        losses.append(float(loss.detach()))
    return losses


def plot(results: dict[str, Any], spikes: dict[Any, list[float]], out: Path) -> None:
    from matplotlib import pyplot

    figure, (curves, after) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name, (losses, *_) in results.items():
        window = max(1, len(losses) // 50)
        smooth = torch.tensor(losses).unfold(0, window, 1).mean(1)
        curves.plot(range(window - 1, len(losses)), smooth, label=name)
    for gamma, losses in spikes.items():
        after.plot(losses, label=f"gamma {gamma}")
    curves.set(xlabel="step", ylabel="training loss", title="running mean")
    after.set(xlabel="step", title="the gradient of step 5 times 100")
    for axes in (curves, after):
        axes.legend()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "loss.png", dpi=110)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training in all; it may stop early")
    parser.add_argument("--out", type=Path, help="directory for loss.png")
    options = parser.parse_args(arguments)
    texts, results, console = read_text(), {}, Console()
    table = Table("optimizer", "steps", "train loss", "held-out loss", "state MB", "optimizer ms/step")
    with Progress(console=console) as progress:
        for name, make in optimizers().items():
            task = progress.add_task(name, total=options.steps)

            def tick(t: int, loss: float, task: Any = task, name: str = name) -> None:
                progress.update(task, completed=t, description=f"{name}: {loss:.3f}")

            results[name] = train(make, options.steps, 60 * options.minutes / 4, texts, tick)
            losses, final, size, seconds, _ = results[name]
            numbers = (sum(losses[-20:]) / 20, final, size / 1e6, seconds * 1e3)
            table.add_row(name, str(len(losses)), *(f"{x:.3f}" for x in numbers))
    console.print(table)
    spikes = {gamma: spike(*results["Fira, subspace"][-1], gamma, texts[0]) for gamma in (1.01, None)}
    for gamma, losses in spikes.items():
        console.print(f"gradient x 100, gamma {gamma}: loss {losses[5]:.3f}, then at most {max(losses[6:]):.3f}")
    if options.out:
        plot(results, spikes, options.out)
    return {**results, "spikes": spikes}


if __name__ == "__main__":
    main()
