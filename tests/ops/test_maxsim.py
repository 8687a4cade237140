"""maxsim against its formulas: PyLate's golden file, layouts, masks, reductions, sizes, ties, the tolerance proof."""

from pathlib import Path
from typing import Any

import backends
import numpy as np
import oracle
import pytest
import torch
from maxsim_cases import (
    BACKENDS,
    DTYPES,
    LAYOUTS,
    OP,
    Case,
    call,
    compare,
    make,
    masks,
    over_backends,
    sides,
    truth_of,
    upstream_of,
)
from torch import Tensor

import pyelastic

DATA = Path(__file__).parent.parent / "data"


def golden() -> dict[str, Tensor]:
    """Written by PyLate 1.6.0's torch path in float64."""
    with np.load(DATA / "maxsim_pylate.npz") as file:
        return {k: torch.from_numpy(file[k]) for k in file.files}


@over_backends
def test_golden_float64(backend: str) -> None:
    backends.skip_unsupported(OP, backend, torch.float64)
    data = golden()
    q, d = data["queries"].clone().requires_grad_(), data["documents"].clone().requires_grad_()
    options = {"query_mask": data["queries_mask"] != 0, "document_mask": data["documents_mask"] != 0}
    scores = pyelastic.maxsim(q, d, mask_mode="zero", backend=backend, **options)
    scores.backward(data["grad_scores"])
    near = {"rtol": 0.0, "atol": oracle.GOLDEN}
    torch.testing.assert_close(scores.detach(), data["scores"], **near)
    torch.testing.assert_close(q.grad, data["grad_queries"], **near)
    torch.testing.assert_close(d.grad, data["grad_documents"], **near)
    plain = pyelastic.maxsim(data["queries"], data["documents"], backend=backend)
    torch.testing.assert_close(plain, data["scores_unmasked"], **near)


@over_backends
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_golden_inputs_by_the_oracle(backend: str, dtype: torch.dtype) -> None:
    data = golden()
    options = {"query_mask": data["queries_mask"] != 0, "document_mask": data["documents_mask"] != 0}
    case = Case(data["queries"].to(dtype), data["documents"].to(dtype), {**options, "mask_mode": "zero"})
    compare(backend, case, data["grad_scores"].float()[None])


def test_the_reference_reproduces_the_golden_file() -> None:
    """The reference is code too; a file it did not write holds it to account."""
    data = golden()
    options = {"query_mask": data["queries_mask"] != 0, "document_mask": data["documents_mask"] != 0}
    case = Case(data["queries"], data["documents"], {**options, "mask_mode": "zero"})
    truth, _ = truth_of(case, data["grad_scores"][None])
    near = {"rtol": 0.0, "atol": oracle.GOLDEN}
    torch.testing.assert_close(truth.scores[0].view(5, 6), data["scores"], **near)
    torch.testing.assert_close(truth.grad_q.view(5, 7, 24), data["grad_queries"], **near)
    torch.testing.assert_close(truth.grad_d.view(6, 19, 24), data["grad_documents"], **near)


@over_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout(backend: str, layout: str, dtype: torch.dtype) -> None:
    compare(backend, make(layout, dtype=dtype))


@over_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ("exclude", "zero"))
def test_masks(backend: str, layout: str, mode: str) -> None:
    """Holes on both sides, a document of masked tokens alone; what masked tokens hold is NaN and must not matter."""
    case = masks(make(layout)).having(mask_mode=mode)
    case.queries[~case.options["query_mask"]] = torch.nan
    case.documents[~case.options["document_mask"]] = torch.nan
    compare(backend, case)


OPTIONS: dict[str, dict[str, Any]] = {
    "normalize": {"normalize": True},
    "mean": {"reduction": "mean"},
    "topk 3": {"topk": 3},
    "topk of more than there are": {"topk": 30, "normalize": True},
    "smooth": {"temperature": 0.5},
    "smooth, sharp": {"temperature": 0.05, "normalize": True},
    "prefixes": {"dims": (4, 11, 20)},
    "prefixes, normalize": {"dims": (4, 10, 20), "normalize": True},
    "one prefix": {"dims": (12,), "normalize": True},
    "recompute": {"save": "recompute", "normalize": True},
    "recompute smooth": {"save": "recompute", "temperature": 0.5},
    "recompute prefixes": {"save": "recompute", "dims": (4, 20)},
}


