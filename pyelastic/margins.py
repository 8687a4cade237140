"""Margins: how a margin-softmax loss bends the logit of the target class.

With ``theta`` the angle between an embedding and the centre of its class, a margin is a function
``phi(theta)`` that replaces ``cos(theta)`` in the target's logit ``z = scale * phi(theta)``; the logits of the
other classes stay ``scale * cos`` (CurricularFace and SV-softmax also stress hard negatives). Everything
here is plain torch on tensors of shape ``[B]``, so autograd, ``torch.compile`` and every backend share it.

Sources: NormFace (Wang 2017, arXiv 1704.06369), CosFace (Wang 2018, arXiv 1801.09414), ArcFace and the combined
margin (Deng 2019, arXiv 1801.07698), ElasticFace (Boutros 2022, arXiv 2109.09416), AdaFace (Kim 2022, arXiv
2204.00964), MagFace (Meng 2021, arXiv 2103.06627), CurricularFace (Huang 2020, arXiv 2004.00288), SV-softmax
(Wang 2018, arXiv 1812.11317).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = [
    "AdaFace",
    "ArcFace",
    "Combined",
    "CosFace",
    "CurricularFace",
    "ElasticArcFace",
    "ElasticCosFace",
    "MagFace",
    "Margin",
    "NormFace",
    "SVSoftmax",
]

GUARDS = ("none", "hard", "easy", "clip")
GRADS = ("exact", "straight_through")
PLUS = (None, "rank", "official")


def _choose(owner: object, name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        text = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{type(owner).__name__}: {name} is {value!r}; choose from {text}")


@dataclass(frozen=True, eq=False)
class Margin:
    """The base: what the op asks of a margin.

    Subclasses override :meth:`target`; the rest has defaults for a margin that is fixed, needs no
    norms and leaves the negatives alone.
    """

    needs_norms: ClassVar[bool] = False
    accepts_margins: ClassVar[bool] = True
    stresses_negatives: ClassVar[bool] = False

    @property
    def mean(self) -> float:
        """The margin of every sample, or the mean it is drawn around."""
        return 0.0

    @property
    def spread(self) -> float:
        """Standard deviation of the drawn margins; 0 draws nothing."""
        return 0.0

    @property
    def order(self) -> str | None:
        """How drawn margins are dealt to samples: None, 'rank' or 'official' (ElasticFace+)."""
        return None

    def target(self, theta: Tensor, margins: Tensor, norms: Tensor | None, valid: Tensor) -> Tensor:
        """``phi`` [B] from angle, margin and norm of each sample; ``valid`` [B] marks the used rows."""
        raise NotImplementedError

    def effective(self, margins: Tensor, norms: Tensor | None) -> Tensor:
        """The margins [B] to report; adaptive margins override it."""
        return margins

    def penalty(self, norms: Tensor) -> Tensor | None:
        """A per-sample regulariser [B] added to the loss, or None."""
        return None

    def hard_negatives(self, theta: Tensor, margins: Tensor) -> tuple[Tensor, Tensor]:
        """``(threshold [B], a [3])``: negatives with ``c > threshold`` become ``a0 + a1 c + a2 c^2``."""
        raise NotImplementedError


def _angular(theta: Tensor, margins: Tensor, m1: float, guard: str) -> Tensor:
    """cos(m1 theta + margin) under a guard against angles beyond pi: docs/ops/margin_softmax.md."""
    angle = m1 * theta + margins
    phi = torch.cos(angle)
    if guard == "hard":  # continue by a line of slope 1 in the cosine, as the early ArcFace code
        return torch.where(angle <= math.pi, phi, torch.cos(theta) - margins * torch.sin(margins))
    if guard == "easy":  # only help samples that are within 90 degrees
        return torch.where(theta < math.pi / 2, phi, torch.cos(theta))
    if guard == "clip":
        return torch.cos(angle.clamp(0.0, math.pi))
    return phi


def _through(theta: Tensor, phi: Tensor, grad: str) -> Tensor:
    """The value of ``phi`` with its own gradient, or with that of ``cos(theta)``."""
    if grad == "exact":
        return phi
    cosine = torch.cos(theta)
    return cosine + (phi - cosine).detach()


def deal(values: Tensor, cos_target: Tensor, valid: Tensor, order: str) -> Tensor:
    """ElasticFace+: deal the drawn margins to the valid rows by their cosine; ignored rows keep theirs."""
    far = torch.where(valid, cos_target, -torch.inf)
    by_cosine = torch.argsort(far, descending=True, stable=True)  # ignored rows last
    ascending = torch.where(valid, values, torch.inf).sort().values  # and so are their margins
    rank = torch.empty_like(by_cosine).scatter_(0, by_cosine, torch.arange(len(values), device=values.device))
    if order == "official":
        # The official code indexes with the sorting permutation instead of its inverse. Both count valid rows only.
        position = valid.cumsum(0) - 1
        rank = torch.where(valid, position[by_cosine[position.clamp(min=0)]], 0)
    return torch.where(valid, ascending[rank.clamp(min=0)], values)


@dataclass(frozen=True, eq=False)
class NormFace(Margin):
    """No margin: ``phi = cos(theta)``."""

    def target(self, theta: Tensor, margins: Tensor, norms: Tensor | None, valid: Tensor) -> Tensor:
        return torch.cos(theta)


@dataclass(frozen=True, eq=False)
class CosFace(Margin):
    """Additive cosine margin: ``phi = cos(theta) - m``."""

    m: float = 0.35

    @property
    def mean(self) -> float:
        return self.m

    def target(self, theta: Tensor, margins: Tensor, norms: Tensor | None, valid: Tensor) -> Tensor:
        return torch.cos(theta) - margins


@dataclass(frozen=True, eq=False)
class ArcFace(Margin):
    """Additive angular margin: ``phi = cos(theta + m)``, ``m`` in radians.

    ``guard`` rules ``theta + m > pi``, where the gradient of the bare formula changes sign and pushes the
    sample away from its centre: ``"none"`` keeps the formula (official ElasticFace), ``"hard"`` continues
    with ``cos(theta) - m sin(m)``, ``"easy"`` applies the margin only where ``theta < pi / 2``, ``"clip"`` stops
    the angle at pi. ``grad="straight_through"`` has the value of ``phi`` and the gradient of ``cos(theta)``, which
    is what InsightFace's ``no_grad`` margin amounts to.
    """

    m: float = 0.5
    guard: str = "none"
    grad: str = "exact"

    def __post_init__(self) -> None:
        _choose(self, "guard", self.guard, GUARDS)
        _choose(self, "grad", self.grad, GRADS)

    @property
    def mean(self) -> float:
        return self.m

    def target(self, theta: Tensor, margins: Tensor, norms: Tensor | None, valid: Tensor) -> Tensor:
        return _through(theta, _angular(theta, margins, 1.0, self.guard), self.grad)


@dataclass(frozen=True, eq=False)
class Combined(Margin):
    """``phi = cos(m1 theta + m2) - m3``, all three in force (InsightFace's class ignores m1, m2 if m3 > 0).

    With ``guard="hard"`` the continuation beyond pi is ``cos(theta) - m2 sin(m2) - m3``.
    """

    m1: float = 1.0
    m2: float = 0.5
    m3: float = 0.0
    guard: str = "none"
    grad: str = "exact"

    def __post_init__(self) -> None:
        _choose(self, "guard", self.guard, GUARDS)
        _choose(self, "grad", self.grad, GRADS)

    @property
    def mean(self) -> float:
        return self.m2

    def target(self, theta: Tensor, margins: Tensor, norms: Tensor | None, valid: Tensor) -> Tensor:
        phi = _angular(theta, margins, self.m1, self.guard) - self.m3
        return _through(theta, phi, self.grad)


@dataclass(frozen=True, eq=False)
class ElasticArcFace(ArcFace):
    """ArcFace whose margin is drawn per sample from N(m, sigma^2) (ElasticFace, section 3).

    ``plus`` deals the drawn margins by difficulty: ``"rank"`` gives the smallest margin to the sample
    closest to its centre, as the paper says; ``"official"`` reproduces the official code, which applies the
    inverse permutation. In evaluation (``training=False``) every sample gets ``m``.
    """

    sigma: float = 0.0125
    plus: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _choose(self, "plus", self.plus, PLUS)

    @property
    def spread(self) -> float:
        return self.sigma

    @property
    def order(self) -> str | None:
        return self.plus


@dataclass(frozen=True, eq=False)
class ElasticCosFace(CosFace):
    """CosFace whose margin is drawn per sample from N(m, sigma^2); ``plus`` as in ElasticArcFace."""

    sigma: float = 0.0125
    plus: str | None = None

    def __post_init__(self) -> None:
        _choose(self, "plus", self.plus, PLUS)

    @property
    def spread(self) -> float:
        return self.sigma

    @property
    def order(self) -> str | None:
        return self.plus


@dataclass(frozen=True, eq=False)
class AdaFace(Margin):
    """Quality-adaptive margin (AdaFace, equations 13-16), the norm detached.

    ``r = clip(h (|e| - mu) / (sd + eps), -1, 1)``, ``phi = cos(clip(theta - m r, eps, pi - eps)) - (m + m r)``.
    ``norm_mean`` and ``norm_std`` (floats or 0-d tensors) are the running statistics of the clipped norms; None
    takes those of this batch's valid rows (unbiased deviation, 0 for a single row).
    """

    needs_norms: ClassVar[bool] = True

    m: float = 0.4
    h: float = 0.333
    eps: float = 1e-3
    norm_mean: float | Tensor | None = None
    norm_std: float | Tensor | None = None

    @property
    def mean(self) -> float:
        return self.m

    @staticmethod
    def statistics(norms: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and unbiased deviation of the clipped norms of the valid rows (0-d tensors)."""
        clipped = norms.detach().clamp(1e-3, 100.0)
        count = valid.sum()
        mean = torch.where(valid, clipped, 0.0).sum() / count.clamp(min=1)
        square = torch.where(valid, clipped - mean, 0.0).square().sum()
        return mean, (square / (count - 1).clamp(min=1)).sqrt()

    def target(self, theta: Tensor, margins: Tensor, norms: Tensor | None, valid: Tensor) -> Tensor:
        assert norms is not None  # the op computes them because needs_norms is set
        mean: float | Tensor | None = self.norm_mean
        std: float | Tensor | None = self.norm_std
        if mean is None or std is None:
            mean, std = self.statistics(norms, valid)
        clipped = norms.detach().clamp(1e-3, 100.0)
        r = (self.h * (clipped - mean) / (std + self.eps)).clamp(-1.0, 1.0)
        edge = math.acos(1.0 - self.eps)  # the official code clamps the cosine to +-(1 - eps)
        angle = (theta.clamp(edge, math.pi - edge) - margins * r).clamp(self.eps, math.pi - self.eps)
        return torch.cos(angle) - (margins + margins * r)


@dataclass(frozen=True, eq=False)
class MagFace(Margin):
    """Magnitude-aware margin (MagFace, equations 3-6); the norm is *not* detached.

    ``a = clip(|e|, l_a, u_a)``, ``m(a) = l_m + (u_m - l_m) (a - l_a) / (u_a - l_a)``, ``phi = cos(theta + m(a))`` under
    ``guard``; adds ``lambda_g (a / u_a^2 + 1 / a)`` to each sample's loss. The op refuses ``margins=`` with it.
    """

    needs_norms: ClassVar[bool] = True
    accepts_margins: ClassVar[bool] = False

    l_a: float = 10.0
    u_a: float = 110.0
    l_m: float = 0.45
    u_m: float = 0.8
    lambda_g: float = 35.0
    guard: str = "easy"

    def __post_init__(self) -> None:
        _choose(self, "guard", self.guard, GUARDS)

    def effective(self, margins: Tensor, norms: Tensor | None) -> Tensor:
        assert norms is not None  # the op computes them because needs_norms is set
        a = norms.clamp(self.l_a, self.u_a)
        return self.l_m + (self.u_m - self.l_m) * (a - self.l_a) / (self.u_a - self.l_a)

    def target(self, theta: Tensor, margins: Tensor, norms: Tensor | None, valid: Tensor) -> Tensor:
        return _angular(theta, self.effective(margins, norms), 1.0, self.guard)

    def penalty(self, norms: Tensor) -> Tensor | None:
        a = norms.clamp(self.l_a, self.u_a)
        return self.lambda_g * (a / self.u_a**2 + 1.0 / a)


@dataclass(frozen=True, eq=False)
class CurricularFace(Margin):
    """ArcFace (hard guard) whose hard negatives ``c > cos(theta + m)`` become ``c (t + c)``.

    ``t`` (float or 0-d tensor) grows with training: the running mean of the target cosine, which
    ``pyelastic.nn.CurricularFace`` keeps. (CurricularFace, equations 5-9.)
    """

    stresses_negatives: ClassVar[bool] = True

    m: float = 0.5
    t: float | Tensor = 0.0

    @property
    def mean(self) -> float:
        return self.m

    def target(self, theta: Tensor, margins: Tensor, norms: Tensor | None, valid: Tensor) -> Tensor:
        return _angular(theta, margins, 1.0, "hard")

    def hard_negatives(self, theta: Tensor, margins: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones((), dtype=theta.dtype, device=theta.device)
        return torch.cos(theta + margins), torch.stack((0 * one, self.t * one, one))


@dataclass(frozen=True, eq=False)
class SVSoftmax(Margin):
    """Support-vector softmax: negatives above the target's ``phi`` become ``(t + 1) c + t``.

    ``base`` is the target's margin: ``"arc"`` (cos(theta + m)) or ``"cos"`` (cos(theta) - m).
    """

    stresses_negatives: ClassVar[bool] = True

    m: float = 0.5
    t: float | Tensor = 0.2
    base: str = "arc"

    def __post_init__(self) -> None:
        _choose(self, "base", self.base, ("arc", "cos"))

    @property
    def mean(self) -> float:
        return self.m

    def target(self, theta: Tensor, margins: Tensor, norms: Tensor | None, valid: Tensor) -> Tensor:
        if self.base == "cos":
            return torch.cos(theta) - margins
        return torch.cos(theta + margins)

    def hard_negatives(self, theta: Tensor, margins: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones((), dtype=theta.dtype, device=theta.device)
        threshold = self.target(theta, margins, None, margins)
        return threshold, torch.stack((self.t * one, (self.t + 1) * one, 0 * one))
