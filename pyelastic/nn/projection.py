"""Projection heads for late interaction: token states [..., d_in] -> unit vectors [..., d_out].

The families of Simple Projection Variants (Clavie 2025, arXiv 2510.12327). Its abstract names deeper and gated blocks,
skips and an upscaled intermediate size; the exact equations were not available, so the forms below are inferred from it
and from PyLate's ``Dense``, whose weights load here. With m = expand * d_in:

| kind | z |
|---|---|
| ``"linear"`` | W x |
| ``"ffn"``, layers 2 or 3 | W2 act(W1 x), W3 act(W2 act(W1 x)), inner size m |
| ``"glu"``, layers 1 | (V x) * gate(G x) |
| ``"glu"``, layers 2 | W ((V x) * gate(G x)), inner size m |

``residual`` adds to each hidden dense layer its input, projected without bias where sizes differ: act(W x) + R x, as
PyLate's ``use_residual``. ``skip`` adds x, projected where sizes differ, to z. The result is L2-normalised last. The
last dense layer, its bias, the skip and the norm are one ``pyelastic.projection``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyelastic import _errors
from pyelastic.ops.projection import projection

ACTIVATIONS = {
    "identity": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
}  # fmt: skip
KINDS = ("linear", "ffn", "glu")
NORMS = ("rms", "layer")
NEAR_ZERO = 1e-3  # of the default initialisation, for near_linear
PRESETS: dict[str, dict[str, Any]] = {
    "colbert": {"kind": "linear"},
    # The best variant as the authors' later report names it: two layers, upscaled, residual (arXiv 2510.14880).
    "paper": {"kind": "ffn", "layers": 2, "expand": 2.0, "residual": True},
    # PyLate's documentation: Dense(residual) then Dense, without activations; linear as a whole.
    "pylate": {"kind": "ffn", "layers": 2, "expand": 2.0, "residual": True, "activation": "identity"},
    # PyLate's pull request 166: three Dense with GELU and residuals.
    "pylate-gelu": {"kind": "ffn", "layers": 3, "expand": 2.0, "residual": True, "activation": "gelu"},
}


class DenseBlock(nn.Module):
    """act(W x + b) + R x; R the identity, or a bias-free ``residual`` where sizes differ. State: PyLate's ``Dense``."""

    def __init__(
        self, d_in: int, d_out: int, activation: str = "identity", residual: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out, bias=bias)
        self.activation = ACTIVATIONS[activation]()
        self.use_residual = residual
        self.residual = nn.Linear(d_in, d_out, bias=False) if residual and d_in != d_out else None

    @property
    def is_linear(self) -> bool:
        return isinstance(self.activation, nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.activation(self.linear(x))
        if not self.use_residual:
            return z
        return z + (x if self.residual is None else self.residual(x))

    def residual_matrix(self) -> Tensor | None:
        """R [d_out, d_in], or None without a residual."""
        if not self.use_residual:
            return None
        if self.residual is not None:
            return self.residual.weight
        weight = self.linear.weight
        return torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)


class GatedBlock(nn.Module):
    """(V x + b) * gate(G x + c): sigmoid GLU, silu SwiGLU, gelu GEGLU, identity bilinear (Shazeer 2020, 2002.05202)."""

    def __init__(self, d_in: int, d_out: int, activation: str = "sigmoid", bias: bool = False) -> None:
        super().__init__()
        self.value = nn.Linear(d_in, d_out, bias=bias)
        self.gate = nn.Linear(d_in, d_out, bias=bias)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * self.activation(self.gate(x))


