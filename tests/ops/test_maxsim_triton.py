"""What only the Triton launcher has: tiles, pieces of the dimension, splits, chunks, order of programs, addresses."""

from typing import Any

import backends
import pytest
import torch
from maxsim_cases import OP, Case, call, compare, make, masks, upstream_of
from torch import Tensor

from pyelastic.ops import _maxsim_triton as launcher
from pyelastic.ops import maxsim as op
from pyelastic.ops._maxsim_layout import Inputs

pytestmark = pytest.mark.skipif("triton" not in backends.implemented(OP), reason="no GPU and no interpreter")
interpreted = pytest.mark.skipif(not backends.INTERPRETED, reason="the interpreter's checks")


def small_tiles(monkeypatch: pytest.MonkeyPatch, block_q: int = 16, block_d: int = 16) -> None:
    """Tiles of so many tokens, so that small cases have several."""
    kernels, backward, smooth, several = launcher._kernels()
    for module, name in (
        (kernels, "MAXSIM_CONFIGS"), (kernels, "MAXSIM_CONFIGS_SM90"), (backward, "MAXSIM_BACKWARD_CONFIGS"),
        (smooth, "MAXSIM_SMOOTH_CONFIGS"), (several, "MAXSIM_PREFIX_CONFIGS"), (several, "MAXSIM_TOPK_TILES"),
    ):  # fmt: skip
        table = {key: (block_q, block_d, *config[2:]) for key, config in getattr(module, name).items()}
        monkeypatch.setattr(module, name, table)


