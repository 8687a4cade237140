"""Late interaction as a module: heads, normalisation, MaxSim and the loss in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyelastic import _errors
from pyelastic.nn.projection import DenseBlock, ProjectionHead
from pyelastic.ops.maxsim import maxsim
from pyelastic.ops.maxsim_losses import maxsim_info_nce, maxsim_kl_distill, maxsim_margin_mse

LOSSES: dict[str, Any] = {"info_nce": maxsim_info_nce, "kl_distill": maxsim_kl_distill, "margin_mse": maxsim_margin_mse}


class LateInteraction(nn.Module):
    """Token states of queries and documents -> loss (``forward``) or scores (``score``).

    Args:
        head: ``ProjectionHead`` of the documents, and of the queries unless ``query_head`` is given.
        loss: ``"info_nce"``, ``"kl_distill"`` or ``"margin_mse"``; the last two take ``teacher_scores`` in ``forward``.
        options: further keyword arguments of the loss for every call, e.g. ``temperature``; ``forward`` takes them too.

    Gradients of a document token that won nowhere are zero, and the last layer leaves such rows out of its backward
    where they are the most: on the CPU it counts them, on a GPU the k-negatives layout bounds them by shape.
    """

    def __init__(
        self,
        head: ProjectionHead,
        query_head: ProjectionHead | None = None,
        *,
        loss: str = "info_nce",
        **options: Any,
    ) -> None:
        super().__init__()
        _errors.check_choice("LateInteraction", "loss", loss, tuple(LOSSES))
        self.head = head
        self.query_head = head if query_head is None else query_head
        self.loss, self.options = loss, options

    def forward(
        self, queries: Tensor, documents: Tensor, teacher_scores: Tensor | None = None, **options: Any
    ) -> Tensor:
        """queries [Nq, Lq, d_in], documents [Nd, Ld, d_in] or [Nq, K, Ld, d_in], or packed: the loss."""
        if (teacher_scores is None) != (self.loss == "info_nce"):
            raise ValueError(
                f"LateInteraction: loss is {self.loss!r}; teacher_scores go with the others, and they need them"
            )
        given = () if teacher_scores is None else (teacher_scores,)
        options = {**self.options, **options}
        bound = None
        if documents.ndim == 4 and queries.ndim == 3 and not options.get("smooth_temperature"):
            # Each query token has one winner in each of its documents, or topk of them, per prefix.
            winners = options.get("topk", 1) * len(options.get("dims") or (1,))
            bound = documents.shape[0] * documents.shape[1] * queries.shape[1] * winners
        q, d = self.query_head(queries), self.head(documents, bound)
        loss: Tensor = LOSSES[self.loss](q, d, *given, **options)
        return loss

    def score(self, queries: Tensor, documents: Tensor, **options: Any) -> Tensor:
        """Scores of token states, by ``pyelastic.maxsim`` with ``options``."""
        return maxsim(self.query_head(queries), self.head(documents), **options)

    def _matrix(self) -> Tensor:
        """W [d_out, d_in] of the documents' head, linear as a whole and without bias."""
        block = self.head.fold().blocks[0]
        assert isinstance(block, DenseBlock)
        if block.linear.bias is not None:
            raise ValueError("LateInteraction: absorbed scoring needs a head without bias")
        return block.linear.weight

    @torch.no_grad()
    def absorb_queries(self, queries: Tensor) -> Tensor:
        """W^T q of the projected query tokens, [..., d_in]: for ``absorbed_documents``.

        <q, W h / |W h|> = <W^T q, h / |W h|>: scoring reads the documents' own states, and projects none. Fewer
        operations than projecting them where a query has fewer tokens than about d_out. Raises ValueError unless the
        documents' head folds and has no bias.
        """
        q = self.query_head(queries)
        return q @ self._matrix().to(q.dtype)

    @torch.no_grad()
    def absorb_documents(self, documents: Tensor) -> Tensor:
        """Token states divided by the norm of their projection, h / |W h|, [..., d_in]: made once, for any queries."""
        if not self.head.normalize:
            return documents
        dtype = torch.float64 if documents.dtype == torch.float64 else torch.float32
        norm = (documents.to(dtype) @ self._matrix().to(dtype).T).norm(dim=-1, keepdim=True)
        return (documents / norm.clamp(min=1e-12)).to(documents.dtype)
