"""A LLaMA-shaped language model of 0.65 million parameters on bytes, and text that ships with Python."""

from __future__ import annotations

from collections.abc import Callable
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 128, 3, 4, 64, 16


def read_text() -> tuple[Tensor, Tensor]:
    """The help texts of Python's documentation as bytes: for training, and the last tenth held out."""
    data = torch.frombuffer(bytearray("\n".join(topics[k] for k in sorted(topics)).encode()), dtype=torch.uint8).long()
    return data[: -len(data) // 10], data[-len(data) // 10 :]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden = 8 * WIDTH // 3 // 8 * 8
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        half = WIDTH // HEADS // 2
        q, k = (torch.cat((-t[..., half:], t[..., :half]), -1) * sin + t * cos for t in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        d = WIDTH // HEADS
        angles = torch.arange(CONTEXT)[:, None] / 10_000 ** (torch.arange(d // 2) * 2 / d)
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


def batches(text: Tensor, seed: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        start = torch.randint(0, len(text) - CONTEXT - 1, (BATCH, 1), generator=generator)
        return text[start + torch.arange(CONTEXT + 1)]

    return draw


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