@pytest.mark.parametrize("lq", (15, 16, 17))
@pytest.mark.parametrize("ld", (15, 16, 17, 33))
def test_around_a_tile(lq: int, ld: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    compare("triton", make(nq=1, nd=2, lq=lq, ld=ld, dim=8, dtype=torch.bfloat16))


@pytest.mark.parametrize("options", ({}, {"topk": 2}, {"temperature": 0.5}, {"dims": (3, 8)}), ids=str)
def test_tiles_that_several_queries_share(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """5 queries of 7 tokens in tiles of 16: programs begin and end in the middle of a query."""
    small_tiles(monkeypatch)
    compare("triton", masks(make(nq=5, nd=2, lq=7, dim=8, dtype=torch.bfloat16)).having(**options))


@pytest.mark.parametrize(("dim", "block", "want"), [
    (8, 0, (16, 0, 0)), (48, 0, (32, 16, 0)), (96, 0, (64, 32, 0)), (100, 0, (64, 32, 16)), (128, 0, (128, 0, 0)),
    (127, 0, (64, 32, 32)), (768, 64, (64, 0, 0)), (96, 64, (32, 0, 0)), (100, 64, (16, 0, 0)), (5, 32, (16, 0, 0)),
])  # fmt: skip
def test_pieces_of_the_dimension(dim: int, block: int, want: tuple[int, ...]) -> None:
    made = launcher.pieces(dim, block)
    assert (made["W0"], made["W1"], made["W2"]) == want and made["HOLD"] == (block == 0)
    assert not made["HOLD"] or sum(want) >= dim > sum(want) - 16 - want[2]


@pytest.mark.parametrize("topk", (2, 5, 17, 64))
def test_the_best_of_several_tiles(topk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists shorter and longer than a tile, and longer than the document; masked tokens are in none."""
    small_tiles(monkeypatch)
    compare("triton", masks(make(nq=1, nd=2, lq=3, ld=50, dim=8)).having(topk=topk))


def test_order_of_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger first, of equal ones the earlier token; -0 equals 0, NaN is the largest, -inf a similarity like others."""
    small_tiles(monkeypatch)
    nan, inf = float("nan"), float("inf")
    column = torch.tensor([1.0, -0.0, -inf, 0.0, 2.0, nan, -3.0, 2.0, inf, nan] + [-5.0] * 8 + [2.0, 1.0])
    documents, query = column[None, :, None], torch.ones(1, 1)
    prepared = op.prepare(query, documents, topk=16, save="winners")
    winners = op.OPS["triton"][0](*prepared.inputs, False, True)[2]
    got = winners.flatten().tolist()
    assert got == [5, 9, 8, 4, 7, 18, 0, 19, 1, 3, 6, 10, 11, 12, 13, 14]


class Counted:
    """A kernel, and the PLANES of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.launches.append(constants["PLANES"])
            self.kernel[grid](*arguments, **constants)

        return launch


@pytest.mark.parametrize(
    ("dims", "want"), (((4, 20), [2]), (tuple(range(2, 18, 2)), [8]), (tuple(range(1, 12)), [8, 4]))
)
def test_a_launch_takes_several_prefixes(
    dims: tuple[int, ...], want: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass for as many prefixes as the registers hold."""
    several = launcher._kernels()[3]
    counted = Counted(several.forward_prefixes)
    monkeypatch.setattr(several, "forward_prefixes", counted)
    compare("triton", make(nq=2, nd=2, lq=3, ld=5, dim=20).having(dims=dims))
    assert counted.launches == want


@pytest.mark.parametrize("dim", (48, 100, 260, 520))
@pytest.mark.parametrize("options", ({}, {"normalize": True}, {"temperature": 0.5, "normalize": True}), ids=str)
def test_each_configuration(dim: int, options: dict[str, Any]) -> None:
    """Held pieces, one and three of them; rows wider than an accumulator, whose norm another kernel applies."""
    compare("triton", make(nq=2, nd=2, lq=3, ld=5, dim=dim, dtype=torch.bfloat16).having(**options))


@pytest.mark.parametrize("layout", ("cross", "grouped"))
@pytest.mark.parametrize("options", ({"normalize": True}, {"temperature": 0.5}, {"dims": (4, 8)}), ids=str)
def test_query_tokens_that_several_programs_share(
    layout: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "SPLIT_ROWS", 1)
    compare("triton", make(layout, dim=8, dtype=torch.float16).having(**options))


@pytest.mark.parametrize("options", ({"normalize": True}, {"temperature": 0.5}, {"mask_mode": "zero"}), ids=str)
def test_recomputed_in_chunks(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Winners of one document at a time."""
    monkeypatch.setattr(launcher, "CHUNK_BYTES", 1)
    compare("triton", masks(make(dim=8, dtype=torch.float32)).having(save="recompute", **options))


def test_wide_rows_recomputed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk's documents go through their norms in a second kernel, which sees all rows."""
    monkeypatch.setattr(launcher, "CHUNK_BYTES", 1)
    compare("triton", make(nq=2, nd=3, lq=3, ld=5, dim=270).having(save="recompute", normalize=True))


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_what_is_not_finite_reaches_its_own_rows(value: float) -> None:
    """A product with one-hot rows spreads it over a whole document, as eager's does; the CPU's sum does not."""
    case = make(nq=2, nd=2, lq=3, ld=4, dim=8)
    case.queries[1, 1, 2] = value
    for name in ("q", "d"):
        grads = {}
        for backend in ("triton", "cpu"):
            out, q, d = call(backend, case)
            out.sum().backward()
            grads[backend] = (q.grad if name == "q" else d.grad).cpu()
        assert torch.equal(grads["triton"].isfinite(), grads["cpu"].isfinite()), name
        assert name == "q" or grads["triton"].isfinite().any()


def everything(case: Case) -> list[Tensor]:
    out, q, d = call("triton", case)
    out.backward(upstream_of(case).reshape(out.shape).to(out.device))
    return [out.detach(), q.grad, d.grad]


@interpreted
@pytest.mark.parametrize("options", ({"normalize": True}, {"temperature": 0.5}), ids=str)
def test_order_of_programs_changes_no_bit(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import interpreted

    small_tiles(monkeypatch)
    monkeypatch.setattr(launcher, "SPLIT_ROWS", 1)
    case = make(nq=3, nd=3, lq=9, ld=20, dim=8).having(**options)
    interpreted.seed(0)
    first = everything(case)
    for seed in range(1, 3):
        interpreted.seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(first, everything(case), strict=True))


@interpreted
@pytest.mark.parametrize("temperature", (0.0, 0.5))
def test_addresses_beyond_32_bits(temperature: float) -> None:
    """Row strides of 2^29 on both sides: a product in int32 would trip the overflow check before it is wrong."""

    def wide(x: Tensor) -> Tensor:  # committed lazily: only the rows are touched
        storage = torch.empty(0, dtype=x.dtype)
        storage.untyped_storage().resize_(x.element_size() * ((1 << 29) * len(x) + 16))
        return storage.set_(storage.untyped_storage(), 0, tuple(x.shape), (1 << 29, 1)).copy_(x)

    case = make("single", nd=2, lq=5, ld=3, dim=16, dtype=torch.float16)
    q, d = case.queries, case.documents.flatten(0, 1)
    offsets = torch.tensor([0, 5]), torch.tensor([0, 3, 6])
    results = []
    for a, b in ((q, d), (wide(q), wide(d))):
        none = (None,) * 9
        x = Inputs(a, b, *offsets, *none, [16], 1, temperature, True, 5, 3)
        scores, *saved = op.OPS["triton"][0](*x, False, True)
        results.append([scores, *op.OPS["triton"][1](*x, *saved, torch.ones_like(scores), False, True, True)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_winners_of_long_documents_take_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Winners beyond 65 534, whose int16 would be another token or none."""
    if backends.INTERPRETED:  # tiles that no GPU has room for, or there are many programs
        small_tiles(monkeypatch, 16, 4096)
        backward = launcher._kernels()[1]
        table = {key: (4096, 16, *config[2:]) for key, config in backward.MAXSIM_BACKWARD_CONFIGS.items()}
        monkeypatch.setattr(backward, "MAXSIM_BACKWARD_CONFIGS", table)
    q = torch.tensor([[[1.0, 0.0]]])
    d = torch.zeros(1, 66_000, 2)
    d[0, 65_535] = torch.tensor([1.0, 2.0])
    out, q, d = call("triton", Case(q, d))
    out.backward(torch.ones_like(out))
    assert out.item() == 1.0 and q.grad.flatten().tolist() == [1.0, 2.0]
    assert d.grad[0].nonzero().tolist() == [[65_535, 0]]
