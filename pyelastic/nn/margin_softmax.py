"""Heads that hold the class weights and return the loss: drop-in for heads that return logits to a cross-entropy.

Constructor arguments and defaults are those of the official classes. ``weight`` is [C * K, D]; a state_dict with an
official ``kernel`` [D, C] loads as it is. The weight starts as N(0, 0.01^2), the official choice: its norm sets the
angular step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyelastic import _errors, margins
from pyelastic.eager.margin_softmax import statistics_dtype, target_angle
from pyelastic.ops.margin_softmax import margin_softmax, sample_classes


class MarginSoftmax(nn.Module):
    """Margin-softmax loss of ``embeddings`` [B, in_features] for ``labels`` [B] in [0, out_features).

    Args:
        margin: one of ``pyelastic.margins``.
        s: the scale.
        subcenters: K rows per class.
        sample_rate: below 1, each training step uses this share of the classes (Partial FC).
        options: further keyword arguments of ``pyelastic.margin_softmax`` for every call, e.g. ``reduction``,
            ``ignore_index``, ``label_smoothing``, ``backend``; ``forward`` takes them too, for one call.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        margin: margins.Margin,
        s: float = 64.0,
        *,
        subcenters: int = 1,
        sample_rate: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.margin, self.s, self.subcenters, self.sample_rate = margin, s, subcenters, sample_rate
        self.options = options
        self.weight = nn.Parameter(torch.empty(out_features * subcenters, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)

    def current_margin(self, embeddings: Tensor, labels: Tensor, ignore_index: int) -> margins.Margin:
        """The margin of this step; heads with running statistics update them here."""
        return self.margin

    def forward(self, embeddings: Tensor, labels: Tensor, **options: Any) -> Any:
        """The loss, or ``(loss, MarginSoftmaxAux)`` with ``return_aux``."""
        # Here as well as in the op, because running statistics are updated before it is called.
        _errors.check_rank("margin_softmax", "embeddings", embeddings, 2, "[B, D]")
        _errors.check_rank("margin_softmax", "labels", labels, 1, "[B]")
        if embeddings.shape != (labels.shape[0], self.weight.shape[1]):
            expected = [labels.shape[0], self.weight.shape[1]]
            raise ValueError(f"margin_softmax: embeddings is {list(embeddings.shape)}; expected {expected}")
        options = {**self.options, **options}
        ignore_index = options.get("ignore_index", -100)
        if self.training and self.sample_rate < 1.0 and "classes" not in options:
            options["classes"] = sample_classes(
                labels, self.out_features, self.sample_rate, ignore_index=ignore_index
            )
        return margin_softmax(
            embeddings,
            self.weight,
            labels,
            margin=self.current_margin(embeddings, labels, ignore_index),
            scale=self.s,
            subcenters=self.subcenters,
            training=self.training,
            **options,
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, s={self.s}, margin={self.margin}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        kernel, weight = prefix + "kernel", prefix + "weight"
        if kernel in state_dict and weight not in state_dict:  # official heads keep [D, C]
            state_dict[weight] = state_dict.pop(kernel).t().contiguous()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class NormFace(MarginSoftmax):
    """Scaled cosine softmax without a margin."""

    def __init__(self, in_features: int, out_features: int, s: float = 64.0, **options: Any) -> None:
        super().__init__(in_features, out_features, margins.NormFace(), s, **options)


class CosFace(MarginSoftmax):
    """CosFace; defaults of the official ElasticFace repository."""

    def __init__(self, in_features: int, out_features: int, s: float = 64.0, m: float = 0.35, **options: Any) -> None:
        super().__init__(in_features, out_features, margins.CosFace(m), s, **options)


class ArcFace(MarginSoftmax):
    """ArcFace; ``m`` in radians. ``guard`` and ``grad``: see ``pyelastic.margins.ArcFace``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float = 64.0,
        m: float = 0.50,
        *,
        guard: str = "none",
        grad: str = "exact",
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, margins.ArcFace(m, guard, grad), s, **options)


class SubCenterArcFace(MarginSoftmax):
    """ArcFace with ``subcenters`` rows per class, the closest of which counts."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float = 64.0,
        m: float = 0.50,
        *,
        subcenters: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, margins.ArcFace(m), s, subcenters=subcenters, **options)


class CombinedMargin(MarginSoftmax):
    """``cos(m1 theta + m2) - m3`` with all three margins in force."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float = 64.0,
        m1: float = 1.0,
        m2: float = 0.5,
        m3: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, margins.Combined(m1, m2, m3), s, **options)


def _plus(plus: bool | str | None) -> str | None:
    """The official classes take a bool; True is the paper's rule, ``"official"`` the code's."""
    if isinstance(plus, bool):
        return "rank" if plus else None
    return plus


class ElasticArcFace(MarginSoftmax):
    """ElasticFace-Arc. ``plus``: False, True (``"rank"``) or ``"official"`` (bug-compatible)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float = 64.0,
        m: float = 0.50,
        std: float = 0.0125,
        plus: bool | str | None = False,
        **options: Any,
    ) -> None:
        margin = margins.ElasticArcFace(m, sigma=std, plus=_plus(plus))
        super().__init__(in_features, out_features, margin, s, **options)