@over_backends
@pytest.mark.parametrize("layout", ("cross", "packed", "grouped"))
@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend: str, layout: str, name: str) -> None:
    compare(backend, masks(make(layout)).having(**OPTIONS[name]))


@over_backends
@pytest.mark.parametrize("name", ("topk 3", "smooth"))
def test_zero_mode_of_other_reductions(backend: str, name: str) -> None:
    compare(backend, masks(make()).having(mask_mode="zero", **OPTIONS[name]))


@over_backends
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("name", ("normalize", "topk 3", "smooth", "prefixes, normalize"))
def test_options_in_other_dtypes(backend: str, dtype: torch.dtype, name: str) -> None:
    compare(backend, masks(make(dtype=dtype)).having(**OPTIONS[name]))


@over_backends
@pytest.mark.parametrize(
    ("q", "d"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float16, torch.float32)]
)
def test_mixed_dtypes(backend: str, q: torch.dtype, d: torch.dtype) -> None:
    compare(backend, make(dtype=q, d_dtype=d))


@over_backends
@pytest.mark.parametrize("dim", (1, 2, 48, 64, 96, 100, 128, 256, 768))
def test_dimension(backend: str, dim: int) -> None:
    compare(backend, make(nq=2, nd=2, lq=3, ld=5, dim=dim))


@over_backends
@pytest.mark.parametrize("lq", (1, 15, 31, 33, 65))
@pytest.mark.parametrize("ld", (1, 13, 65))
def test_lengths(backend: str, lq: int, ld: int) -> None:
    """One and around the tiles."""
    compare(backend, make(nq=2, nd=3, lq=lq, ld=ld, dim=8, dtype=torch.bfloat16))


@over_backends
@pytest.mark.parametrize(
    ("nq", "nd", "lq", "ld"), [(0, 3, 4, 5), (3, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 0, 4, 5)]
)
@pytest.mark.parametrize("options", ({}, {"normalize": True}, {"temperature": 0.5}, {"reduction": "none"}), ids=str)
def test_empty(backend: str, nq: int, nd: int, lq: int, ld: int, options: dict[str, Any]) -> None:
    """Nothing on a side: scores 0, gradients 0, right shapes."""
    out, q, d = call(backend, make(nq=nq, nd=nd, lq=lq, ld=ld).having(**options))
    assert out.shape == ((nq, nd, lq) if "reduction" in options else (nq, nd)) and not out.any()
    out.sum().backward()
    assert q.grad.shape == q.shape and d.grad.shape == d.shape
    assert not q.grad.any() and not d.grad.any()


@over_backends
@pytest.mark.parametrize("options", ({}, {"temperature": 0.5}, {"reduction": "none"}), ids=str)
def test_no_pairs(backend: str, options: dict[str, Any]) -> None:
    """An empty list is not all pairs."""
    case = make("list").having(pairs=torch.zeros(0, 2, dtype=torch.int64), **options)
    out, q, d = call(backend, case)
    assert out.shape == ((0, 7) if "reduction" in options else (0,))
    out.sum().backward()
    assert not q.grad.any() and not d.grad.any()


@over_backends
def test_empty_score(backend: str) -> None:
    case = masks(make())
    out, _, d = call(backend, case.having(empty_score=-7.0))
    plain, *_ = call(backend, case)
    assert (out[:, 0] == -7.0).all() and torch.equal(out[:, 1:], plain[:, 1:]) and (plain[:, 0] == 0).all()
    out.sum().backward()
    assert not d.grad[0].any() and d.grad[1].any()


@over_backends
@pytest.mark.parametrize("layout", ("cross", "packed", "grouped", "list"))
def test_values_of_tokens(backend: str, layout: str) -> None:
    """reduction="none": each token's value, with a gradient of its own."""
    case = masks(make(layout, dtype=torch.float32))
    out, q, _ = call(backend, case.having(reduction="none"))
    truth, K = truth_of(case)
    sequences, _, pairs = sides(case)
    rows = out.reshape(-1, out.shape[-1])
    for p, (i, _) in enumerate(pairs):
        w = sequences.weights[sequences.span(i)]
        want = torch.zeros(out.shape[-1], dtype=torch.float64)
        want[: len(w)] = truth.tokens[0][p] * w
        A = want.abs() + truth.A_scores[0, p]
        oracle.check(rows[p], want, A=A, K=K, name="tokens")
    # The sum over tokens of one query's values is its score, and so are the gradients.
    upstream = upstream_of(case).reshape(out.shape[:-1])
    out.backward(upstream[..., None].expand(out.shape).to(out.device))
    score, q2, _ = call(backend, case)
    score.backward(upstream.to(score.device))
    torch.testing.assert_close(q.grad, q2.grad, rtol=1e-5, atol=1e-5)