class ProjectionHead(nn.Module):
    """Token states [..., d_in] -> unit vectors [..., d_out]; see the module for the forms.

    Args:
        kind: ``"linear"``, ``"ffn"`` or ``"glu"``.
        layers: 2 or 3 for "ffn", 1 or 2 for "glu"; "linear" has one.
        expand: the inner size over d_in, > 0.
        activation: of hidden layers, or of the gate; None is identity for "ffn" and sigmoid for "glu".
        residual: of hidden dense layers, and of "linear". skip: around the whole head.
        bias: of every dense layer but residuals and skips.
        norm: ``"rms"`` or ``"layer"`` before the first layer; None.
        normalize: L2-normalise the result.
        near_linear: start hidden layers with a residual near zero, so that the head starts as a linear one.
        backend: of ``pyelastic.projection``.

    Raises ValueError for an unknown name or a form that does not exist.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int = 128,
        *,
        kind: str = "linear",
        layers: int | None = None,
        expand: float = 2.0,
        activation: str | None = None,
        residual: bool = False,
        skip: bool = False,
        bias: bool = False,
        norm: str | None = None,
        normalize: bool = True,
        near_linear: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _errors.check_choice("ProjectionHead", "kind", kind, KINDS)
        if activation is None:
            activation = "sigmoid" if kind == "glu" else "identity"
        _errors.check_choice("ProjectionHead", "activation", activation, tuple(ACTIVATIONS))
        allowed = {"linear": (1,), "ffn": (2, 3), "glu": (1, 2)}[kind]
        layers = (1 if kind == "linear" else 2) if layers is None else layers
        if layers not in allowed:
            raise ValueError(f"ProjectionHead: layers is {layers}; {kind!r} has {' or '.join(map(str, allowed))}")
        if d_in < 1 or d_out < 1 or not round(expand * d_in) >= 1:
            raise ValueError(
                f"ProjectionHead: d_in {d_in}, d_out {d_out} and expand {expand} must give sizes of 1 or more"
            )
        if norm is not None:
            _errors.check_choice("ProjectionHead", "norm", norm, NORMS)
        self.d_in, self.d_out, self.normalize, self.backend = d_in, d_out, normalize, backend
        inner = round(expand * d_in)
        self.norm: nn.Module = nn.Identity()
        if norm is not None:
            self.norm = nn.RMSNorm(d_in) if norm == "rms" else nn.LayerNorm(d_in)
        blocks: list[nn.Module] = []
        if kind == "linear":
            blocks = [DenseBlock(d_in, d_out, residual=residual, bias=bias)]
        elif kind == "ffn":
            sizes = [d_in, *[inner] * (layers - 1)]
            blocks = [DenseBlock(a, b, activation, residual, bias) for a, b in pairwise(sizes)]
            blocks.append(DenseBlock(inner, d_out, bias=bias))
        else:
            blocks = [GatedBlock(d_in, d_out if layers == 1 else inner, activation, bias)]
            blocks += [DenseBlock(inner, d_out, bias=bias)] if layers == 2 else []
        self.blocks = nn.ModuleList(blocks)
        self.skip = nn.Linear(d_in, d_out, bias=False) if skip and d_in != d_out else None
        self.use_skip = skip
        if near_linear:
            self._shrink_hidden()

    @classmethod
    def preset(cls, name: str, d_in: int, d_out: int = 128, **options: Any) -> ProjectionHead:
        """A head of PRESETS; ``options`` go over it. Raises ValueError for an unknown name."""
        _errors.check_choice("ProjectionHead", "preset", name, tuple(PRESETS))
        return cls(d_in, d_out, **{**PRESETS[name], **options})

    @classmethod
    def from_linear(cls, weight: Tensor, bias: Tensor | None = None, **options: Any) -> ProjectionHead:
        """A head that starts as the linear one of ``weight`` [d_out, d_in]: itself, or a residual "ffn" of two layers
        whose residual carries the states and whose inner layer starts near zero. Raises ValueError for other forms, for
        the sigmoid, which is not 0 at 0, and for a norm."""
        d_out, d_in = weight.shape
        head = cls(d_in, d_out, bias=bias is not None, near_linear=True, **options)
        last = head.blocks[-1]
        plain = isinstance(last, DenseBlock) and not last.use_residual and not head.use_skip
        inner = head.blocks[0] if len(head.blocks) == 2 else None
        carries = isinstance(inner, DenseBlock) and inner.use_residual and inner.linear.out_features >= d_in
        if isinstance(inner, DenseBlock) and isinstance(inner.activation, nn.Sigmoid):
            carries = False  # 0.5 near zero: half of the sum of each row of W would be added to z
        plain = plain and isinstance(head.norm, nn.Identity)
        if not (plain and (len(head.blocks) == 1 or carries)) or not isinstance(last, DenseBlock):
            raise ValueError(
                "ProjectionHead.from_linear: expected kind='linear', or 'ffn' with layers=2, residual=True, "
                "expand >= 1 and an activation other than sigmoid; norm=None"
            )
        with torch.no_grad():
            last.linear.weight.zero_()
            last.linear.weight[:, :d_in] = weight
            if bias is not None:
                last.linear.bias.copy_(bias)
            if isinstance(inner, DenseBlock):
                if inner.residual is not None:
                    nn.init.eye_(inner.residual.weight)
                if inner.linear.bias is not None:
                    inner.linear.bias.zero_()
        return head

    @classmethod
    def from_dense(
        cls, state: Mapping[str, Tensor], activations: Sequence[str] | None = None, residuals: Sequence[bool] | None =
        None, **options: Any,
    ) -> ProjectionHead:  # fmt: skip
        """A head of the dense layers in a state_dict of ColBERT (``linear.weight``), PyLate or sentence-transformers.

        state: keys ``[<anything>.]linear.weight``, ``linear.bias``, ``residual.weight``; layers in the order of the
        numbers in the keys (``1.linear.weight``, ``2.linear.weight``). activations: of each, names of ACTIVATIONS,
        default identity. residuals: which layers add their input; default: those that have a ``residual.weight`` (an
        identity residual has no key). options: ``normalize``, ``backend``. Raises ValueError if there is no dense
        layer, or sizes do not chain.
        """
        found = {key: re.sub(r"(linear|residual)\.(weight|bias)$", "", key) for key in state}
        prefixes = {p for key, p in found.items() if key == f"{p}linear.weight"}
        order = sorted(prefixes, key=lambda p: ([int(n) for n in re.findall(r"\d+", p)], p))
        if not order:
            raise ValueError(f"ProjectionHead.from_dense: no linear.weight among {sorted(state)[:8]}")
        activations = ["identity"] * len(order) if activations is None else list(activations)
        residuals = [f"{p}residual.weight" in state for p in order] if residuals is None else list(residuals)
        if not len(order) == len(activations) == len(residuals):
            raise ValueError(
                f"ProjectionHead.from_dense: {len(order)} layers, {len(activations)} activations and {len(residuals)} "
                "residuals"
            )
        weights = [state[f"{p}linear.weight"] for p in order]
        for a, b in pairwise(weights):
            if a.shape[0] != b.shape[1]:
                raise ValueError(f"ProjectionHead.from_dense: {list(a.shape)} is followed by {list(b.shape)}")
        head = cls(weights[0].shape[1], weights[-1].shape[0], **options)
        blocks = []
        for p, weight, activation, residual in zip(order, weights, activations, residuals, strict=True):
            _errors.check_choice("ProjectionHead", "activation", activation, tuple(ACTIVATIONS))
            block = DenseBlock(weight.shape[1], weight.shape[0], activation, residual, f"{p}linear.bias" in state)
            block.load_state_dict({key.removeprefix(p): state[key] for key, q in found.items() if q == p})
            blocks.append(block.to(weight.dtype))
        head.blocks = nn.ModuleList(blocks)
        return head

    def _shrink_hidden(self) -> None:
        for block in self.blocks[:-1]:
            if isinstance(block, DenseBlock) and block.use_residual:
                with torch.no_grad():
                    block.linear.weight.mul_(NEAR_ZERO)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out] in x's dtype."""
        h = self.norm(x)
        start = h
        for block in self.blocks[:-1]:
            h = block(h)
        last = self.blocks[-1]
        if not isinstance(last, DenseBlock) or not last.is_linear or (last.use_residual and self.use_skip):
            z: Tensor = last(h)
            if self.use_skip:
                z = z + (start if self.skip is None else self.skip(start))
            return F.normalize(z, dim=-1) if self.normalize else z
        added = start if self.use_skip else h if last.use_residual else None
        through = self.skip if self.use_skip else last.residual
        return projection(
            h, last.linear.weight, last.linear.bias, residual=added, normalize=self.normalize, backend=self.backend,
            residual_weight=None if through is None else through.weight,
        )  # fmt: skip

    @torch.no_grad()
    def fold(self) -> ProjectionHead:
        """The same map with one matrix, for a head that is linear as a whole. Raises ValueError for one that is not."""
        linear = all(isinstance(block, DenseBlock) and block.is_linear for block in self.blocks)
        if not linear or not isinstance(self.norm, nn.Identity):
            raise ValueError("ProjectionHead.fold: a gate, an activation or a norm makes this head non-linear")
        weight: Tensor | None = None
        bias: Tensor | None = None
        for block in self.blocks:
            assert isinstance(block, DenseBlock)  # for the type checker
            matrix, r = block.linear.weight.double(), block.residual_matrix()
            matrix = matrix if r is None else matrix + r.double()
            weight = matrix if weight is None else matrix @ weight
            bias = None if bias is None else matrix @ bias
            if block.linear.bias is not None:
                bias = block.linear.bias.double() if bias is None else bias + block.linear.bias.double()
        assert weight is not None
        if self.use_skip:
            weight = weight + (torch.eye(self.d_in).to(weight) if self.skip is None else self.skip.weight.double())
        head = ProjectionHead(
            self.d_in, self.d_out, bias=bias is not None, normalize=self.normalize, backend=self.backend
        )
        like = next(self.parameters())
        head.to(device=like.device, dtype=like.dtype)
        block = head.blocks[0]
        assert isinstance(block, DenseBlock)
        block.linear.weight.copy_(weight)
        if bias is not None:
            block.linear.bias.copy_(bias)
        return head.train(self.training)
