"""examples/late_interaction_adapters.py against formulas written from the packages' documentation, and the packages.

PyLate and sentence-transformers cannot share an environment; each is compared where it is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from test_examples import _load
from torch import Tensor

adapters = _load("late_interaction_adapters")
NEAR = {"rtol": 0.0, "atol": oracle.GOLDEN}


def make(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def holes(*shape: int) -> Tensor:
    """A 0/1 mask with holes; of each sequence the first token counts."""
    mask = (torch.rand(*shape) < 0.6).double()
    mask[..., 0] = 1
    return mask


# --- formulas -------------------------------------------------------------------------------------------------


def zero_formula(q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None) -> Tensor:
    """PyLate: similarities times both masks, maximum over documents' tokens, sum over the query's. d: [B, Ld, d]."""
    s = torch.einsum("ash,bth->abst", q, d)
    s = s if q_mask is None else s * q_mask[:, None, :, None]
    s = s if d_mask is None else s * d_mask[None, :, None, :]
    return s.max(-1).values.sum(-1)


def exclude_formula(a: list[Tensor], b: list[Tensor], a_mask: Any, b_mask: Any, mean: bool) -> Tensor:
    """sentence-transformers, one pair at a time: masked tokens taken out, -1e9 for a document without tokens."""
    rows = []
    for i, query in enumerate(a):
        w = torch.ones(len(query)) if a_mask is None else a_mask[i][: len(query)]
        count = max(int((w != 0).sum()), 1) if mean else 1
        row = []
        for j, document in enumerate(b):
            kept = document if b_mask is None else document[b_mask[j][: len(document)] != 0]
            score = torch.tensor(-1e9) if len(kept) == 0 else ((query @ kept.T).amax(1) * w).sum()
            row.append(float(score) / count)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


# --- PyLate ---------------------------------------------------------------------------------------------------

COLBERT = ("plain", "masks", "empty document")


def colbert_case(kind: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    # Negative similarities, so that the floor of 0 a masked token sets is seen.
    q, d = make(3, 5, 8).abs(), -make(4, 7, 8).abs() + 0.3 * make(4, 7, 8)
    q_mask, d_mask = (None, None) if kind == "plain" else (holes(3, 5), holes(4, 7))
    if kind == "empty document":
        d_mask[2] = 0
    return q, d, q_mask, d_mask


def assert_same_with_gradients(got: Callable[..., Tensor], want: Callable[..., Tensor], q: Tensor, d: Tensor) -> None:
    outcomes = []
    for scores in (got, want):
        leaves = [x.clone().requires_grad_() for x in (q, d)]
        value = scores(*leaves)
        upstream = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
        outcomes.append((value.detach(), *torch.autograd.grad(value, leaves, upstream)))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, **NEAR)


@pytest.mark.parametrize("kind", COLBERT)
def test_colbert_scores(kind: str) -> None:
    q, d, q_mask, d_mask = colbert_case(kind)
    assert_same_with_gradients(
        lambda q, d: adapters.colbert_scores(q, d, q_mask, d_mask),
        lambda q, d: zero_formula(q, d, q_mask, d_mask),
        q, d,
    )  # fmt: skip
    if kind == "masks":  # the convention matters here: excluding gives other numbers
        masks = [m != 0 for m in (q_mask, d_mask)]
        excluded = adapters.pyelastic.maxsim(q, d, query_mask=masks[0], document_mask=masks[1])
        assert (excluded - zero_formula(q, d, q_mask, d_mask)).abs().max() > 0.1


@pytest.mark.parametrize("kind", COLBERT)
def test_colbert_kd_scores_and_groups(kind: str) -> None:
    q, d, q_mask, d_mask = colbert_case(kind)
    d, d_mask = torch.stack([d, 2 * d.flip(0)], 1)[:3], None if d_mask is None else torch.stack([d_mask] * 2, 1)[:3]

    def kd(q: Tensor, d: Tensor) -> Tensor:
        rows = [(q[i : i + 1], d[i], *(None if m is None else m[i] for m in (q_mask, d_mask))) for i in range(3)]
        return torch.cat([zero_formula(a, b, None if c is None else c[None], e) for a, b, c, e in rows])

    def groups(q: Tensor, d: Tensor) -> Tensor:
        return zero_formula(q, d.flatten(0, 1), q_mask, None if d_mask is None else d_mask.flatten(0, 1))

    assert_same_with_gradients(lambda q, d: adapters.colbert_kd_scores(q, d, q_mask, d_mask), kd, q, d)
    assert_same_with_gradients(lambda q, d: adapters.ColBERTScores()(q, d, q_mask, d_mask), groups, q, d)


def test_colbert_takes_lists_and_arrays() -> None:
    q, d, q_mask, d_mask = colbert_case("masks")
    want = adapters.colbert_scores(q, d, q_mask, d_mask)
    assert torch.equal(adapters.colbert_scores(list(q), d.numpy(), q_mask.tolist(), list(d_mask)), want)
    ragged_q, ragged_d = [q[0, :2], q[1], q[2, :4]], [d[0], d[1, :3], d[2, :1]]
    each = [zero_formula(a[None], b[None], None, None)[0, 0] for a, b in zip(ragged_q, ragged_d, strict=True)]
    torch.testing.assert_close(adapters.colbert_scores_pairwise(ragged_q, ragged_d), torch.stack(each), **NEAR)
    both = adapters.colbert_scores_pairwise(q, d[:3])
    torch.testing.assert_close(both, zero_formula(q, d[:3], None, None).diagonal(), **NEAR)


# --- sentence-transformers ------------------------------------------------------------------------------------


def sentence_cases() -> dict[str, tuple[Any, Any, Any, Any]]:
    """Name -> a, b, a_mask, b_mask; scored in float32, as the package always does."""
    a, b = make(3, 5, 8).float(), -make(3, 7, 8).float().abs() + 0.3 * make(3, 7, 8).float()
    padded_a, padded_b = a.clone(), b.clone()
    padded_a[1, 3:], padded_b[2, 2:], padded_b[0] = 0, 0, 0
    ragged_a, ragged_b = [a[0, :2], a[1], a[2, :4]], [b[0], b[1, :3], b[2, :0]]
    masked_b = holes(3, 7).float()
    masked_b[1] = 0
    return {
        "padded, zero rows": (padded_a, padded_b, None, None),
        "masks": (a, b, holes(3, 5).bool(), masked_b),
        "weights": (a, b, holes(3, 5).float() * 0.5, None),
        "ragged": (ragged_a, ragged_b, None, None),
        "ragged, arrays": ([x.numpy() for x in ragged_a], [x.numpy() for x in ragged_b], None, None),
        "ragged, list of masks": (ragged_a, ragged_b, None, [holes(7)[: len(x)].bool() for x in ragged_b]),
        "one": (a[0], b[0].numpy(), None, holes(7).bool()),
    }


def as_items(x: Any, mask: Any) -> tuple[list[Tensor], Any]:
    """The case in the formula's terms: a list of [tokens, d], and a mask per item or None."""
    dense = not isinstance(x, list)
    items = [torch.as_tensor(item) for item in (x[None] if dense and x.ndim == 2 else x)]
    if mask is None:
        return items, [item.any(-1).float() for item in items] if dense else None
    return items, mask[None] if isinstance(mask, Tensor) and mask.ndim == 1 else mask


