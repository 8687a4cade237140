"""The snippets of docs/ops/fira.md for Hugging Face's Trainer and Lightning, where those packages are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyelastic.optim import Fira, divide_params


def data(count: int = 64) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 12, generator=generator)
    rows = torch.randn(count, 12, generator=generator)
    return [{"x": x, "labels": (weight @ x).argmax()} for x in rows]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 4))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def loss(model: nn.Module) -> float:
    rows = data()
    with torch.no_grad():
        return float(model(torch.stack([r["x"] for r in rows]), torch.stack([r["labels"] for r in rows]))["loss"])


def there(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


@pytest.mark.skipif(not there("transformers", "accelerate"), reason="needs transformers and accelerate")
def test_hugging_face_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = Net()
    before = loss(model)
    options: dict[str, Any] = {
        "output_dir": str(tmp_path), "num_train_epochs": 8, "per_device_train_batch_size": 16, "report_to": [],
        "save_strategy": "epoch", "save_total_limit": 1, "use_cpu": True, "disable_tqdm": True,
        "lr_scheduler_type": "linear", "max_grad_norm": 1.0,
    }  # fmt: skip
    optimizer = Fira(divide_params(model, ["layers"], rank=4), lr=0.02)
    trainer = Trainer(
        model, TrainingArguments(**options), train_dataset=data(), optimizers=(optimizer, None)
    )
    trainer.train()
    assert loss(model) < 0.5 * before
    assert optimizer.state[model.layers[0].weight]["projector"].shape == (4, 12)
    (checkpoint,) = tmp_path.glob("checkpoint-*/optimizer.pt")
    torch.load(checkpoint, weights_only=True)


@pytest.mark.skipif(not there("lightning"), reason="needs lightning")
def test_lightning(tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> Fira:
            return Fira(divide_params(self.net, ["layers"], rank=4), lr=0.02)

    module = Module()
    before = loss(module.net)
    trainer = lightning.Trainer(
        max_epochs=8, accelerator="cpu", logger=False, default_root_dir=str(tmp_path), enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=16))
    assert loss(module.net) < 0.5 * before
