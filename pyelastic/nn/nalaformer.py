"""NaLaFormer, the vision backbone: norm-aware linear attention in two stages, softmax attention in two.

Weights have the released code's names. Source: Meng et al. (arXiv 2506.21137), its released code and model table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyelastic.eager.norm_linear_attention import statistics_dtype
from pyelastic.nn.norm_linear_attention import NormAwareLinearAttention, SoftmaxAttention
from pyelastic.rope import rope_tables

# name -> widths, depths, heads, MLP ratio, drop path, initial LayerScale of each stage.
VARIANTS: dict[str, tuple[Any, ...]] = {
    "XT": ((32, 64, 128, 384), (2, 2, 2, 2), (1, 2, 4, 12), 3.5, 0.1, (1.0,) * 4),
    "T": ((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8), 4.0, 0.1, (1.0,) * 4),
    "S": ((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), 3.5, 0.15, (1.0,) * 4),
    "B": ((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8), 4.0, 0.4, (1.0, 1.0, 1e-6, 1e-6)),
    "L": ((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10), 3.5, 0.55, (1e-6,) * 4),
}
LINEAR_STAGES = (True, True, False, False)


class _LayerNorm2d(nn.Module):
    """Over the channels of [B, C, H, W]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.fc1(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        y = y + self.dwconv(y)
        return self.fc2(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Block(nn.Module):
    def __init__(
        self, linear: bool, dim: int, heads: int, hidden: int, drop: float, scale: float, **options: Any
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = _LayerNorm2d(dim), _LayerNorm2d(dim)
        self.attn = NormAwareLinearAttention(dim, heads, **options) if linear else SoftmaxAttention(dim, heads)
        self.ffn = _FeedForward(dim, hidden)
        self.cpe1, self.cpe2 = (nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(2))
        self.gamma_1, self.gamma_2 = (nn.Parameter(scale * torch.ones(1, dim, 1, 1)) for _ in range(2))
        self.drop = drop

    def _dropped(self, x: Tensor) -> Tensor:
        """Stochastic depth: a sample's branch is left out with probability ``drop``."""
        if not self.training or self.drop == 0:
            return x
        kept = torch.empty(len(x), 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(1 - self.drop)
        return x * kept / (1 - self.drop)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        x = x + self.cpe1(x)
        x = x + self._dropped(self.gamma_1 * self.attn(self.norm1(x), sin, cos))
        x = x + self.cpe2(x)
        return x + self._dropped(self.gamma_2 * self.ffn(self.norm2(x)))


class _Merging(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.reduction, self.norm = nn.Conv2d(dim, out, 3, stride=2, padding=1), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class _Angles(nn.Module):
    """The released code keeps its frequencies as a buffer; here it is only loaded and saved."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        frequencies = 10000.0 ** -torch.linspace(0, 1, head_dim // 4)
        self.register_buffer("angle", frequencies.repeat_interleave(2))


class _Stage(nn.Module):
    def __init__(self, blocks: list[_Block], head_dim: int, merging: _Merging | None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.RoPE = _Angles(head_dim)
        self.blocks = nn.ModuleList(blocks)
        self.downsample = merging

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[2], x.shape[3])
        sin, cos = rope_tables(grid, self.head_dim, device=x.device, dtype=statistics_dtype(x))
        for block in self.blocks:
            x = block(x, sin, cos)
        return x if self.downsample is None else self.downsample(x)


class _PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for source, to, stride in ((channels, dim // 2, 2), (dim // 2, dim // 2, 1), (dim // 2, dim // 2, 1)):
            layers += [nn.Conv2d(source, to, 3, stride, 1), nn.BatchNorm2d(to), nn.GELU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(dim // 2, dim, 3, 2, 1), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class NaLaFormer(nn.Module):
    """Images [B, in_chans, H, W], H and W multiples of 32, -> logits [B, num_classes].

    Args:
        variant: "XT", "T", "S", "B" or "L"; or give ``widths``, ``depths``, ``heads`` and ``mlp_ratio``.
        linear: which stages have norm-aware linear attention; by default the first two, as the registered models.
        projection: channels before the classifier. num_classes: 0 leaves the classifier out.
        options: of ``norm_linear_attention`` for every layer.

    Raises:
        ValueError: an unknown variant.
    """

    def __init__(
        self,
        variant: str = "T",
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        projection: int = 1024,
        widths: tuple[int, ...] | None = None,
        depths: tuple[int, ...] | None = None,
        heads: tuple[int, ...] | None = None,
        mlp_ratio: float | None = None,
        drop_path_rate: float | None = None,
        linear: tuple[bool, ...] = LINEAR_STAGES,
        **options: Any,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"NaLaFormer: unknown variant {variant!r}; choose from {', '.join(VARIANTS)}")
        given = (widths, depths, heads, mlp_ratio, drop_path_rate, None)
        chosen: Any = (default if own is None else own for own, default in zip(given, VARIANTS[variant], strict=True))
        widths_, depths_, heads_, ratio, drop, scales = chosen
        rates = torch.linspace(0, drop, sum(depths_)).tolist()
        self.num_features, self.num_classes = widths_[-1], num_classes
        self.patch_embed = _PatchEmbed(in_chans, widths_[0])
        self.layers = nn.ModuleList()
        for i, (dim, depth, count) in enumerate(zip(widths_, depths_, heads_, strict=True)):
            taken, rates = rates[:depth], rates[depth:]
            blocks = [
                _Block(linear[i], dim, count, int(ratio * dim), rate, scales[i], **(options if linear[i] else {}))
                for rate in taken
            ]
            merging = _Merging(dim, widths_[i + 1]) if i + 1 < len(widths_) else None
            self.layers.append(_Stage(blocks, dim // count, merging))
        self.proj, self.norm = nn.Linear(widths_[-1], projection), nn.BatchNorm2d(projection)
        self.head = nn.Conv2d(projection, num_classes, 1) if num_classes > 0 else nn.Identity()
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, projection, H / 32, W / 32]."""
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        x = self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.silu(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).mean((2, 3), keepdim=True)).flatten(1)


def register_timm_models() -> list[str]:
    """Makes ``timm.create_model("nalaformer_t")`` and the others work; returns the names. Needs timm."""
    from timm.models import register_model

    names = []
    for variant in VARIANTS:

        def make(pretrained: bool = False, variant: str = variant, **options: Any) -> NaLaFormer:
            if pretrained:
                raise ValueError("NaLaFormer: the authors have not released weights")
            for unused in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
                options.pop(unused, None)
            return NaLaFormer(variant, **options)

        make.__name__ = f"nalaformer_{variant.lower()}"
        make.__module__ = __name__
        globals()[make.__name__] = make
        register_model(make)
        names.append(make.__name__)
    return names
