"""How the subspace of a low-rank optimizer is found: from a gradient G [m, n] to an orthonormal P [d, r].

Vector view as in pyelastic.eager.fira: X [L, d] is G, or its transpose with the projector on the left; P's columns
should capture as much of |X|^2 as possible, ``captured_energy``. All functions compute in float32 (float64 for float64)
and take (G, previous P or None, rank, left, seed). A projector may also be a callable
``f(G, previous, rank, left) -> P [d, r]``, whose P need not be orthonormal.

=========== ========================================================= ==========================
name        method                                                    operations
=========== ========================================================= ==========================
svd         thin SVD, the published package's                         about 6 L d^2 + 20 d^3
eigh        eigenvectors of X^T X                                     L d^2 + about 9 d^3
randomized  Halko, Martinsson, Tropp 2011: a power iteration, 8 spare 8 L d r
subspace    one iteration from the previous P; cold, ``randomized``   4 L d r + 4 d r^2
random      QR of a Gaussian matrix, from the seed alone              2 d r^2
=========== ========================================================= ==========================
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

Projector = Callable[[Tensor, "Tensor | None", int, bool], Tensor]
OVERSAMPLE = 8
DEFECT = 1e-4  # of P^T P from the identity, above which Cholesky QR gives way to Householder's


def side_is_left(shape: torch.Size | tuple[int, int], proj_type: str) -> bool:
    """Whether the projector of [m, n] is on the left; ``std`` keeps the long side, ``reverse_std`` the short."""
    m, n = shape
    sides = {"std": m < n, "reverse_std": m >= n, "left": True, "right": False}
    if proj_type not in sides:
        full = "; 'full' fails in the published package too" if proj_type == "full" else ""
        raise ValueError(f"fira: proj_type is {proj_type!r}; choose from {', '.join(sides)}{full}")
    return sides[proj_type]


def _vectors(g: Tensor, left: bool) -> Tensor:
    x = g if g.dtype == torch.float64 else g.float()
    return x.mT if left else x


def _gaussian(rows: int, columns: int, like: Tensor, seed: int) -> Tensor:
    """The same numbers on every device: drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    return torch.randn(rows, columns, generator=generator).to(like.device, like.dtype)


def orthonormal(y: Tensor) -> Tensor:
    """Columns of y [d, r] made orthonormal, each along its own direction as far as the ones before it allow.

    Cholesky QR, twice, of the columns scaled to length 1. R's diagonal is positive, so no column changes sign between
    two calls with similar y, as an SVD's may. Where it breaks down (dependent columns), Householder QR.
    """
    q = y / torch.linalg.vector_norm(y, dim=0).clamp(min=torch.finfo(y.dtype).tiny)
    for _ in range(2):
        factor, info = torch.linalg.cholesky_ex(q.mT @ q)
        if int(info) != 0:
            return _householder(y)
        q = torch.linalg.solve_triangular(factor.mT, q, upper=True, left=False)
    eye = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
    good = q.isfinite().all() & ((q.mT @ q - eye).abs().max() < DEFECT)
    return q if bool(good) else _householder(y)


def _householder(y: Tensor) -> Tensor:
    q, r = torch.linalg.qr(y)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def svd(g: Tensor, previous: Tensor | None, rank: int, left: bool, seed: int) -> Tensor:
    """Of G itself, not of its transpose, so that the signs are those of the published package."""
    u, _, vh = torch.linalg.svd(_vectors(g, False), full_matrices=False)
    return (u[:, :rank] if left else vh[:rank].mT).clone()  # a view would keep all of U or V alive


def eigh(g: Tensor, previous: Tensor | None, rank: int, left: bool, seed: int) -> Tensor:
    x = _vectors(g, left)
    return torch.linalg.eigh(x.mT @ x)[1][:, -rank:].flip(1).contiguous()


def randomized(
    g: Tensor, previous: Tensor | None, rank: int, left: bool, seed: int, iterations: int = 1
) -> Tensor:
    x = _vectors(g, left)
    width = min(rank + OVERSAMPLE, *x.shape)
    y = x.mT @ _gaussian(x.shape[0], width, x, seed)
    for _ in range(iterations):
        y = x.mT @ (x @ orthonormal(y))
    q = orthonormal(y)
    z = x @ q
    return q @ torch.linalg.eigh(z.mT @ z)[1][:, -rank:].flip(1)


def subspace(g: Tensor, previous: Tensor | None, rank: int, left: bool, seed: int) -> Tensor:
    """One warm iteration captured over 99.8 % of what an SVD does, and keeps the moments' coordinates in place."""
    if previous is None or previous.shape[1] != rank:
        return randomized(g, None, rank, left, seed, iterations=2)
    x = _vectors(g, left)
    return orthonormal(x.mT @ (x @ previous.to(x.dtype)))


def random(g: Tensor, previous: Tensor | None, rank: int, left: bool, seed: int) -> Tensor:
    """From (seed, shape) alone, whatever G holds."""
    d = g.shape[0] if left else g.shape[1]
    like = g if g.dtype == torch.float64 else g.float()
    return _householder(_gaussian(d, rank, like, seed))


PROJECTORS = {"svd": svd, "eigh": eigh, "randomized": randomized, "subspace": subspace, "random": random}


def refresh(
    projector: str | Projector, g: Tensor, previous: Tensor | None, rank: int, left: bool, seed: int
) -> Tensor | None:
    """P [d, r] for gradient ``g`` [m, n], or None where it says nothing: not finite, all zero, or nothing converged.

    Reads the gradient's largest element on the host: a refresh synchronises. A method that fails gives way to ``eigh``,
    with a warning; never raises for what ``g`` holds.
    """
    if projector == "random":
        return random(g, previous, rank, left, seed)
    largest = float(g.abs().amax())  # NaN if there is one
    if not 0.0 < largest < float("inf"):
        return None
    if not isinstance(projector, str):
        return projector(g, previous, rank, left)
    # A gradient of size 1e-30 has an X^T X of zero. A power of two rounds nothing.
    g = g.to(torch.float64 if g.dtype == torch.float64 else torch.float32) * 2.0 ** -math.frexp(largest)[1]
    for method in (PROJECTORS[projector], eigh):
        try:
            p = method(g, previous, rank, left, seed)
        except RuntimeError as error:
            warnings.warn(f"fira: projector {projector!r} failed ({error}); trying 'eigh'", stacklevel=2)
            continue
        if bool(p.isfinite().all()):
            return p
    return None


def captured_energy(g: Tensor, p: Tensor, left: bool) -> float:
    """|X P|^2 / |X|^2, between 0 and 1."""
    x = _vectors(g, left)
    return float((x @ p.to(x.dtype)).square().sum() / x.square().sum())