@over_backends
def test_token_weights(backend: str) -> None:
    """Weights, negative and zero ones too, and their gradient."""
    weights = torch.tensor([0.5, -1.0, 0.0, 2.0, 1.0, 0.25, 3.0]).repeat(3, 1)
    compare(backend, make().having(token_weights=weights))
    compare(backend, masks(make()).having(token_weights=weights, reduction="mean"))
    case = make()
    w = weights.clone().to(backends.device_of(backend)).requires_grad_()
    out, *_ = call(backend, case.having(token_weights=w))
    out.backward(upstream_of(case).reshape(out.shape).to(out.device))
    truth, K = truth_of(case)
    m = torch.stack(truth.tokens[0]).view(3, 4, 7)
    g = upstream_of(case).double().view(3, 4, 1)
    # A weight of 0 drops its token, whatever it holds: no gradient either.
    want = torch.where(weights == 0, 0.0, (g * m).sum(1))
    A = (g.abs() * 60.0).sum(1).expand(3, 7)
    oracle.check(w.grad, want, A=A, K=K, name="dw")


@over_backends
def test_first_winner(backend: str) -> None:
    """Equal tokens: the first takes the whole gradient, as in x.max(dim); across tiles too."""
    token = torch.randn(8, generator=torch.Generator().manual_seed(2))
    documents = torch.stack([torch.cat((-token[None], token.expand(40, 8)))] * 2)
    documents[1, 1:3] *= 0.5
    q = token.expand(1, 2, 8).to(backends.device_of(backend))
    d = documents.to(q.device).requires_grad_()
    pyelastic.maxsim(q, d, backend=backend).sum().backward()
    winners = d.grad.abs().sum(-1).nonzero()[:, 1].tolist()
    assert winners == [1, 3]


@over_backends
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("name", ("plain", "topk 3", "smooth"))
def test_not_finite(backend: str, value: float, name: str) -> None:
    """NaN and Inf reach the scores of the pairs they belong to and no others."""
    case = make(nq=2, nd=3, dim=4).having(**OPTIONS.get(name, {}))
    case.documents[1, 2] = torch.tensor([value, 0.0, 0.0, 0.0])
    case.queries[..., 0] = case.queries[..., 0].abs() + 0.1
    out, *_ = call(backend, case)
    want, *_ = call("eager", case)
    out, want = out.detach().cpu(), want.detach().cpu()
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(out.isposinf(), want.isposinf())
    assert torch.equal(out.isneginf(), want.isneginf())
    assert out[:, [0, 2]].isfinite().all()
    if value != float("-inf"):
        assert not out[:, 1].isfinite().any()


@over_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ("plain", "normalize", "smooth"))
def test_tolerance_proof(backend: str, dtype: torch.dtype, name: str) -> None:
    """The bound that accepts this backend's result rejects every planted wrong one."""
    case = make(dtype=dtype, nq=4, nd=5).having(**OPTIONS.get(name, {}))
    upstream = upstream_of(case)
    truth, K = truth_of(case, upstream)
    out, q, d = call(backend, case)
    out.backward(upstream.reshape(out.shape).to(out.device))
    acc = oracle.accumulator(dtype)
    scores, A_scores = truth.scores.view(4, 5), truth.A_scores.view(4, 5)
    killed = oracle.prove(out.detach(), scores, A=A_scores, K=K, acc=acc, name="scores")
    for x, want, A in ((q, truth.grad_q, truth.A_q), (d, truth.grad_d, truth.A_d)):
        grad = x.grad.flatten(0, 1)
        other = {"other winners": want.roll(1, 0), "a document dropped": torch.where(want == want[0], 0.0, want)}
        killed += oracle.prove(grad, want, A=A, K=K, acc=acc, name="gradient", also=other)
    assert killed >= 9 + 11 + 11


def test_cpu_and_eager_are_here() -> None:
    """A generated parametrization that lost a backend would pass silently."""
    assert {"eager", "cpu"} <= set(BACKENDS)
