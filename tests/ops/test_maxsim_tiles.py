"""maxsim's cpu kernel of bfloat16 tokens around the edges of AMX's tiles: 16 and 32 tokens, 32 of the dimension.

Elsewhere the same sizes are edges of other kernels, or none.
"""

from typing import Any

import backends
import oracle
import pytest
import torch
from maxsim_cases import Case, call, compare, make, masks, truth_of

import pyelastic
from pyelastic.quantized import quantize_int8


@pytest.fixture(autouse=True)
def built() -> None:
    backends.require("cpu")


def tokens(**sizes: Any) -> Case:
    return make(**{"dtype": torch.bfloat16, "nq": 2, "nd": 3, "dim": 64, **sizes})


# The last is more than one stretch of tokens that stays in L2 (1,020 at 128).
@pytest.mark.parametrize("ld", (15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 1050))
@pytest.mark.parametrize("dim", (32, 40, 128))
def test_documents(ld: int, dim: int) -> None:
    compare("cpu", tokens(ld=ld, dim=dim, lq=35))


OPTIONS = {
    "normalize": {"normalize": True},
    "prefixes": {"dims": (32, 64)},
    "prefixes, normalize": {"dims": (32, 64), "normalize": True},
    "a prefix within a tile": {"dims": (10, 64)},
    "topk": {"topk": 3},
    "smooth": {"temperature": 0.5, "normalize": True},
    "zero mode": {"mask_mode": "zero"},
}


@pytest.mark.parametrize("layout", ("single", "cross", "grouped", "list"))
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("ld", (40, 60))
def test_options(layout: str, name: str, ld: int) -> None:
    """Masks leave about 0.6 of the tokens, copied."""
    compare("cpu", masks(tokens(layout=layout, ld=ld)).having(**OPTIONS[name]))


@pytest.mark.parametrize("gap", (1, 6))
def test_rows_with_gaps(gap: int) -> None:
    """Rows at odd distances, and at such that no two are aligned alike."""
    case = tokens(ld=50)
    wide = torch.full((3, 50, 64 + gap), float("nan"), dtype=torch.bfloat16)
    wide[..., :64] = case.documents
    compare("cpu", Case(case.queries, wide[..., :64], case.options))


def test_int8() -> None:
    case = masks(tokens(ld=70))
    codes = quantize_int8(case.documents.float())
    truth, K = truth_of(Case(case.queries, codes.decode(), case.options))
    got = pyelastic.maxsim(case.queries, codes, backend="cpu", **case.options)
    oracle.check(got.reshape(truth.scores.shape), truth.scores, A=truth.A_scores, K=K, name="int8")


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("options", ({}, {"normalize": True}, {"topk": 3}), ids=str)
@pytest.mark.parametrize("at", (0, 20, 34, 36))
def test_not_finite(value: float, options: dict[str, Any], at: int) -> None:
    """NaN and Inf reach the scores of the pairs they belong to and no others, from each part of a document."""
    case = tokens(ld=37).having(**options)
    case.documents[1, at] = 0.0
    case.documents[1, at, 0] = value
    case.queries[..., 0] = case.queries[..., 0].abs() + 0.1
    out, want = (call(backend, case)[0].detach() for backend in ("cpu", "eager"))
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(out.isposinf(), want.isposinf())
    assert torch.equal(out.isneginf(), want.isneginf())
    assert out[:, [0, 2]].isfinite().all()


def test_first_winner() -> None:
    """Equal tokens: the first takes the whole gradient, also where a tile begins before the tokens that are left."""
    token = torch.randn(64, generator=torch.Generator().manual_seed(2)).bfloat16()
    documents = torch.stack([torch.cat((-token[None], token.expand(40, 64)))] * 2)
    documents[1, 1:35] *= 0.5
    d = documents.requires_grad_()
    pyelastic.maxsim(token.expand(1, 2, 64), d, backend="cpu").sum().backward()
    assert d.grad is not None
    assert d.grad.float().abs().sum(-1).nonzero()[:, 1].tolist() == [1, 35]


def test_a_nan_stays_beside_what_comes_after_it() -> None:
    """A maximum that has met NaN keeps it."""
    q = torch.ones(1, 1, 32, dtype=torch.bfloat16)
    d = torch.ones(1, 80, 32, dtype=torch.bfloat16)
    d[0, 3, 0] = float("nan")
    d[0, 50] = 7.0
    assert pyelastic.maxsim(q, d, backend="cpu").isnan().all()
