"""pyelastic behind the scoring functions of PyLate 1.6 and sentence-transformers 6.2, same names, arguments, results.

    pylate.losses.Contrastive(model, score_metric=adapters.ColBERTScores())
    pylate.losses.Distillation(model, score_metric=adapters.colbert_kd_scores)
    sentence_transformers.multi_vector_encoder.scoring.colbert.maxsim = adapters.maxsim  # its losses
    sentence_transformers.util.similarity.maxsim = adapters.maxsim                       # mean_maxsim

Differences: scores are float32 for 16-bit inputs (PyLate: the inputs' dtype); ``backend`` takes pyelastic's names;
PyLate's masks count as 0 or not 0; ``chunk_elements`` is ignored, as there is no tensor of similarities to divide.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyelastic

Embeddings = Any  # Tensor, ndarray, or a list of either: as the two packages take them
EMPTY_DOCUMENT = -1e9  # the score sentence-transformers gives a document without tokens


# --- PyLate: a masked token's similarity is multiplied by 0


def _stacked(x: Embeddings) -> Tensor:
    if isinstance(x, list):
        return torch.stack([torch.as_tensor(item) for item in x])
    return torch.as_tensor(x)


def colbert_scores(
    queries_embeddings: Embeddings,
    documents_embeddings: Embeddings,
    queries_mask: Embeddings | None = None,
    documents_mask: Embeddings | None = None,
    backend: str | None = None,
) -> Tensor:
    """Queries [A, Lq, d], documents [B, Ld, d], masks [A, Lq] and [B, Ld]: scores [A, B]."""
    return pyelastic.maxsim(
        _stacked(queries_embeddings),
        _stacked(documents_embeddings),
        query_mask=None if queries_mask is None else _stacked(queries_mask) != 0,
        document_mask=None if documents_mask is None else _stacked(documents_mask) != 0,
        mask_mode="zero",
        backend=backend or "auto",
    )


colbert_kd_scores = colbert_scores  # documents [A, K, Ld, d], masks [A, K, Ld]: each query's own, scores [A, K]


class ColBERTScores:
    """Queries [A, Lq, d], documents in groups [B, N, Ld, d], all against all in one call: scores [A, B N]."""

    def __call__(
        self, queries_embeddings: Embeddings, documents_embeddings: Embeddings, queries_mask: Embeddings | None = None,
        documents_mask: Embeddings | None = None, backend: str | None = None,
    ) -> Tensor:  # fmt: skip
        documents = _stacked(documents_embeddings).flatten(0, 1)
        mask = None if documents_mask is None else _stacked(documents_mask).flatten(0, 1)
        return colbert_scores(queries_embeddings, documents, queries_mask, mask, backend)


def colbert_scores_pairwise(
    queries_embeddings: Embeddings, documents_embeddings: Embeddings, backend: str | None = None
) -> Tensor:
    """Query i with document i: scores [A]. The items may differ in length."""
    q, _, cu_q = _packed(list(queries_embeddings), None, None)
    d, _, cu_d = _packed(list(documents_embeddings), None, None)
    return pyelastic.maxsim(q, d, layout="pairs", cu_seqlens_q=cu_q, cu_seqlens_d=cu_d, backend=backend or "auto")


# --- sentence-transformers: a masked token does not exist


def _device(x: Embeddings) -> torch.device | None:
    first = x[0] if isinstance(x, list) and x else x
    return first.device if isinstance(first, Tensor) else None


def _packed(x: Any, mask: Any, device: torch.device | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Tokens [T, d], their mask [T] or None, and where each item begins: [N + 1]."""
    if not isinstance(x, list):
        x = torch.as_tensor(x)
        if mask is None:
            mask = x.any(-1)  # a padded batch without a mask: rows of zeros are padding
    items = [torch.as_tensor(item).to(device) for item in x]
    items = [item if item.is_floating_point() else item.float() for item in items]
    offsets = torch.tensor([0, *accumulate(len(item) for item in items)], device=items[0].device)
    if mask is not None:
        each = zip(mask, items, strict=True)
        mask = torch.cat([torch.as_tensor(row)[: len(item)].to(item.device) for row, item in each])
    return torch.cat(items), mask, offsets


def _batch(x: Embeddings, mask: Embeddings | None) -> tuple[Embeddings, Embeddings | None]:
    """A lone item [tokens, d] becomes a batch of one."""
    if isinstance(x, (Tensor, np.ndarray)) and x.ndim == 2:
        return x[None], mask[None] if isinstance(mask, (Tensor, np.ndarray)) and mask.ndim == 1 else mask
    return x, mask


def _scores(layout: str, a: Any, b: Any, a_mask: Any, b_mask: Any, length_normalize: bool, device: Any) -> Tensor:
    (a, a_mask), (b, b_mask) = _batch(a, a_mask), _batch(b, b_mask)
    home = _device(b) or _device(a) or torch.device("cpu")
    if layout == "pairs" and len(a) != len(b):
        raise ValueError(f"`a` and `b` must hold the same number of items to score as pairs, not {len(a)} and {len(b)}")
    if len(a) == 0 or len(b) == 0:
        return torch.zeros((0,) if layout == "pairs" else (len(a), len(b)), device=home)
    q, q_mask, cu_q = _packed(a, a_mask, torch.device(device or home))
    d, d_mask, cu_d = _packed(b, b_mask, torch.device(device or home))
    weighted = q_mask is not None and q_mask.is_floating_point()
    scores = pyelastic.maxsim(
        q, d, layout=layout, cu_seqlens_q=cu_q, cu_seqlens_d=cu_d,
        query_mask=None if q_mask is None else q_mask != 0, document_mask=None if d_mask is None else d_mask != 0,
        token_weights=q_mask if weighted else None, empty_score=EMPTY_DOCUMENT,
    ).float()  # fmt: skip
    if length_normalize:
        real = torch.ones_like(q[:, 0], dtype=torch.int64) if q_mask is None else (q_mask != 0).long()
        running = torch.cat((real.new_zeros(1), real.cumsum(0)))
        counts = (running[cu_q[1:]] - running[cu_q[:-1]]).clamp(min=1)
        scores = scores / (counts if layout == "pairs" else counts[:, None])
    return scores.to(home)


def maxsim(
    a: Embeddings, b: Embeddings, a_mask: Embeddings | None = None, b_mask: Embeddings | None = None,
    chunk_elements: int | None = None, length_normalize: bool = False, device: str | torch.device | None = None,
) -> Tensor:  # fmt: skip
    """Every item of ``a`` against every item of ``b``: [len(a), len(b)]. Lists are packed, not padded."""
    return _scores("cross", a, b, a_mask, b_mask, length_normalize, device)


def maxsim_pairwise(
    a: Embeddings, b: Embeddings, a_mask: Embeddings | None = None, b_mask: Embeddings | None = None,
    chunk_elements: int | None = None, length_normalize: bool = False, device: str | torch.device | None = None,
) -> Tensor:  # fmt: skip
    """Item i of ``a`` against item i of ``b``: [len(a)]."""
    return _scores("pairs", a, b, a_mask, b_mask, length_normalize, device)
