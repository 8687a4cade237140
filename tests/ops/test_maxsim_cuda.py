"""What only the CUDA launcher and kernels have: tiles, several queries in one of them, chunks, rows that do not fit."""

from typing import Any

import backends
import pytest
import torch
from maxsim_cases import OP, Case, call, compare, make, masks, upstream_of
from torch import Tensor

import pyelastic
from pyelastic import _extension
from pyelastic.ops import _maxsim_cuda as launcher

pytestmark = pytest.mark.skipif("cuda" not in backends.implemented(OP), reason="no GPU and no emulator")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# csrc/cuda/maxsim_sweep.cuh: a small tile of queries up to 64 tokens, then 128 (64 in float32); 64 document tokens.
SMALL, LARGE, TILE_N = 32, 128, 64


@pytest.mark.parametrize("ld", (TILE_N - 1, TILE_N, TILE_N + 1, 2 * TILE_N + 1))
@pytest.mark.parametrize("lq", (SMALL - 1, SMALL, SMALL + 1))
def test_small_tiles(lq: int, ld: int) -> None:
    """One around the tiles, on tensor cores and in float32."""
    for dtype in (torch.float32, torch.bfloat16):
        compare("cuda", make("single", nd=2, lq=lq, ld=ld, dim=8, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", (LARGE - 1, LARGE, LARGE + 1))
def test_large_tiles(tokens: int, dtype: torch.dtype) -> None:
    """Queries of uneven lengths packed into tiles of 128 tokens, which some of them straddle."""
    lengths = [50, 0, 77, tokens - 127]
    case = make("single", nd=3, lq=tokens, ld=TILE_N + 6, dim=16, dtype=dtype)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    compare("cuda", masks(Case(case.queries, case.documents, {"cu_seqlens_q": cu})))


def test_list_of_long_queries() -> None:
    """More than one tile of one pair, and pairs whose query ends before the last tile."""
    case = make("packed", dim=8)
    lengths = [LARGE + 2, 3]
    q = torch.randn(sum(lengths), 8, generator=torch.Generator().manual_seed(3))
    cu = torch.tensor([0, *lengths]).cumsum(0)
    pairs = torch.tensor([[0, 2], [1, 0], [1, 1], [0, 4]])
    packed = {"cu_seqlens_q": cu, "cu_seqlens_d": case.options["cu_seqlens_d"], "pairs": pairs}
    compare("cuda", Case(q, case.documents, packed))


@pytest.mark.parametrize("dim", (63, 64, 65, 136, 264, 320))
def test_chunks_of_the_dimension(dim: int) -> None:
    """Up to 4 chunks of 128 bytes the queries stay in shared memory; rows that are not 16-byte aligned are copied."""
    for dtype in (torch.float32, torch.bfloat16):
        compare("cuda", make(nq=2, nd=2, lq=3, ld=TILE_N + 2, dim=dim, dtype=dtype))


@pytest.mark.parametrize("name", ("plain", "topk", "smooth", "prefixes", "list"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_several_tiles_of_documents(name: str, dtype: torch.dtype) -> None:
    """Each reduction over documents of more than one tile, with holes, normalised."""
    options: dict[str, Any] = {"topk": {"topk": 5}, "smooth": {"temperature": 0.3}, "prefixes": {"dims": (4, 20)}}
    layout = "list" if name == "list" else "cross"
    case = make(layout, nq=2, nd=3, lq=5, ld=2 * TILE_N + 3, dtype=dtype)
    compare("cuda", masks(case).having(normalize=True, **options.get(name, {})))


@pytest.mark.parametrize("name", ("topk", "smooth"))
def test_other_reductions_in_large_tiles(name: str) -> None:
    """The smooth maximum has tiles of 128 query tokens too; top-k keeps to small ones."""
    options: dict[str, Any] = {"topk": {"topk": 4}, "smooth": {"temperature": 0.4}}[name]
    for dtype in (torch.float32, torch.bfloat16):
        compare("cuda", make(nq=5, nd=2, lq=14, ld=9, dim=8, dtype=dtype).having(**options))


PREFIXES = {  # d: dims
    "in a chunk": (48, (16, 32, 48)), "between steps": (53, (3, 10, 33, 53)), "of chunks": (264, (64, 128, 200, 264)),
    "read again": (320, (96, 320)), "in the last step": (41, (32, 41)),
    "two sweeps": (40, (2, 3, 4, 5, 16, 17, 18, 32, 33, 40)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", PREFIXES)
def test_prefixes(name: str, dtype: torch.dtype) -> None:
    """Ends anywhere in the steps and chunks that the products take; queries that stay and that are read again."""
    dim, dims = PREFIXES[name]
    case = masks(make(nq=2, nd=3, lq=5, ld=TILE_N + 3, dim=dim, dtype=dtype))
    compare("cuda", case.having(dims=dims, normalize=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("save", ("winners", "recompute"))
def test_prefixes_in_large_tiles(save: str, dtype: torch.dtype) -> None:
    compare("cuda", masks(make(nq=5, nd=2, lq=14, ld=9, dim=24, dtype=dtype)).having(dims=(5, 16, 24), save=save))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_what_follows_a_prefix_is_not_in_it(dtype: torch.dtype) -> None:
    """Infinities and NaN in the next columns, which share a step of the products with it."""
    case = make(nq=2, nd=2, lq=3, ld=5, dim=20, dtype=dtype)
    q, d = case.queries.detach().clone(), case.documents.detach().clone()
    q[..., 7], d[..., 6], q[0, 0, 13] = float("inf"), float("nan"), -float("inf")
    device = backends.device_of("cuda")
    got = pyelastic.maxsim(q.to(device), d.to(device), dims=(6, 20), backend="cuda").cpu()
    want = pyelastic.maxsim(q[..., :6].to(device), d[..., :6].to(device), backend="cuda").cpu()
    torch.testing.assert_close(got[0], want, rtol=1e-5, atol=1e-5)
    assert got[1].isnan().all()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One document a chunk."""
    monkeypatch.setattr(launcher, "CHUNK_BYTES", 1)


CHUNKED: tuple[dict[str, Any], ...] = (
    {"mask_mode": "zero"}, {"topk": 3}, {"temperature": 0.5}, {"dims": (4, 20), "normalize": True},
)  # fmt: skip


@pytest.mark.parametrize("options", CHUNKED, ids=str)
@pytest.mark.parametrize("layout", ("cross", "packed", "list"))
def test_chunks_of_documents(options: dict[str, Any], layout: str, small_chunks: None) -> None:
    """Scoring and the recomputing backward pass, document by document."""
    compare("cuda", masks(make(layout)).having(save="recompute", **options))
    compare("cuda", masks(make(layout)).having(save="winners", **options))


@pytest.mark.parametrize("layout", ("cross", "packed"))
def test_chunks_with_gradients_of_tokens(layout: str, small_chunks: None) -> None:
    """reduction="none" through chunks is the same as in one piece, gradients to rounding."""
    case = masks(make(layout)).having(reduction="none")
    results = []
    for save in ("winners", "recompute"):
        out, q, d = call("cuda", case.having(save=save))
        out.backward(torch.linspace(-1.0, 2.0, out.numel()).reshape(out.shape).to(out.device))
        results.append([out.detach(), q.grad, d.grad])
    (out, dq, dd), (again, dq2, dd2) = results
    assert torch.equal(out, again) and torch.equal(dd, dd2)
    torch.testing.assert_close(dq, dq2, rtol=1e-5, atol=1e-5)


def test_wide_winners(monkeypatch: pytest.MonkeyPatch) -> None:
    """32-bit winners give the bits of 16-bit ones."""
    case = masks(make()).having(normalize=True)

    def run() -> list[Tensor]:
        out, q, d = call("cuda", case)
        out.backward(upstream_of(case).reshape(out.shape).to(out.device))
        return [out.detach(), q.grad, d.grad]

    narrow = run()
    monkeypatch.setattr(launcher.Inputs, "winner_dtype", property(lambda self: torch.int32))
    assert all(torch.equal(a, b) for a, b in zip(narrow, run(), strict=True))


@pytest.mark.parametrize("options", ({}, {"temperature": 0.5}), ids=str)
def test_sums_beyond_shared_memory(options: dict[str, Any]) -> None:
    """A row of more than 72 KB of sums goes to global memory."""
    dim = (72 << 10) // 4 + 4
    module, _ = _extension.load_cuda()
    assert not module.cuda_maxsim_fits(dim) and module.cuda_maxsim_fits(dim - 4)
    compare("cuda", make("cross", nq=2, nd=2, lq=2, ld=3, dim=dim).having(**options))


def test_few_sums_a_block() -> None:
    """Rows so long that a block has fewer than a warp's worth for each warp."""
    compare("cuda", make("cross", nq=2, nd=2, lq=3, ld=11, dim=4000).having(normalize=True))


def test_all_winners_in_one_row() -> None:
    """[MASK] tokens often choose one document token: its sums take every query's rows, in order."""
    case = make(nq=4, nd=2, lq=40, ld=20, dim=12)
    case.documents[:, 7] *= 100.0
    case.queries.copy_(case.queries[:1, :1] + 0.01 * case.queries)
    case.documents[:, 7] = 50.0 * case.queries[0, 0]
    truth = compare("cuda", case)
    assert all(bool((w == 7).all()) for w in truth.winners[0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_not_finite_in_large_tiles(dtype: torch.dtype) -> None:
    """The first NaN of a document is its maximum, in whichever lane; -inf alone still has a winner."""
    case = make(nq=10, nd=4, lq=13, ld=TILE_N + 20, dim=4, dtype=dtype)
    case.queries[..., 0] = case.queries[..., 0].abs() + 0.1
    case.documents[1, 70], case.documents[1, 9] = torch.nan, torch.nan
    case.documents[2, :] = 0.0
    case.documents[2, :, 0] = -torch.inf
    case.documents[3, 66] = torch.tensor([torch.inf, 0.0, 0.0, 0.0])
    out, q, d = call("cuda", case)
    want, *_ = call("eager", case)
    torch.testing.assert_close(out.detach().cpu(), want.detach(), rtol=1e-5, atol=1e-5, equal_nan=True)
    out[:, 1].nan_to_num(0.0).sum().backward()
    upstream = torch.zeros_like(out)
    upstream[:, 1:3] = 1.0
    out, q, d = call("cuda", case)
    out.backward(upstream)
    won = d.grad.abs().sum(-1) > 0
    assert won[1].nonzero().flatten().tolist() == [9] and won[2].nonzero().flatten().tolist() == [0]
    assert not won[0].any() and not won[3].any() and q.grad.shape == q.shape


def test_ties_across_lanes_and_tiles() -> None:
    """The first of equal tokens, wherever in a tile it lies; in two tiles the earlier one."""
    for dtype in FLOATS:
        documents = torch.zeros(6, 2 * TILE_N, 4, dtype=dtype)
        firsts = (0, 3, 17, 63, 64, 100)
        for j, first in enumerate(firsts):
            documents[j, first :: 9 + j] = 1.0
        device = backends.device_of("cuda")
        q = torch.ones(1, 130, 4, dtype=dtype, device=device)
        for queries in (q, q[:, :5]):
            d = documents.to(device).requires_grad_()
            pyelastic.maxsim(queries, d, backend="cuda").sum().backward()
            assert d.grad.abs().sum(-1).nonzero()[:, 1].tolist() == list(firsts)


@pytest.mark.parametrize("options", ({}, {"topk": 3}, {"temperature": 0.3}), ids=str)
def test_repeated_calls_are_bitwise_equal_in_large_tiles(options: dict[str, Any]) -> None:
    sizes = {"nq": 5, "nd": 2, "ld": 9} if "temperature" in options else {"nq": 6, "nd": 5, "ld": TILE_N + 3}
    case = masks(make(**sizes, lq=25, dim=24, dtype=torch.float16)).having(**options)
    runs = []
    for _ in range(2):
        out, q, d = call("cuda", case)
        out.backward(upstream_of(case).reshape(out.shape).to(out.device))
        runs.append([out.detach(), q.grad, d.grad])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
