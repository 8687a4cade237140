"""PolaFormer's and MALA's maps against their formulas, written out with all weights."""

import backends
import pytest
import torch
from norm_linear_attention_cases import OP, over_backends
from torch import Tensor
from torch.nn import functional as F

import pyelastic


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def polaformer(q: Tensor, k: Tensor, v: Tensor, power: Tensor, scale: Tensor, eps: float, causal: bool) -> Tensor:
    """All [N, N] weights, heads first."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    p, s = power[:, None], scale[:, None]
    qp, qn, kp, kn = (F.relu(x / s) ** p for x in (q, -q, k, -k))
    outputs = []
    for part, weights in zip(v.chunk(2, -1), (qp @ kp.mT + qn @ kn.mT, qp @ kn.mT + qn @ kp.mT), strict=True):
        weights = weights.tril() if causal else weights
        n = torch.arange(1, q.shape[2] + 1).double()[:, None] if causal else q.shape[2]
        outputs.append(weights @ part / (weights.sum(-1, keepdim=True) + eps * n))
    return torch.cat(outputs, -1).transpose(1, 2)


@over_backends
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("d", (6, 33))
def test_polaformer(backend: str, causal: bool, d: int) -> None:
    dtype = backends.widest(OP, backend)
    device = backends.device_of(backend)
    case = (draw(2, 40, 2, d), draw(2, 40, 2, d, seed=1), draw(2, 40, 2, 6, seed=2))
    power, scale = 1 + 2 * torch.rand(2, d, dtype=torch.float64), 0.5 + torch.rand(2, d, dtype=torch.float64)
    given = [x.to(dtype).double().requires_grad_() for x in (*case, power, scale)]
    want = polaformer(*given, 1e-3, causal)
    upstream = draw(*want.shape, seed=3)
    want.backward(upstream)
    leaves = [x.detach().to(device, dtype).requires_grad_() for x in given]
    o = pyelastic.polaformer_attention(*leaves[:4], scale=leaves[4], eps=1e-3, causal=causal, backend=backend)
    o.backward(upstream.to(device, dtype))
    limit = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 2e-4}
    torch.testing.assert_close(o.cpu().double(), want.detach(), **limit)
    for leaf, truth in zip(leaves, given, strict=True):
        assert leaf.grad is not None and truth.grad is not None
        size = truth.grad.abs().max()
        torch.testing.assert_close(leaf.grad.cpu().double() / size, truth.grad / size, **limit)


def mala(q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    n, d = q.shape[1], q.shape[3]
    fq, fk = (F.elu(x.transpose(1, 2)) + 1 for x in (q, k))
    z = fq @ fk.mean(2, keepdim=True).mT * d**-0.5
    gq, gk = fq, fk
    if tables is not None:
        turn = torch.complex(tables[1], tables[0])
        gq, gk = (
            torch.view_as_real(torch.view_as_complex(f.unflatten(-1, (-1, 2))) * turn).flatten(-2) for f in (fq, fk)
        )
    values = v.transpose(1, 2)
    o = gq @ (gk.mT @ values / n) * d**-0.5 * (1 + 1 / (z + eps)) - z * values.mean(2, keepdim=True)
    return o.transpose(1, 2)


@over_backends
@pytest.mark.parametrize("rope", (False, True))
@pytest.mark.parametrize(("n", "d"), ((40, 6), (70, 33), (300, 16), (1, 1)))
def test_mala(backend: str, rope: bool, n: int, d: int) -> None:
    dtype, device = backends.widest(OP, backend), backends.device_of(backend)
    if rope and d % 2:
        d += 1
    given = [draw(2, n, 2, d if i < 2 else 5, seed=i).to(dtype).double().requires_grad_() for i in range(3)]
    tables = pyelastic.rope_tables(n, d, dtype=torch.float64) if rope else None
    want = mala(*given, tables, 1e-3)
    upstream = draw(*want.shape, seed=3)
    want.backward(upstream)
    leaves = [x.detach().to(device, dtype).requires_grad_() for x in given]
    moved = None if tables is None else (tables[0].to(device), tables[1].to(device))
    o = pyelastic.mala_attention(*leaves, rope_tables=moved, eps=1e-3, backend=backend)
    o.backward(upstream.to(device, dtype))
    limit = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 2e-4}
    for got, truth in ((o, want), *((a.grad, b.grad) for a, b in zip(leaves, given, strict=True))):
        assert got is not None and truth is not None
        size = truth.detach().abs().max()
        torch.testing.assert_close(got.detach().cpu().double() / size, truth.detach() / size, **limit)


def test_mala_by_auto_is_a_kernel() -> None:
    q = torch.randn(1, 4, 1, 8)
    assert torch.equal(pyelastic.mala_attention(q, q, q), pyelastic.mala_attention(q, q, q, backend="cpu"))


@pytest.mark.parametrize("backend", ("cpu", "eager"))
def test_gradients_of_mala(backend: str) -> None:
    given = [draw(1, 3, 1, 2, seed=i).requires_grad_() for i in range(3)]
    torch.autograd.gradcheck(lambda *x: pyelastic.mala_attention(*x, backend=backend), given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"power": torch.ones(2, 3)}, r"power is \[2, 3\]; expected \[2, 4\]"),
        ({"scale": torch.ones(4)}, r"scale is \[4\]; expected \[2, 4\]"),
        ({"v": torch.ones(1, 5, 2, 3)}, "an even dv"),
    ],
)
def test_wrong_polaformer(changes: dict[str, Tensor], message: str) -> None:
    given = {
        "q": torch.ones(1, 5, 2, 4),
        "k": torch.ones(1, 5, 2, 4),
        "v": torch.ones(1, 5, 2, 2),
        "power": torch.ones(2, 4),
    }
    with pytest.raises(ValueError, match=message):
        pyelastic.polaformer_attention(**{**given, **changes})
