"""maxsim in plain PyTorch: the specification, a backend, and the oracle of the kernels' gradients.

Padded, with the whole similarity tensor: [Nq, Nd, Lq, Ld], or [P, Lq, Ld] for P pairs. Formulas: ops/maxsim.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """What similarities, maxima and scores are computed in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def padded(x: Tensor, offsets: Tensor, length: int) -> Tensor:
    """Rows ``offsets[i] .. offsets[i + 1] - 1`` of x [T, ...] as [N, length, ...]; zeros beyond a sequence's end."""
    at = offsets[:-1, None] + torch.arange(length, device=x.device)
    spare = torch.cat((x, x.new_zeros(1, *x.shape[1:])))
    return spare[torch.where(at < offsets[1:, None], at, x.shape[0])]


def unit_rows(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) over the last dimension, as ``F.normalize``."""
    return torch.nn.functional.normalize(x, dim=-1)


def similarities(
    queries: Tensor,
    documents: Tensor,
    q_offsets: Tensor,
    d_offsets: Tensor,
    document_mask: Tensor | None,
    pair_q: Tensor | None,
    pair_d: Tensor | None,
    max_q: int,
    max_d: int,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """All similarities [Nq, Nd, Lq, Ld] or [P, Lq, Ld], and which document tokens count, broadcastable to them."""
    q, d = padded(queries, q_offsets, max_q), padded(documents, d_offsets, max_d)
    present = torch.ones_like(documents[:, 0], dtype=torch.bool) if document_mask is None else document_mask
    counts = padded(present, d_offsets, max_d)
    # What masked tokens hold must not reach a gradient, not even as 0 * NaN.
    d = torch.where(counts[:, :, None], d, 0.0)
    if normalize:
        q, d = unit_rows(q), unit_rows(d)
    if pair_q is None or pair_d is None:
        return torch.einsum("isd,jtd->ijst", q, d), counts[None, :, None, :]
    return torch.einsum("psd,ptd->pst", q[pair_q], d[pair_d]), counts[pair_d][:, None, :]


def best(s: Tensor, counts: Tensor, floor: Tensor | None, pair_d: Tensor | None) -> tuple[Tensor, Tensor]:
    """Maximum over the last dimension and its first index; (0, -1) where no token counts or a floor of 0 is above.

    floor: [Nd], documents with a masked token under ``mask_mode="zero"``.
    """
    s = torch.where(counts, s, -torch.inf)
    some = counts.any(-1).expand(s.shape[:-1])
    if s.shape[-1] == 0:
        zero = s.sum(-1)
        return zero, torch.full_like(zero, -1, dtype=torch.int64)
    value, index = s.max(-1)
    if floor is not None:
        low = floor[pair_d][:, None] if pair_d is not None else floor[None, :, None]
        some = some & ~(low & (value < 0))
    return torch.where(some, value, 0.0), torch.where(some, index, -1)


def token_scores(
    queries: Tensor,
    documents: Tensor,
    q_offsets: Tensor,
    d_offsets: Tensor,
    document_mask: Tensor | None,
    floor: Tensor | None,
    pair_q: Tensor | None,
    pair_d: Tensor | None,
    max_q: int,
    max_d: int,
    normalize: bool,
    prefixes: list[int],
    topk: int,
    temperature: float,
) -> Tensor:
    """What each query token gets of each document: [n, Nq, Nd, Lq] or [n, P, Lq] for n prefixes.

    ``temperature`` > 0: the smooth maximum ``temperature * log sum exp(s / temperature)``; ``topk`` > 1: the mean of
    the k largest, or of all where there are fewer; else the maximum.
    """
    # Once, before the prefixes: gradients of several must not be added up in 16 bits.
    queries, documents = queries.to(statistics_dtype(queries)), documents.to(statistics_dtype(queries))
    planes = []
    for width in prefixes:
        s, counts = similarities(
            queries[:, :width],
            documents[:, :width],
            q_offsets,
            d_offsets,
            document_mask,
            pair_q,
            pair_d,
            max_q,
            max_d,
            normalize,
        )
        if temperature > 0:
            some = counts.any(-1).expand(s.shape[:-1])
            # An empty row would make logsumexp's gradient NaN: it gets zeros instead of -inf, and is dropped after.
            inside = torch.where(counts, s / temperature, -torch.inf).where(some[..., None], 0.0)
            plane = torch.where(some, temperature * torch.logsumexp(inside, -1), 0.0)
        elif topk > 1:
            filled = torch.where(counts, s, -torch.inf)
            largest = filled.topk(min(topk, s.shape[-1]), -1).values if s.shape[-1] else filled
            n = counts.sum(-1).clamp(1, topk)
            plane = torch.where(largest == -torch.inf, 0.0, largest).sum(-1) / n
        else:
            plane, _ = best(s, counts, floor, pair_d)
        planes.append(plane)
    return torch.stack(planes)


def scores(
    queries: Tensor,
    documents: Tensor,
    q_offsets: Tensor,
    d_offsets: Tensor,
    d_mask: Tensor | None,
    floor: Tensor | None,
    pair_q: Tensor | None,
    pair_d: Tensor | None,
    weights: Tensor | None,
    d_scale: Tensor | None,
    codes: Tensor | None,
    centroids: Tensor | None,
    buckets: Tensor | None,
    prefixes: list[int],
    topk: int,
    temperature: float,
    normalize: bool,
    max_q: int,
    max_d: int,
    per_token: bool,
) -> Tensor:
    """The raw op's result on decoded documents: scores [n, Nq, Nd] or [n, P], or the tokens' m in the kernels' layout,
    [n, Nd, Tq] or [n, P, max_q]."""
    if weights is not None:
        queries = torch.where(weights[:, None] == 0, 0.0, queries)  # 0 * NaN would be NaN
    m = token_scores(
        queries,
        documents,
        q_offsets,
        d_offsets,
        d_mask,
        floor,
        pair_q,
        pair_d,
        max_q,
        max_d,
        normalize,
        prefixes,
        topk,
        temperature,
    )
    inside = torch.arange(max_q, device=m.device) < (q_offsets[1:] - q_offsets[:-1])[:, None]
    if per_token:
        if pair_q is not None:
            return torch.where(inside[pair_q], m, 0.0)
        # [n, Nq, Nd, Lq] -> [n, Nd, Nq, Lq] -> the queries' own tokens
        sequence = torch.repeat_interleave(q_offsets[1:] - q_offsets[:-1], output_size=queries.shape[0])
        within = torch.arange(queries.shape[0], device=m.device) - q_offsets[sequence]
        return m.transpose(1, 2)[:, :, sequence, within]
    w = inside.to(m.dtype) if weights is None else padded(weights[:, None], q_offsets, max_q)[..., 0]
    w = w[pair_q] if pair_q is not None else w[:, None]
    return torch.where(w == 0, 0.0, m * w).sum(-1)
