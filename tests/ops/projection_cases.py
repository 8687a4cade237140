"""Inputs for the projection tests, the truth in float64 with the sums the oracle's bound needs, and the comparison.

Nothing of the truth is shared with the package: gradients are written out from the formulas, not left to autograd.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import backends
import oracle
import pytest
import torch
from torch import Tensor

import pyelastic

OP = "projection"
BACKENDS = backends.implemented(OP)
KERNELS = [b for b in BACKENDS if b != "eager"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
SKIPS = ("none", "identity", "projected")
ZERO_NORM = 1e-12
over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_kernels = pytest.mark.parametrize("backend", KERNELS)


@dataclass
class Case:
    """Arguments of a call."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    residual_weight: Tensor | None = None
    normalize: bool = True

    def having(self, **changes: Any) -> "Case":
        return replace(self, **changes)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors given, in the order of the arguments."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @property
    def lead(self) -> torch.Size:
        return self.x.shape[:-1]


def make(
    *lead: int,
    d_in: int = 20,
    d_out: int = 9,
    skip: str = "none",
    d_r: int = 6,
    bias: bool = True,
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
    parameters: torch.dtype | None = None,
    r_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Case:
    """Random inputs; rows x [*lead, d_in], by default 13 of them, of different lengths."""
    random = torch.Generator().manual_seed(seed)
    lead = lead or (13,)
    parameters = parameters or dtype

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    width = d_out if skip == "identity" else d_r
    return Case(
        draw(*lead, d_in, dtype=dtype),
        (draw(d_out, d_in, dtype=torch.float64) / d_in**0.5).to(parameters),
        draw(d_out, dtype=parameters) if bias else None,
        None if skip == "none" else draw(*lead, width, dtype=r_dtype or dtype),
        draw(d_out, d_r, dtype=parameters) if skip == "projected" else None,
        normalize,
    )


@dataclass
class Truth:
    """y [N, d_out], the gradient of each input, rows flattened, and A, the sums of absolute products behind each.

    ``rounded``: the A of gradients made from a y that was rounded to 16 bits, for the bound of "half operands". Each
    element of y is then off by up to a unit of x's dtype, independently of the others, with a standard deviation of
    0.43 units: twice the root of the squared effects is more than four standard deviations, and what one to four
    elements can do at the most.
    """

    y: Tensor
    A_y: Tensor
    grads: dict[str, Tensor]
    A: dict[str, Tensor]
    rounded: dict[str, Tensor]
    K: int


def _rows(x: Tensor) -> Tensor:
    return x.detach().cpu().double().reshape(-1, x.shape[-1])


def reference(case: Case, upstream: Tensor) -> Truth:
    """The truth of a call and of its gradients for the gradient ``upstream`` [*lead, d_out] of y."""
    x, w, g = _rows(case.x), _rows(case.weight), _rows(upstream)
    z, A_z = x @ w.T, x.abs() @ w.abs().T
    if case.bias is not None:
        b = case.bias.detach().cpu().double()
        z, A_z = z + b, A_z + b.abs()
    r = r_w = None
    if case.residual is not None:
        r = _rows(case.residual)
        r_w = torch.eye(len(w), dtype=torch.float64) if case.residual_weight is None else _rows(case.residual_weight)
        z, A_z = z + r @ r_w.T, A_z + r.abs() @ r_w.abs().T
    if case.normalize:
        norm = z.square().sum(1, keepdim=True).sqrt()
        clamped = norm < ZERO_NORM
        inverse = 1 / torch.where(clamped, ZERO_NORM, norm)
        y = z * inverse
        # d|z| = <y, dz>; where the norm is clamped it does not move.
        A_norm = torch.where(clamped, 0.0, (y.abs() * A_z).sum(1, keepdim=True) * inverse)
        A_y = A_z * inverse + y.abs() * A_norm
        along = torch.where(clamped, 0.0, (g * y).sum(1, keepdim=True))
        A_along = torch.where(clamped, 0.0, (g.abs() * (y.abs() + A_y)).sum(1, keepdim=True))
        dz = (g - along * y) * inverse
        A_dz = (g.abs() + A_along * y.abs() + along.abs() * A_y) * inverse + dz.abs() * A_norm
    else:
        y, A_y, dz, A_dz = z, A_z, g, g.abs()

    def linear(d: Tensor, magnitude: bool) -> dict[str, Tensor]:
        """What the linear maps make of dz; with ``magnitude`` their absolute values, for an A."""
        of = torch.abs if magnitude else torch.clone
        found = {"x": d @ of(w), "weight": d.T @ of(x), "bias": d.sum(0)}
        if r is not None and r_w is not None:
            found |= {"residual": d @ of(r_w), "residual_weight": d.T @ of(r)}
        return {name: found[name] for name in case.tensors}

    def rounding() -> dict[str, Tensor]:
        """``Truth.rounded``: through the weights effects add up before they are squared, over rows after."""
        if not case.normalize or case.x.dtype not in HALF:
            return {}
        stored = y.abs().clamp(min=torch.finfo(case.x.dtype).smallest_normal)  # below it the error is absolute
        # [N, k, j]: what a unit of error in y_ij does to dz_ik.
        effect = torch.diag_embed(along * stored) + y[:, :, None] * (g * stored)[:, None, :]
        effect = torch.where(clamped[:, :, None], 0.0, effect * inverse[:, :, None])
        square = effect.square().sum(2)
        found = {"x": _through(effect, w), "weight": square.T @ x.square(), "bias": square.sum(0)}
        if r is not None and r_w is not None:
            found |= {"residual": _through(effect, r_w), "residual_weight": square.T @ r.square()}
        return {name: 2 * found[name].sqrt() for name in case.tensors}

    K = x.shape[1] + len(w) + len(x) + (0 if r is None else r.shape[1])
    return Truth(y, A_y, linear(dz, False), linear(A_dz, True), rounding(), K)


def _through(effect: Tensor, weight: Tensor) -> Tensor:
    """Sums of squares [N, d] of effects [N, k, j] on dz after a weight [k, d]."""
    return (effect.mT @ weight).square().sum(1)


def upstream_of(case: Case) -> Tensor:
    """A gradient of y that no two elements share."""
    shape = (*case.lead, len(case.weight))
    random = torch.Generator().manual_seed(77)
    return torch.randn(shape, generator=random, dtype=torch.float64).to(case.x.dtype)


def call(backend: str, case: Case, need: tuple[str, ...] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """(y, leaves of that call by name); ``need``: those that require a gradient, default all. Layouts are kept."""
    backends.skip_unsupported(OP, backend, case.x.dtype)
    device = backends.device_of(backend)
    leaves = {}
    for name, value in case.tensors.items():
        leaves[name] = value.detach().to(device).requires_grad_(need is None or name in need)
    options = {"residual": leaves.get("residual"), "residual_weight": leaves.get("residual_weight")}
    y = pyelastic.projection(
        leaves["x"], leaves["weight"], leaves.get("bias"), normalize=case.normalize, backend=backend, **options
    )
    return y, leaves


def grade(backend: str, case: Case, truth: Truth, name: str) -> dict[str, Any]:
    """How exact a gradient of this backend must be: kernels take y as they returned it, rounded (ops/projection.py)."""
    A, dtype = truth.A[name], case.x.dtype
    if not case.normalize or dtype not in HALF or backend == "eager":
        return {"A": A, "K": truth.K, "acc": oracle.accumulator(dtype)}
    # The float32 part of the bound, in units of x's dtype.
    part = oracle.TOLERANCES[oracle.DEFAULT].c_acc * math.sqrt(truth.K) * oracle.unit(torch.float32)
    A = truth.rounded[name] + part / oracle.unit(dtype) * A
    return {"A": A, "K": 1, "acc": dtype, "tolerance": "half operands"}


def check(backend: str, case: Case, truth: Truth, y: Tensor, grads: dict[str, Tensor]) -> None:
    """One result and its gradients against the truth."""
    dtype = case.x.dtype
    assert y.shape == (*case.lead, len(case.weight)), f"{backend}: y is {tuple(y.shape)}"
    flat = y.reshape(truth.y.shape)
    acc = oracle.accumulator(dtype)
    oracle.check(flat, truth.y, A=truth.A_y, K=truth.K, acc=acc, dtype=dtype, name=f"{backend} y")
    for name, grad in grads.items():
        want = truth.grads[name]
        assert grad.shape == case.tensors[name].shape, f"{backend}: gradient of {name} is {tuple(grad.shape)}"
        given = case.tensors[name].dtype
        told = grade(backend, case, truth, name)
        oracle.check(grad.reshape(want.shape), want, dtype=given, name=f"{backend} gradient of {name}", **told)


def compare(backend: str, case: Case, upstream: Tensor | None = None) -> Truth:
    """y and all gradients of one call against the truth; return the truth."""
    upstream = upstream_of(case) if upstream is None else upstream
    truth = reference(case, upstream)
    y, leaves = call(backend, case)
    y.backward(upstream.to(y.device))
    check(backend, case, truth, y, gradients_of(leaves))
    return truth


def gradients_of(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients that arrived, by name."""
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