class ElasticCosFace(MarginSoftmax):
    """ElasticFace-Cos. ``plus`` as in ElasticArcFace."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float = 64.0,
        m: float = 0.35,
        std: float = 0.0125,
        plus: bool | str | None = False,
        **options: Any,
    ) -> None:
        margin = margins.ElasticCosFace(m, sigma=std, plus=_plus(plus))
        super().__init__(in_features, out_features, margin, s, **options)


class MagFace(MarginSoftmax):
    """MagFace with its regulariser; see ``pyelastic.margins.MagFace`` for the bounds."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float = 64.0,
        *,
        margin: margins.MagFace | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, margin or margins.MagFace(), s, **options)


class SVSoftmax(MarginSoftmax):
    """Support-vector softmax."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float = 64.0,
        m: float = 0.5,
        t: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, margins.SVSoftmax(m, t), s, **options)


class AdaFace(MarginSoftmax):
    """AdaFace; running mean and deviation of the clipped norms, updated by ``t_alpha`` before use in training.

    ``t_alpha=1.0``, the official default, uses the batch alone.
    """

    batch_mean: Tensor
    batch_std: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        m: float = 0.4,
        h: float = 0.333,
        s: float = 64.0,
        t_alpha: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, margins.AdaFace(m, h), s, **options)
        self.m, self.h, self.t_alpha = m, h, t_alpha
        self.register_buffer("batch_mean", torch.tensor(20.0))
        self.register_buffer("batch_std", torch.tensor(100.0))

    @torch.no_grad()
    def current_margin(self, embeddings: Tensor, labels: Tensor, ignore_index: int) -> margins.Margin:
        if self.training:
            norms = torch.linalg.vector_norm(embeddings.to(statistics_dtype(embeddings)), dim=1)
            mean, std = margins.AdaFace.statistics(norms, labels != ignore_index)
            step = self.t_alpha * (labels != ignore_index).any()  # no valid row, no step
            self.batch_mean.lerp_(mean.to(self.batch_mean), step.to(self.batch_mean))
            self.batch_std.lerp_(std.to(self.batch_std), step.to(self.batch_std))
        # Copies: the buffers change in place while autograd may still hold these.
        return margins.AdaFace(self.m, self.h, norm_mean=self.batch_mean.clone(), norm_std=self.batch_std.clone())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.pop(prefix + "t", None)  # a buffer of the official class that nothing reads
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class CurricularFace(MarginSoftmax):
    """CurricularFace; ``t <- 0.01 mean(target cosine) + 0.99 t`` before use in training."""

    t: Tensor

    def __init__(self, in_features: int, out_features: int, m: float = 0.5, s: float = 64.0, **options: Any) -> None:
        super().__init__(in_features, out_features, margins.CurricularFace(m), s, **options)
        self.m = m
        self.register_buffer("t", torch.zeros(()))

    @torch.no_grad()
    def current_margin(self, embeddings: Tensor, labels: Tensor, ignore_index: int) -> margins.Margin:
        if self.training:
            valid = labels != ignore_index
            targets = torch.where(valid, labels, 0)
            theta = target_angle(embeddings, self.weight, targets, None, self.subcenters)
            cosine = torch.where(valid, torch.cos(theta), 0.0).sum() / valid.sum().clamp(min=1)
            self.t.lerp_(cosine.to(self.t), 0.01 * valid.any().to(self.t))  # no valid row, no step
        return margins.CurricularFace(self.m, self.t.clone())
