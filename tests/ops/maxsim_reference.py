"""maxsim in float64 from its formulas, one pair of sequences at a time, with the sums the oracle's bound needs.

Nothing here is shared with the package: gradients are written out, not left to autograd.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Sequences:
    """Tokens [T, d] of all sequences, their first tokens, a mask and weights per token."""

    tokens: Tensor
    offsets: list[int]
    mask: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def span(self, i: int) -> slice:
        return slice(self.offsets[i], self.offsets[i + 1])


@dataclass
class Truth:
    """Scores [n, P] of the pairs and the tokens' m, gradients [T, d], and A, the sums of absolute products, of each."""

    scores: Tensor
    A_scores: Tensor
    grad_q: Tensor
    A_q: Tensor
    grad_d: Tensor
    A_d: Tensor
    tokens: list[list[Tensor]] = field(default_factory=list)  # [n][P]: m [Lq]
    winners: list[list[Tensor]] = field(default_factory=list)


@dataclass
class Units:
    """Unit rows, factors 1 / |x|, and whether the norm was clamped."""

    hat: Tensor
    inverse: Tensor
    clamped: Tensor


def unit(x: Tensor, normalize: bool) -> Units:
    if not normalize:
        return Units(x, torch.ones(len(x), dtype=x.dtype), torch.zeros(len(x), dtype=torch.bool))
    norm = x.square().sum(1).sqrt()
    inverse = 1.0 / norm.clamp(min=1e-12)
    return Units(x * inverse[:, None], inverse, norm <= 1e-12)


def through_norm(u: Units, grad: Tensor, A: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    if not normalize:
        return grad, A
    along = torch.where(u.clamped, 0.0, (grad * u.hat).sum(1))[:, None]
    A_along = (A * u.hat.abs()).sum(1)[:, None]
    out = (grad - along * u.hat) * u.inverse[:, None]
    return out, (A + A_along * u.hat.abs()) * u.inverse[:, None]


def reference(
    q: Sequences,
    d: Sequences,
    pairs: list[tuple[int, int]],
    upstream: Tensor,
    *,
    prefixes: tuple[int, ...],
    normalize: bool = False,
    topk: int = 1,
    temperature: float = 0.0,
    zero_mode: bool = False,
) -> Truth:
    """upstream: [n, P]. Masked query tokens must have weight 0."""
    n, dim = len(prefixes), q.tokens.shape[1]
    zeros = [torch.zeros(x.tokens.shape, dtype=torch.float64) for x in (q, q, d, d)]
    scores, A_scores = (torch.zeros(n, len(pairs), dtype=torch.float64) for _ in range(2))
    truth = Truth(scores, A_scores, *zeros)
    for plane, width in enumerate(prefixes):
        # What masked tokens hold must not matter.
        used_q = torch.where((q.weights != 0)[:, None], q.tokens.double(), 0.0)[:, :width]
        used_d = torch.where(d.mask[:, None], d.tokens.double(), 0.0)[:, :width]
        uq, ud = unit(used_q, normalize), unit(used_d, normalize)
        g_q, A_q = torch.zeros_like(used_q), torch.zeros_like(used_q)
        g_d, A_d = torch.zeros_like(used_d), torch.zeros_like(used_d)
        truth.tokens.append([])
        truth.winners.append([])
        for p, (i, j) in enumerate(pairs):
            a, b = q.span(i), d.span(j)
            hq, hd = uq.hat[a], ud.hat[b]
            counts = d.mask[b]
            s, A_s = hq @ hd.T, hq.abs() @ hd.abs().T
            m, share = aggregate(s, counts, topk, temperature, zero_mode)
            w = q.weights[a].double()
            truth.tokens[-1].append(m)
            truth.winners[-1].append(share.argmax(1) if share.shape[1] else m.long() - 1)
            truth.scores[plane, p] = (w * m).sum()
            scale = 1.0 / max(temperature, 1.0) if temperature else 1.0
            A_m = (share * A_s).sum(1) + (temperature * scale if temperature else 0.0)
            truth.A_scores[plane, p] = (w.abs() * A_m).sum()
            c = (upstream[plane, p].double() * w)[:, None] * share
            # The smooth maximum's shares have the error of exp(s / tau).
            A_c = c.abs() * (1.0 + A_s / temperature) if temperature else c.abs()
            g_q[a] += c @ hd
            g_d[b] += c.T @ hq
            A_q[a] += A_c @ hd.abs()
            A_d[b] += A_c.T @ hq.abs()
        for out, A_out, u, g, A in (
            (truth.grad_q, truth.A_q, uq, g_q, A_q),
            (truth.grad_d, truth.A_d, ud, g_d, A_d),
        ):
            grad, bound = through_norm(u, g, A, normalize)
            out[:, :width] += grad
            A_out[:, :width] += bound
    assert dim >= prefixes[-1]
    return truth


def aggregate(s: Tensor, counts: Tensor, topk: int, temperature: float, zero_mode: bool) -> tuple[Tensor, Tensor]:
    """m [Lq] and dm / ds [Lq, Ld] of similarities [Lq, Ld]."""
    share = torch.zeros_like(s)
    rows = torch.arange(len(s))
    if not counts.any() and not (zero_mode and len(counts)):
        return torch.zeros(len(s), dtype=s.dtype), share
    if zero_mode:
        s = torch.where(counts, s, 0.0)
        counts, real = torch.ones_like(counts), counts
    else:
        real = counts
    if temperature:
        x = torch.where(counts, s / temperature, -torch.inf)
        share = torch.softmax(x, 1) * real
        return temperature * torch.logsumexp(x, 1), share
    filled = torch.where(counts, s, -torch.inf)
    k = min(topk, int(counts.sum()))
    order = torch.argsort(filled, dim=1, descending=True, stable=True)[:, :k]
    share[rows[:, None], order] = 1.0 / k
    m = (torch.where(share > 0, filled, 0.0) * share).sum(1)
    return m, share * real
