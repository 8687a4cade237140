"""Tables of rotary position embedding for norm_linear_attention."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(
    positions: int | tuple[int, int],
    dim: int,
    *,
    base: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Sines and cosines of the rotation angles, [N, dim / 2] each: entry j turns the channels 2j and 2j + 1.

    Args:
        positions: N, for positions 0 .. N - 1 with the frequencies base^(-2j / dim) of RoFormer (arXiv 2104.09864); or
            (height, width), for the N = height * width cells of an image row by row, as in NaLaFormer's released code:
            the first half of the channels turns by the row, the second by the column, with dim / 4
            frequencies base^(-i / (dim / 4 - 1)) each.
        dim: width of a head, a multiple of 2, for an image of 4.
        base: ratio of the longest to the shortest wavelength.

    Raises:
        ValueError: dim does not divide.
    """
    plane = not isinstance(positions, int)
    if dim < 1 or dim % (4 if plane else 2):
        raise ValueError(f"rope_tables: dim is {dim}; expected a multiple of {4 if plane else 2}")
    if isinstance(positions, int):
        frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    else:
        height, width = positions
        frequencies = base ** -torch.linspace(0, 1, dim // 4, dtype=torch.float64)
        row = torch.arange(height, dtype=torch.float64)[:, None] * frequencies
        column = torch.arange(width, dtype=torch.float64)[:, None] * frequencies
        angles = torch.cat((row.repeat_interleave(width, 0), column.repeat(height, 1)), 1)
    return angles.sin().to(device, dtype), angles.cos().to(device, dtype)
