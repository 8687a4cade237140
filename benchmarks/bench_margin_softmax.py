"""margin_softmax: ArcFace (m = 0.5, s = 64), mean loss, gradients of embeddings and weight, float32.

Variants compute the same loss; ``official`` is the ElasticFace formulation (acos and cos over the whole matrix),
written from its description. ``GEMMs alone`` is the floor: the 8 B C D operations of a class-chunked step and nothing
else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import pyelastic

SCALE, MARGIN, CHUNK = 64.0, 0.5, 2048
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    batch: int
    dim: int
    classes: int

    @property
    def id(self) -> str:
        return f"B{self.batch}-D{self.dim}-C{self.classes}"

    def flops(self) -> float:
        """Of the 6 B C D a step cannot do without; a step that recomputes the cosines does 8 B C D."""
        return 6.0 * self.batch * self.dim * self.classes

    def gradient_bytes(self) -> int:
        return 4 * self.classes * self.dim

    def inputs(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        weight = 0.01 * torch.randn(self.classes, self.dim, generator=generator)
        labels = torch.randint(0, self.classes, (self.batch,), generator=generator)
        # A little towards their centres, as early in training. Much closer, and the margin that `native` puts in
        # afterwards is lost to cancellation: its oracle error was 0.6 at a target cosine of 0.45.
        noise = torch.randn(self.batch, self.dim, generator=generator)
        embeddings = 0.15 * F.normalize(weight[labels]) * self.dim**0.5 + noise
        return embeddings, weight, labels


QUICK = [Case(512, 512, 20_000), Case(256, 128, 50_000)]
FULL = [Case(512, 512, 20_000), Case(256, 512, 100_000), Case(512, 128, 100_000)]
MILLION = Case(256, 128, 1_000_000)


def official(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    cosine = torch.mm(F.normalize(embeddings), F.normalize(weight).t()).clamp(-1, 1)
    hot = torch.zeros_like(cosine)
    hot.scatter_(1, labels[:, None], MARGIN)
    return F.cross_entropy(SCALE * torch.cos(torch.acos(cosine) + hot), labels)


def lean(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    cosine = F.normalize(embeddings) @ F.normalize(weight).t()
    target = cosine.gather(1, labels[:, None]).clamp(-1 + 1e-7, 1 - 1e-7)
    phi = torch.cos(torch.acos(target) + MARGIN)
    return F.cross_entropy(SCALE * cosine.scatter(1, labels[:, None], phi), labels)


def native(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's chunked linear cross-entropy; the margin is put in afterwards, from its loss and the target cosine."""
    e, w = F.normalize(embeddings), F.normalize(weight)
    nll = F.linear_cross_entropy(SCALE * e, w, labels, reduction="none")
    target = (e * w[labels]).sum(1).clamp(-1 + 1e-7, 1 - 1e-7)
    lse = nll + SCALE * target
    negatives = lse + torch.log(-torch.expm1(SCALE * target - lse))
    return F.softplus(negatives - SCALE * torch.cos(torch.acos(target) + MARGIN)).mean()


def _ours(backend: str) -> Loss:
    margin = pyelastic.margins.ArcFace(MARGIN)
    return lambda e, w, y: pyelastic.margin_softmax(e, w, y, margin=margin, scale=SCALE, backend=backend)


def _metric_learning(case: Case) -> Loss:
    from pytorch_metric_learning.losses import ArcFaceLoss

    loss = ArcFaceLoss(case.classes, case.dim, margin=MARGIN * 180 / torch.pi, scale=SCALE)

    def run(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        del loss.W  # a parameter [D, C]; here the rotating weight, so that all variants see the same
        loss.W = weight.t()
        return loss(embeddings, labels)

    return run


def variants(case: Case) -> dict[str, Loss]:
    """Name -> loss function. 'pyelastic cpu' first; peers only where they are installed."""
    found: dict[str, Loss] = {
        "pyelastic cpu": _ours("cpu"),
        "pyelastic eager": _ours("eager"),
        "official": official,
        "lean eager": lean,
        "lean eager, compiled": torch.compile(lean),
    }
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy + margin"] = native
    if importlib.util.find_spec("pytorch_metric_learning"):
        found["pytorch-metric-learning"] = _metric_learning(case)
    return found


def floor(embeddings: Tensor, weight: Tensor) -> None:
    """The GEMMs of one class-chunked step: cosines twice, dE, dW."""
    tile = torch.empty(len(embeddings) * CHUNK)
    d_e, d_w = torch.zeros_like(embeddings), torch.empty_like(weight)
    for sweep in (1, 2):
        for first in range(0, len(weight), CHUNK):
            rows = weight[first : first + CHUNK]
            z = tile[: len(embeddings) * len(rows)].view(len(embeddings), -1)
            torch.mm(embeddings, rows.t(), out=z)
            if sweep == 2:
                torch.addmm(d_e, z, rows, out=d_e)
                torch.mm(z.t(), embeddings, out=d_w[first : first + CHUNK])


def truth(embeddings: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients in float64, one row block at a time, by the textbook formula."""
    w = weight.double().requires_grad_()
    e = embeddings.double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, len(e), 32):
        part = slice(first, first + 32)
        loss = lean(e[part], w, labels[part]) * len(labels[part]) / len(labels)
        loss.backward()
        total += loss.detach()
    assert e.grad is not None and w.grad is not None
    return total, e.grad, w.grad
