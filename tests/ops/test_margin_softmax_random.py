"""Drawn margins: reproducible from a seed, on any backend and any sharding."""

import math

import pytest
import torch
from margin_softmax_cases import BACKENDS, Case, call, make, over_backends

from pyelastic import _random
from pyelastic import margins as M

MASK = 0xFFFFFFFF


def philox_by_hand(seed: int, counter: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 as the paper writes it, in Python integers."""
    k0, k1 = seed & MASK, seed >> 32
    c = [counter & MASK, counter >> 32, 0, 0]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & MASK, (p0 >> 32) ^ c[3] ^ k1, p0 & MASK]
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c[0], c[1], c[2], c[3]


def test_philox_known_answer() -> None:
    """The all-zero vector of Random123's kat_vectors."""
    words = _random.philox(0, torch.zeros(1, dtype=torch.int64))
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_philox_everywhere() -> None:
    counters = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**62]
    for seed in (0, 1, 2**32 + 5, 2**63 - 1):
        got = _random.philox(seed, torch.tensor(counters))
        as_tensor = _random.philox(torch.tensor(seed), torch.tensor(counters))
        for i, counter in enumerate(counters):
            want = philox_by_hand(seed, counter)
            assert tuple(int(w[i]) for w in got) == want
            assert tuple(int(w[i]) for w in as_tensor) == want


@pytest.mark.parametrize("counters", (torch.arange(5), torch.arange(6).view(2, 3).mT, torch.zeros(0).long()))
def test_opcheck_of_philox(counters: torch.Tensor) -> None:
    """Schema, fake kernel and AOT dispatch, as of every raw op."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(_random._op, (torch.tensor(7), counters), test_utils=tests)


def test_normal_is_normal() -> None:
    """Moments and tails of 200 000 draws, each within five standard errors."""
    n = 200_000
    x = _random.normal(7, torch.arange(n))
    assert x.dtype == torch.float64 and bool(x.isfinite().all())
    error = 1 / math.sqrt(n)
    assert abs(float(x.mean())) < 5 * error
    assert abs(float(x.var()) - 1) < 5 * math.sqrt(2) * error
    assert abs(float((x**4).mean()) - 3) < 5 * math.sqrt(96) * error
    for z in (1.0, 2.0, 3.0):
        tail = math.erfc(z / math.sqrt(2))
        share = float((x.abs() > z).double().mean())
        assert abs(share - tail) < 5 * math.sqrt(tail * (1 - tail)) * error
    lag = float((x[1:] * x[:-1]).mean())  # neighbouring rows are independent
    assert abs(lag) < 5 * error


@over_backends
@pytest.mark.parametrize("family", (M.ElasticArcFace, M.ElasticCosFace))
def test_the_draw_has_the_margins_law(backend: str, family: type) -> None:
    case = make(4096, 3, 2)
    (_, aux), *_ = call(backend, case, family(m=0.4, sigma=0.05), seed=3, return_aux=("margin",))
    drawn = aux.margin.double()
    assert abs(float(drawn.mean()) - 0.4) < 5 * 0.05 / 64
    assert abs(float(drawn.std()) - 0.05) < 5 * 0.05 / math.sqrt(2 * 4096)
    assert aux.lse is None  # only what was asked for


@over_backends
@pytest.mark.parametrize("plus", (None, "rank", "official"))
def test_a_seed_reproduces_the_call(backend: str, plus: str | None) -> None:
    case, margin = make(), M.ElasticArcFace(sigma=0.05, plus=plus)
    first, again, other = (call(backend, case, margin, seed=s)[0] for s in (11, 11, 12))
    assert torch.equal(first, again) and not torch.equal(first, other)
    as_tensor = call(backend, case, margin, seed=torch.tensor(11))[0]
    assert torch.equal(first, as_tensor)


@over_backends
def test_manual_seed_governs_the_default(backend: str) -> None:
    case, margin = make(), M.ElasticCosFace(sigma=0.05)
    torch.manual_seed(5)
    first, second = (call(backend, case, margin)[0] for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(call(backend, case, margin)[0], first)
    assert not torch.equal(first, second)


@over_backends
def test_sharding_does_not_change_the_draw(backend: str) -> None:
    """Rows [a, b) with row_offset=a draw what they draw in the whole batch."""
    case, margin = make(), M.ElasticArcFace(sigma=0.05)
    options = {"seed": 9, "return_aux": True, "reduction": "none"}
    (whole, aux), *_ = call(backend, case, margin, **options)
    for a, b in ((0, 5), (5, 6), (6, 13)):
        part = Case(case.embeddings[a:b], case.weight, case.labels[a:b])
        (loss, part_aux), *_ = call(backend, part, margin, row_offset=a, **options)
        assert torch.equal(part_aux.margin, aux.margin[a:b])
        torch.testing.assert_close(loss, whole[a:b], rtol=1e-5, atol=1e-9)


def test_all_backends_draw_the_same_bits() -> None:
    case, margin = make(), M.ElasticArcFace(sigma=0.05, plus=None)
    drawn = [call(backend, case, margin, seed=4, return_aux=True)[0][1].margin.cpu() for backend in BACKENDS]
    assert all(torch.equal(d, drawn[0]) for d in drawn)


@over_backends
@pytest.mark.parametrize("plus", (None, "rank", "official"))
def test_no_spread_is_the_fixed_margin_bit_for_bit(backend: str, plus: str | None) -> None:
    """sigma = 0 and evaluation mode alike; loss and both gradients."""
    case = make()
    pairs = (
        (M.ElasticArcFace(m=0.4, sigma=0.0, plus=plus), M.ArcFace(m=0.4), True),
        (M.ElasticCosFace(m=0.3, sigma=0.0, plus=plus), M.CosFace(m=0.3), True),
        (M.ElasticArcFace(m=0.4, sigma=0.2, plus=plus), M.ArcFace(m=0.4), False),
        (M.ElasticCosFace(m=0.3, sigma=0.2, plus=plus), M.CosFace(m=0.3), False),
    )
    for elastic, fixed, training in pairs:
        got = call(backend, case, elastic, training=training)
        want = call(backend, case, fixed)
        got[0].backward()
        want[0].backward()
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1].grad, want[1].grad) and torch.equal(got[2].grad, want[2].grad)
