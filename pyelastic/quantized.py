"""Quantised tokens of documents, for scoring: int8 values with a scale per token, or residuals of a codebook.

Kernels decode them inside their tiles; nothing of the decoded size is written. No gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Int8Tokens:
    """``values * scale[..., None]``: values [..., d] int8, scale [...] float32, one per token."""

    values: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.values.dtype != torch.int8 or self.scale.dtype != torch.float32:
            raise TypeError(
                f"Int8Tokens: values is {self.values.dtype} and scale is {self.scale.dtype}; expected int8 and float32"
            )
        if self.scale.shape != self.values.shape[:-1]:
            raise ValueError(
                f"Int8Tokens: scale is {list(self.scale.shape)}; expected {list(self.values.shape[:-1])}, one per token"
            )

    def decode(self) -> Tensor:
        """The tokens as float32 [..., d]."""
        return self.values.float() * self.scale[..., None]


@dataclass(frozen=True)
class ResidualTokens:
    """``centroids[codes] + buckets[b]`` (Santhanam 2022, ColBERTv2, arXiv 2112.01488, section 3.3).

    codes [...] int32; residuals [..., d bits / 8] uint8, the b of 2 or 4 bits packed from the low bits of each byte up;
    centroids [n, d] and buckets [2^bits] float32.
    """

    codes: Tensor
    residuals: Tensor
    centroids: Tensor
    buckets: Tensor

    def __post_init__(self) -> None:
        wanted = {
            "codes": torch.int32,
            "residuals": torch.uint8,
            "centroids": torch.float32,
            "buckets": torch.float32,
        }
        for name, dtype in wanted.items():
            if getattr(self, name).dtype != dtype:
                raise TypeError(f"ResidualTokens: {name} is {getattr(self, name).dtype}; expected {dtype}")
        if self.buckets.shape not in ((4,), (16,)):
            raise ValueError(
                f"ResidualTokens: buckets is {list(self.buckets.shape)}; expected [4] or [16]: 2 or 4 bits"
            )
        if self.centroids.ndim != 2:
            raise ValueError(f"ResidualTokens: centroids is {list(self.centroids.shape)}; expected [n, d]")
        width = self.centroids.shape[1] * self.bits / 8
        if self.residuals.shape != (*self.codes.shape, width):
            raise ValueError(
                f"ResidualTokens: residuals is {list(self.residuals.shape)}; expected {[*self.codes.shape, width]}: "
                f"d = {self.centroids.shape[1]} values of {self.bits} bits for each of codes"
            )
        if self.codes.device.type == "cpu" and self.codes.numel():
            low, high = int(self.codes.min()), int(self.codes.max())
            if low < 0 or high >= self.centroids.shape[0]:
                raise ValueError(
                    f"ResidualTokens: codes reach from {low} to {high}; expected 0 <= code < {self.centroids.shape[0]}"
                )

    @property
    def bits(self) -> int:
        return 2 if self.buckets.shape[0] == 4 else 4

    def decode(self) -> Tensor:
        """The tokens as float32 [..., d], not normalised."""
        shifts = torch.arange(0, 8, self.bits, device=self.residuals.device, dtype=torch.uint8)
        b = (self.residuals[..., None] >> shifts & (1 << self.bits) - 1).flatten(-2)
        return self.centroids[self.codes.long()] + self.buckets[b.long()]


def quantize_int8(tokens: Tensor) -> Int8Tokens:
    """Symmetric int8 per token: tokens [..., d] floating; scale = max |x| / 127 (1 for a zero token)."""
    largest = tokens.float().abs().amax(-1)
    scale = torch.where(largest > 0, largest / 127.0, 1.0)
    return Int8Tokens((tokens.float() / scale[..., None]).round().to(torch.int8), scale)


def quantize_residual(tokens: Tensor, centroids: Tensor, bits: int = 2) -> ResidualTokens:
    """Nearest centroid by inner product, and residuals in buckets at the quantiles of all residuals.

    tokens: [..., d] floating, d a multiple of 8 / bits; centroids: [n, d] float32, of unit length as in ColBERTv2;
    bits: 2 or 4. Raises ValueError for other bits or d.
    """
    d = tokens.shape[-1]
    if bits not in (2, 4) or d * bits % 8:
        raise ValueError(
            f"quantize_residual: bits is {bits} and d is {d}; expected 2 or 4 bits, d a multiple of 8 / bits"
        )
    flat = tokens.float().reshape(-1, d)
    codes = (flat @ centroids.T).argmax(1)
    residual = flat - centroids[codes]
    count = 1 << bits
    quantiles = torch.arange(1, 2 * count, device=flat.device) / (2 * count)
    # torch.quantile takes 2^24 elements at most; a strided sample is as good.
    sample = residual.flatten()[:: max(1, residual.numel() >> 22)]
    points = torch.quantile(sample, quantiles.to(sample))
    buckets, edges = points[::2].contiguous(), points[1::2].contiguous()
    b = torch.bucketize(residual, edges).to(torch.uint8).reshape(len(flat), -1, 8 // bits)
    shifts = torch.arange(0, 8, bits, device=flat.device, dtype=torch.uint8)
    packed = (b << shifts).sum(-1).to(torch.uint8)
    return ResidualTokens(
        codes.to(torch.int32).reshape(tokens.shape[:-1]), packed.reshape(*tokens.shape[:-1], -1), centroids, buckets
    )
