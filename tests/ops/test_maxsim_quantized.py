"""Quantised documents: the score of what they decode to, and how far that is from the original."""

from typing import Any

import backends
import oracle
import pytest
import torch
from maxsim_cases import Case, make, masks, over_backends, truth_of
from torch import Tensor
from torch.nn import functional as F

import pyelastic
from pyelastic import Int8Tokens, ResidualTokens, quantize_int8, quantize_residual


def centroids(dim: int, count: int = 16) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(9)), dim=1)


def to(tokens: Any, device: torch.device) -> Any:
    return type(tokens)(*(getattr(tokens, name).to(device) for name in tokens.__dataclass_fields__))


KINDS = {
    "int8": quantize_int8,
    "residual 2": lambda x: quantize_residual(x, centroids(x.shape[-1]), 2),
    "residual 4": lambda x: quantize_residual(x, centroids(x.shape[-1]), 4),
}


@over_backends
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ("single", "cross", "grouped", "packed", "list"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_scores_are_those_of_the_decoded_tokens(backend: str, kind: str, layout: str, dtype: torch.dtype) -> None:
    case = make(layout, dtype=dtype)
    case = masks(case) if layout == "cross" else case
    case = case.having(normalize=layout in ("grouped", "list"))
    tokens = KINDS[kind](case.documents.float())
    truth, K = truth_of(Case(case.queries, tokens.decode(), case.options))
    device = backends.device_of(backend)
    told = backends.to_device(backend, case.options)
    reason = pyelastic.backends("maxsim", case.queries.to(device), to(tokens, device), **told)[backend]
    if reason is not None:
        pytest.skip(reason)
    got = pyelastic.maxsim(case.queries.to(device), to(tokens, device), backend=backend, **told)
    assert not got.requires_grad
    oracle.check(got.reshape(truth.scores.shape), truth.scores, A=truth.A_scores, K=K, name=f"{backend} {kind}")


@over_backends
@pytest.mark.parametrize(
    "options", ({"topk": 3}, {"temperature": 0.5}, {"dims": (4, 20)}, {"mask_mode": "zero"}), ids=str
)
def test_other_reductions(backend: str, options: dict[str, Any]) -> None:
    case = masks(make()).having(**options)
    tokens = quantize_int8(case.documents)
    truth, K = truth_of(Case(case.queries, tokens.decode(), case.options))
    device = backends.device_of(backend)
    got = pyelastic.maxsim(
        case.queries.to(device), to(tokens, device), backend=backend, **backends.to_device(backend, case.options)
    )
    oracle.check(got.reshape(truth.scores.shape), truth.scores, A=truth.A_scores, K=K, name=f"{backend} {options}")


@over_backends
def test_gradients_of_queries(backend: str) -> None:
    """Documents have no gradient; queries do, as with the decoded tokens."""
    case = make()
    tokens = quantize_int8(case.documents)
    device = backends.device_of(backend)
    grads = []
    for documents in (to(tokens, device), tokens.decode().to(device)):
        q = case.queries.to(device).requires_grad_()
        pyelastic.maxsim(q, documents, backend=backend).sum().backward()
        grads.append(q.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


def test_int8_is_near() -> None:
    """Half a step per value, and scores within what that allows."""
    x = torch.randn(50, 30, 64, generator=torch.Generator().manual_seed(3))
    tokens = quantize_int8(x)
    assert bool(((tokens.decode() - x).abs() <= 0.5001 * tokens.scale[..., None]).all())
    q = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    exact, near = pyelastic.maxsim(q, x), pyelastic.maxsim(q, tokens)
    allowed = 0.5001 * q.abs().sum() * tokens.scale.amax(1)
    assert bool(((exact - near).abs() <= allowed).all()) and not torch.equal(exact, near)
    zero = quantize_int8(torch.zeros(2, 4))
    assert torch.equal(zero.decode(), torch.zeros(2, 4)) and isinstance(zero, Int8Tokens)


@pytest.mark.parametrize("bits", (2, 4))
def test_residual_codec(bits: int) -> None:
    """Buckets at the quantiles: 2 bits leave less than half of the centroid's error (measured 0.36), 4 less than a
    fifth (0.15): the tails, which buckets of equal counts reach last."""
    c = centroids(32)
    noise = 0.1 * torch.randn(400, 32, generator=torch.Generator().manual_seed(5))
    x = F.normalize(c[torch.arange(400) % 16] + noise, dim=1)
    tokens = quantize_residual(x, c, bits)
    assert isinstance(tokens, ResidualTokens) and tokens.bits == bits
    error = (tokens.decode() - x).norm() / (c[tokens.codes.long()] - x).norm()
    assert error < (0.5 if bits == 2 else 0.2)
    # The packing by hand: value k of a token from byte k * bits // 8.
    byte, shift = 5 * bits // 8, 5 * bits % 8
    b = int(tokens.residuals[7, byte]) >> shift & (1 << bits) - 1
    assert tokens.decode()[7, 5] == c[tokens.codes[7], 5] + tokens.buckets[b]
