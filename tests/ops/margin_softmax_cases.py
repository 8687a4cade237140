"""Inputs for the margin_softmax tests, and the comparison of one call with the truth."""

from dataclasses import dataclass, field
from typing import Any

import backends
import oracle
import pytest
import torch
from margin_softmax_reference import Truth, reference
from torch import Tensor

import pyelastic
from pyelastic import margins as M

OP = "margin_softmax"
BACKENDS = backends.implemented(OP)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Every fixed margin, so that a test of variants cannot forget one.
VARIANTS: dict[str, Any] = {
    "NormFace": M.NormFace(),
    "CosFace": M.CosFace(m=0.35),
    "ElasticCosFace": M.ElasticCosFace(m=0.35, sigma=0.05),
    "ElasticArcFace": M.ElasticArcFace(m=0.5, sigma=0.05),
    **{f"ArcFace-{guard}": M.ArcFace(guard=guard) for guard in M.GUARDS},
    "ArcFace-through": M.ArcFace(grad="straight_through"),
    "ArcFace-hard-through": M.ArcFace(guard="hard", grad="straight_through"),
    "Combined": M.Combined(m1=0.9, m2=0.4, m3=0.15),
    "Combined-hard": M.Combined(m1=1.1, m2=0.4, m3=0.15, guard="hard"),
    "Combined-through": M.Combined(m1=0.9, m2=0.4, m3=0.15, grad="straight_through"),
    "AdaFace": M.AdaFace(),
    "AdaFace-running": M.AdaFace(norm_mean=6.0, norm_std=2.0),
    "MagFace": M.MagFace(l_a=4.0, u_a=9.0),
    "MagFace-none": M.MagFace(l_a=4.0, u_a=9.0, guard="none", lambda_g=5.0),
    "Curricular": M.CurricularFace(t=0.3),
    "SVSoftmax-arc": M.SVSoftmax(),
    "SVSoftmax-cos": M.SVSoftmax(m=0.35, base="cos"),
}


@dataclass
class Case:
    embeddings: Tensor
    weight: Tensor
    labels: Tensor
    options: dict[str, Any] = field(default_factory=dict)


def make(
    batch: int = 13,
    classes: int = 37,
    dim: int = 19,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    subcenters: int = 1,
) -> Case:
    """Rows near, far from and opposite to their centres, so that no term of the loss vanishes."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    weight = 0.1 * draw(classes * subcenters, dim)
    labels = torch.randint(classes, (batch,), generator=random)
    noise = draw(batch, dim)
    centre = weight[labels * subcenters] if batch else noise
    # The last kind lies beyond pi - m, where the guards differ.
    toward = torch.tensor([4.0, 2.5, 1.0, -3.6], dtype=torch.float64)[torch.arange(batch) % 4]
    spread = torch.tensor([0.8, 0.8, 0.8, 0.15], dtype=torch.float64)[torch.arange(batch) % 4]
    centre = centre / centre.norm(dim=1, keepdim=True).clamp(min=1e-9)
    embeddings = toward[:, None] * centre + spread[:, None] * noise
    lengths = 0.5 + torch.arange(batch, dtype=torch.float64) % 5
    return Case((embeddings * lengths[:, None]).to(dtype), weight.to(dtype), labels)


def call(
    backend: str, case: Case, margin: Any, *, grad: tuple[bool, bool] = (True, True), **options: Any
) -> tuple[Any, Tensor, Tensor]:
    """(what margin_softmax returns, embeddings, weight), the last two as leaves of that call."""
    backends.skip_unsupported(OP, backend, case.embeddings.dtype)
    kwargs = backends.to_device(backend, {**case.options, **options})
    device = backends.device_of(backend)
    # No copy: the layout of the case is part of the test.
    e = case.embeddings.detach().to(device).requires_grad_(grad[0])
    w = case.weight.detach().to(device).requires_grad_(grad[1])
    out = pyelastic.margin_softmax(e, w, case.labels.to(device), margin=margin, backend=backend, **kwargs)
    return out, e, w


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def compare(
    backend: str,
    case: Case,
    margin: Any,
    *,
    upstream: Tensor | None = None,
    truth: Truth | None = None,
    **options: Any,
) -> Truth:
    """Loss and both gradients of one call against the truth; return the truth."""
    options = {**case.options, **options}
    told = {k: v for k, v in options.items() if k not in ("sparse_grad", "training", "seed")}
    if truth is None:
        half = half_operands(backend, case)
        truth = reference(case.embeddings, case.weight, case.labels, margin, upstream=upstream, half=half, **told)
    loss, e, w = call(backend, case, margin, **options)
    g = torch.ones_like(truth.loss) if upstream is None else upstream
    loss.backward(g.to(loss.device, loss.dtype) if upstream is None else upstream.to(loss.device))
    grad_w = w.grad.to_dense() if w.grad.is_sparse else w.grad
    dtype = case.embeddings.dtype
    name, grade = f"{backend} {type(margin).__name__}", accuracy(backend, case, truth)
    oracle.check(loss, truth.loss, A=truth.A_loss, dtype=loss_dtype(dtype), name=f"{name} loss", **grade)
    oracle.check(e.grad, truth.grad_e, A=truth.A_e, dtype=dtype, name=f"{name} dE", **grade)
    oracle.check(grad_w, truth.grad_w, A=truth.A_w, dtype=case.weight.dtype, name=f"{name} dW", **grade)
    return truth


def half_operands(backend: str, case: Case) -> bool:
    return backends.half_operands(backend, case.embeddings.dtype, case.weight.dtype)


def accuracy(backend: str, case: Case, truth: Truth) -> dict[str, Any]:
    """How exact this backend must be on this case, for the oracle."""
    if half_operands(backend, case):
        return {"K": 1, "acc": torch.float16, "tolerance": "half operands"}
    return {"K": truth.K}


def weighted_upstream(case: Case) -> Tensor:
    """A gradient for reduction='none' that no two rows share."""
    return torch.linspace(-1.0, 2.0, len(case.labels), dtype=loss_dtype(case.embeddings.dtype))


over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_variants = pytest.mark.parametrize("variant", VARIANTS)