@pytest.mark.parametrize("mean", (False, True))
@pytest.mark.parametrize("name", sentence_cases())
def test_sentence_transformers(name: str, mean: bool) -> None:
    a, b, a_mask, b_mask = sentence_cases()[name]
    (items_a, masks_a), (items_b, masks_b) = as_items(a, a_mask), as_items(b, b_mask)
    want = exclude_formula(items_a, items_b, masks_a, masks_b, mean)
    got = adapters.maxsim(a, b, a_mask, b_mask, length_normalize=mean, chunk_elements=10)
    near = {"rtol": 2e-6, "atol": 2e-6}  # float32 sums of 5 products of 8 terms
    torch.testing.assert_close(got.double(), want, **near)
    assert got.dtype == torch.float32
    pairs = adapters.maxsim_pairwise(a, b, a_mask, b_mask, length_normalize=mean)
    torch.testing.assert_close(pairs.double(), want.diagonal(), **near)


def test_sentence_transformers_edges() -> None:
    a = make(2, 3, 4)
    assert adapters.maxsim([], a).shape == (0, 2) and adapters.maxsim(a, []).shape == (2, 0)
    assert adapters.maxsim_pairwise([], []).shape == (0,)
    with pytest.raises(ValueError, match="same number of items to score as pairs, not 2 and 1"):
        adapters.maxsim_pairwise(a, a[:1])
    whole = np.array([[[3, -4]], [[1, 2]]])  # integers, as of quantised embeddings
    assert adapters.maxsim(whole, whole).tolist() == [[25.0, -5.0], [-5.0, 5.0]]


# --- the packages themselves ----------------------------------------------------------------------------------


@pytest.mark.skipif(not importlib.util.find_spec("pylate"), reason="PyLate is not installed")
@pytest.mark.parametrize("kind", COLBERT)
def test_pylate_itself(kind: str) -> None:
    from pylate import scores

    q, d, q_mask, d_mask = colbert_case(kind)
    groups, masks = torch.stack([d, 2 * d], 1)[:3], None if d_mask is None else torch.stack([d_mask] * 2, 1)[:3]
    for name, documents, mask in (
        ("colbert_scores", d, d_mask), ("colbert_kd_scores", groups, masks), ("ColBERTScores", groups, masks)
    ):  # fmt: skip
        theirs, ours = getattr(scores, name), getattr(adapters, name)
        theirs, ours = (theirs(), ours()) if name == "ColBERTScores" else (theirs, ours)
        assert_same_with_gradients(
            lambda q, d, f=ours, m=mask: f(q, d, q_mask, m),
            lambda q, d, f=theirs, m=mask: f(q, d, q_mask, m, backend="torch"),
            q, documents,
        )  # fmt: skip
    pairwise = scores.colbert_scores_pairwise(q, d[:3], backend="torch")
    torch.testing.assert_close(adapters.colbert_scores_pairwise(q, d[:3]), pairwise, **NEAR)


@pytest.mark.skipif(not importlib.util.find_spec("sentence_transformers"), reason="not installed")
@pytest.mark.parametrize("mean", (False, True))
@pytest.mark.parametrize("name", sentence_cases())
def test_sentence_transformers_itself(name: str, mean: bool) -> None:
    util = pytest.importorskip("sentence_transformers.util")
    if not hasattr(util, "maxsim"):
        pytest.skip("sentence-transformers before 6")
    a, b, a_mask, b_mask = sentence_cases()[name]
    for function in ("maxsim", "maxsim_pairwise"):
        want = getattr(util, function)(a, b, a_mask, b_mask, length_normalize=mean)
        got = getattr(adapters, function)(a, b, a_mask, b_mask, length_normalize=mean)
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
