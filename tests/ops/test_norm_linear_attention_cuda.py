"""The CUDA kernels' own cases: tiles of 16 or 64 tokens, columns of 32 values, parts of 128, any order of threads.

Tensor cores take bfloat16 inputs whose widths are multiples of 8, the general path all others.
"""

from typing import Any

import backends
import pytest
import torch
from norm_linear_attention_cases import OP, Case, call, calls_of, compare, make, polaformer, upstream_of
from torch import Tensor

import pyelastic
from pyelastic import _extension
from pyelastic.ops import _norm_linear_attention as problem
from pyelastic.ops import _norm_linear_attention_cuda as launcher
from pyelastic.ops import _norm_linear_attention_gpu as gpu

pytestmark = pytest.mark.skipif("cuda" not in backends.implemented(OP), reason="no GPU and no emulator")


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(("n", "dv"), [(15, 31), (16, 32), (17, 33), (127, 4), (128, 64), (129, 65), (257, 3)])
def test_tiles_columns_and_parts(causal: bool, n: int, dv: int) -> None:
    compare("cuda", make(1, n, heads=1, d=4, dv=dv, causal=causal, state=True, learned=True, gate=n < 20), states=True)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("rope", (None, "num", "both"))
def test_packed_parts(causal: bool, rope: str | None) -> None:
    lengths = (130, 0, 1, 128)
    compare("cuda", make(lengths=lengths, heads=2, kv_heads=1, d=4, causal=causal, rope=rope, state=True), states=True)


def test_widest_heads() -> None:
    for causal in (False, True):
        compare("cuda", make(1, 18, heads=1, d=128, dv=128, rope="num", causal=causal))
    with pytest.raises(pyelastic.BackendError, match="heads are 130 wide and values 4; the kernels take up to 128"):
        call("cuda", make(1, 2, d=130, dv=4))


TENSOR_CORES = {"dtype": torch.bfloat16, "heads": 1}


@pytest.mark.parametrize(
    ("d", "dv", "dtype", "taken"),
    [
        (8, 8, torch.bfloat16, True),
        (128, 128, torch.bfloat16, True),
        (12, 8, torch.bfloat16, False),
        (8, 12, torch.bfloat16, False),
        (8, 8, torch.float16, False),
        (8, 8, torch.float32, False),
    ],
)
def test_which_inputs_tensor_cores_take(
    monkeypatch: pytest.MonkeyPatch, d: int, dv: int, dtype: torch.dtype, taken: bool
) -> None:
    """And what they change: results of the same numbers, in other bits."""
    module, _ = _extension.load_cuda()
    tiles, name = [], "cuda_norm_linear_attention_tile"
    original = getattr(module, name)

    def spy(*arguments: Any) -> int:
        tiles.append(original(*arguments))
        return int(tiles[-1])

    monkeypatch.setattr(module, name, spy)
    compare("cuda", make(1, 20, heads=1, d=d, dv=dv, dtype=dtype, causal=True))
    assert set(tiles) == {64 if taken else 16}


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("rope", (None, "num", "both"))
@pytest.mark.parametrize(("d", "dv"), [(8, 24), (24, 8), (40, 72), (72, 40), (128, 16)])
def test_tensor_cores_widths(d: int, dv: int, rope: str | None, causal: bool) -> None:
    """Odd multiples of 8, whose last columns share an instruction with what is not theirs."""
    case = make(1, 67, d=d, dv=dv, rope=rope, causal=causal, gate=d == 40, learned=True, **TENSOR_CORES)
    compare("cuda", case, states=True)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("n", (1, 63, 64, 65, 127, 128, 129, 200, 257))
def test_tensor_cores_tiles_and_parts(n: int, causal: bool) -> None:
    case = make(1, n, d=8, dv=16, causal=causal, state=True, gate=n % 2 == 0, mode="cos", **TENSOR_CORES)
    compare("cuda", case, states=True)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("rope", (None, "num", "both"))
def test_tensor_cores_packed(causal: bool, rope: str | None) -> None:
    lengths = (130, 0, 1, 128, 70)
    case = make(
        lengths=lengths, heads=4, kv_heads=2, d=16, dv=8, causal=causal, rope=rope, state=True, dtype=torch.bfloat16
    )
    compare("cuda", case, states=True)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("d", (16, 72))
