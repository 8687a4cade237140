"""margin_softmax: ArcFace (m = 0.5, s = 64), mean loss, gradients of embeddings and weight.

Variants compute the same loss; ``official`` is the ElasticFace formulation (acos and cos over the whole matrix),
written from its description. Peers without a margin get it put in afterwards from their loss and the target cosine.
The floor is the GEMMs: the 8 B C D operations of a class-chunked step and nothing else.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import pyelastic
from benchmarks.harness import Variant, compiled

OP = "margin_softmax"
OURS = ("pyelastic cuda", "pyelastic triton", "pyelastic cpu", "pyelastic eager")
SCALE, MARGIN, CHUNK = 64.0, 0.5, 2048
# Relative RMS error admitted. Best float32 measured: 1e-6; a gradient 0.01 % off or, at D = 512, one dropped class is
# above 1e-5. 16-bit operands: lean eager under bfloat16 autocast, the least exact admitted, measured 1.0e-2 at D = 128.
FLOAT32, HALF = 1e-5, 2e-2
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    leaves: ClassVar[int] = 2  # embeddings and weight get gradients
    batch: int
    dim: int
    classes: int

    @property
    def id(self) -> str:
        return f"B{self.batch}-D{self.dim}-C{self.classes}"

    def flops(self) -> float:
        """Of the 6 B C D a step cannot do without; a step that recomputes the cosines does 8 B C D."""
        return 6.0 * self.batch * self.dim * self.classes

    def bytes(self) -> float:
        """The weight and the embeddings read twice, their gradients written."""
        return 4.0 * 3 * self.dim * (self.classes + self.batch)

    def tiny(self) -> Case:
        return Case(8, self.dim, 64)

    def inputs(self, seed: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        make = partial(torch.randn, generator=generator, device=device)
        weight = make(self.classes, self.dim).mul_(0.01)
        labels = torch.randint(0, self.classes, (self.batch,), generator=generator, device=device)
        # A little towards their centres, as early in training. Much closer, and the margin that is put in afterwards
        # is lost to cancellation: the error of F.linear_cross_entropy was 0.6 at a target cosine of 0.45.
        noise = make(self.batch, self.dim)
        return 0.15 * F.normalize(weight[labels]) * self.dim**0.5 + noise, weight, labels


def case(case_id: str) -> Case:
    """The case of an id such as ``B512-D512-C20000``."""
    return Case(*map(int, re.findall(r"\d+", case_id)))


def cases(full: bool, device: str) -> list[Case]:
    if device == "cuda":
        sizes = (100_000, 1_000_000, 10_000_000) if full else (100_000,)
        return [Case(batch, 512, count) for count in sizes for batch in (1024, 4096)]
    if full:
        return [Case(512, 512, 20_000), Case(256, 512, 100_000), Case(512, 128, 100_000)]
    return [Case(512, 512, 20_000), Case(256, 128, 50_000)]


def memory_only(full: bool) -> list[Case]:
    """Cases whose memory alone is of interest: a million classes."""
    return [Case(256, 128, 1_000_000)] if full else []


def official(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    cosine = torch.mm(F.normalize(embeddings), F.normalize(weight).t()).clamp(-1, 1)
    hot = torch.zeros_like(cosine)
    hot.scatter_(1, labels[:, None], MARGIN)
    return F.cross_entropy(SCALE * torch.cos(torch.acos(cosine) + hot), labels)


def lean(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    cosine = F.normalize(embeddings) @ F.normalize(weight).t()
    target = cosine.gather(1, labels[:, None]).clamp(-1 + 1e-7, 1 - 1e-7)
    phi = torch.cos(torch.acos(target) + MARGIN).to(cosine.dtype)
    return F.cross_entropy(SCALE * cosine.scatter(1, labels[:, None], phi), labels)


def lean_autocast(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast(embeddings.device.type, torch.bfloat16):
        return lean(embeddings, weight, labels)


def _with_margin(
    nll_of: Callable[[Tensor, Tensor, Tensor], Tensor], embeddings: Tensor, weight: Tensor, labels: Tensor
) -> Tensor:
    """The margin put in afterwards, from the loss per sample of SCALE * cosines and the target cosine."""
    e, w = F.normalize(embeddings), F.normalize(weight)
    target = (e * w[labels]).sum(1).clamp(-1 + 1e-7, 1 - 1e-7)
    lse = nll_of(SCALE * e, w, labels) + SCALE * target
    negatives = lse + torch.log(-torch.expm1(SCALE * target - lse))
    return F.softplus(negatives - SCALE * torch.cos(torch.acos(target) + MARGIN)).mean()


def _native(e: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(e, w, labels, reduction="none")


def _cut(e: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(e.to(torch.bfloat16), w.to(torch.bfloat16), labels, reduction="none").float()


def _liger(e: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        e.to(torch.bfloat16), w.to(torch.bfloat16), labels, reduction="none"
    ).float()


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


def variants(case: Case, device: str) -> dict[str, Variant]:
    """Ours first; peers only where they are installed."""
    grade = {"cpu": FLOAT32, "eager": FLOAT32, "cuda": HALF, "triton": HALF}
    backends = ("cuda", "triton", "eager") if device == "cuda" else ("cpu", "eager")
    found = {f"pyelastic {name}": Variant(_ours(name), grade[name]) for name in backends}
    found["official"] = Variant(official, FLOAT32)
    found["lean eager"] = Variant(lean, FLOAT32)
    found["lean eager, compiled"] = Variant(compiled(lean), FLOAT32)
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy + margin"] = Variant(partial(_with_margin, _native), FLOAT32)
    if importlib.util.find_spec("pytorch_metric_learning"):
        found["pytorch-metric-learning"] = Variant(_metric_learning(case), FLOAT32)
    if device == "cuda":
        found["lean eager, bf16 autocast"] = Variant(lean_autocast, HALF)
        found["lean eager, bf16 autocast, compiled"] = Variant(compiled(lean_autocast), HALF)
        if importlib.util.find_spec("cut_cross_entropy"):
            found["cut-cross-entropy + margin"] = Variant(partial(_with_margin, _cut), HALF)
        if importlib.util.find_spec("liger_kernel"):
            found["Liger + margin"] = Variant(partial(_with_margin, _liger), HALF)
    return found


def floor(embeddings: Tensor, weight: Tensor, labels: Tensor) -> None:
    """The GEMMs of one class-chunked step, in the type the kernels use: cosines twice, dE, dW."""
    dtype = torch.float16 if weight.is_cuda else torch.float32
    e = embeddings.to(dtype)
    d_e = torch.zeros_like(e)
    d_w = torch.empty(min(CHUNK, len(weight)), weight.shape[1], dtype=dtype, device=e.device)
    full = torch.empty_like(weight) if dtype == weight.dtype else None
    tile = torch.empty(len(e) * CHUNK, dtype=dtype, device=e.device)
    for sweep in (1, 2):
        for first in range(0, len(weight), CHUNK):
            rows = weight[first : first + CHUNK].to(dtype)
            z = tile[: len(e) * len(rows)].view(len(e), -1)
            torch.mm(e, rows.t(), out=z)
            if sweep == 2:
                torch.addmm(d_e, z, rows, out=d_e)
                torch.mm(z.t(), e, out=d_w[: len(rows)] if full is None else full[first : first + CHUNK])


def truth(embeddings: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients by the textbook formula with autograd in float64, over chunks of rows and of classes.

    Logits of a chunk of classes are recomputed for the gradient, so that 10^7 classes fit; dW is kept in the dtype of
    ``weight``, whose rounding is far below the oracle's limit.
    """
    d_w = torch.zeros_like(weight)
    d_e = torch.zeros_like(embeddings, dtype=torch.float64)
    width = max(1, (1 << 26) // len(embeddings))
    e = embeddings.double().requires_grad_()
    chunks = [slice(first, first + width) for first in range(0, len(weight), width)]

    def logits(part: slice, rows: Tensor) -> Tensor:
        cosine = F.normalize(e) @ F.normalize(rows).t()
        column = labels - part.start
        inside = (column >= 0) & (column < len(rows))
        target = cosine[inside, column[inside]]
        sine = torch.sqrt(1 - target.square())
        phi = target * math.cos(MARGIN) - sine * math.sin(MARGIN)
        return SCALE * cosine.index_put((inside.nonzero()[:, 0], column[inside]), phi)

    with torch.no_grad():
        lse = torch.stack([torch.logsumexp(logits(part, weight[part].double()), 1) for part in chunks])
        lse = torch.logsumexp(lse, 0)
    own = torch.zeros(len(e), dtype=torch.float64, device=e.device)
    for part in chunks:
        rows = weight[part].double().requires_grad_()
        z = logits(part, rows)
        column = labels - part.start
        inside = (column >= 0) & (column < len(rows))
        own[inside] = z.detach()[inside, column[inside]]
        upstream = torch.exp(z.detach() - lse[:, None])
        upstream[inside.nonzero()[:, 0], column[inside]] -= 1
        part_e, part_w = torch.autograd.grad(z, (e, rows), upstream / len(e))
        d_e += part_e
        d_w[part] = part_w.to(d_w.dtype)
    return (lse - own).mean(), d_e, d_w