def test_tensor_cores_polaformer(d: int, causal: bool) -> None:
    """Against the general path with float32 inputs of the same numbers (its own truth: test_linear_attention_maps)."""
    random, device = torch.Generator().manual_seed(3), backends.device_of("cuda")
    q, k, v, upstream = (torch.randn(1, 70, 2, w, generator=random).bfloat16() for w in (d, d, 16, 16))
    power, found = 1 + 2 * torch.rand(2, d, generator=random), []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in (q, k, v)]
        leaves.append(power.clone().to(device).requires_grad_())
        o = pyelastic.polaformer_attention(*leaves, causal=causal, backend="cuda", eps=1e-3)
        o.backward(upstream.to(o))
        found.append([o.detach(), *(x.grad for x in leaves)])
    for rounded, exact in zip(*found, strict=True):
        error = (rounded.float() - exact).norm() / exact.norm()
        assert 0 < error < 1e-2


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("final", (False, True))
@pytest.mark.parametrize(("d", "dv"), [(6, 5), (8, 24), (72, 16)])
def test_results_go_where_their_views_lie(
    d: int, dv: int, final: bool, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """o and gradients in rows on odd addresses, an odd number of elements apart, and nothing beside them."""
    rooms = []

    def odd(x: Tensor, width: int) -> Tensor:
        batch, tokens, heads, _ = x.shape
        rooms.append(torch.full((batch, tokens + 1, heads, width + 3), torch.nan, dtype=x.dtype, device=x.device))
        return rooms[-1][:, 1:, :, 1 : 1 + width]

    monkeypatch.setattr(problem, "empty_like", odd)
    monkeypatch.setattr(gpu, "empty_like", odd)
    case = make(2, 70, d=d, dv=dv, heads=2, kv_heads=1, causal=causal, gate=True, dtype=torch.bfloat16)
    compare("cuda", case, final=final)
    assert len(rooms) == 5
    for room in rooms:
        inside = room[:, 1:, :, 1:-2]
        assert inside.isfinite().all()
        assert room.isnan().sum() == room.numel() - inside.numel()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls that ask for no state go in quadratic order whatever it costs; the names of the kernels they run."""
    monkeypatch.setattr(gpu, "quadratic", lambda x: not x.final_state)
    return calls_of(launcher._Problem, monkeypatch)


def compare_alone(case: Case, called: list[str]) -> None:
    compare("cuda", case, final=False)
    assert called == ["forward", "queries", "keys"]


SHORT = [(n, n) for n in (1, 17, 64, 65, 128)]
APART = [(1, 128), (17, 65), (65, 16), (128, 33)]  # queries and keys; causal, there are as many of both
FORMS = [  # the general path, and narrow and wide heads on tensor cores
    ("num", 6, 5, torch.float32),
    ("both", 6, 33, torch.bfloat16),
    (None, 8, 16, torch.bfloat16),
    ("both", 8, 16, torch.bfloat16),
    ("num", 72, 24, torch.bfloat16),
]


@pytest.mark.parametrize(("causal", "n", "m"), [(True, *s) for s in SHORT] + [(False, *s) for s in SHORT + APART])
@pytest.mark.parametrize(("rope", "d", "dv", "dtype"), FORMS)
def test_without_states(
    alone: list[str], causal: bool, n: int, m: int, rope: str | None, d: int, dv: int, dtype: torch.dtype
) -> None:
    batch, odd = 2 if n < 64 else 1, n == m and n % 2 == 1
    options = {"mode": "cos" if odd else "split", "eps_mode": "sum" if n == 64 else "mean", "gate": rope != "both"}
    sizes = {"heads": 2, "kv_heads": 1, "d": d, "dv": dv, "dtype": dtype}
    compare_alone(make(batch, n, m, rope=rope, causal=causal, learned=True, **sizes, **options), alone)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_without_states_widest_heads(alone: list[str], causal: bool, dtype: torch.dtype) -> None:
    case = make(1, 70, heads=1, d=128, dv=128, dtype=dtype, rope="num", causal=causal, gate=True)
    compare_alone(case, alone)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(("d", "dtype", "limit"), [(6, torch.float32, 1e-5), (16, torch.bfloat16, 1e-2)])
def test_without_states_polaformer(alone: list[str], causal: bool, d: int, dtype: torch.dtype, limit: float) -> None:
    """Both of its maps, against eager in float64."""
    found = polaformer(70, d, dtype, causal)
    assert set(alone) == {"forward", "queries", "keys"}
    for made, truth in found:
        assert (made.cpu().double() - truth).norm() / truth.norm() < limit


@pytest.mark.skipif(backends.EMULATOR is None, reason="the order of threads is the emulator's to choose")
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("tensor_cores", (False, True))
@pytest.mark.parametrize("final", (False, True))
def test_order_of_threads_and_blocks_changes_no_bit(
    alone: list[str], causal: bool, tensor_cores: bool, final: bool
) -> None:
    emulator = backends.EMULATOR
    assert emulator is not None
    sizes = {"d": 8, "dv": 8, "dtype": torch.bfloat16} if tensor_cores else {"d": 4}
    case = make(1, 70, heads=2, kv_heads=1, causal=causal, gate=True, learned=True, rope="num", **sizes)
    found = []
    for seed in range(3):
        emulator.set_seed(seed)
        made, leaves = call("cuda", case, final=final)
        made["o"].backward(upstream_of(case)["o"])
        found.append([made["o"].detach(), *(x.grad for x in leaves.values())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
