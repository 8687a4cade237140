"""projection's CUDA kernels row by row: widths around a warp and a block, pairs of dtypes, strides, any order."""

import backends
import oracle
import projection_rows as rows
import pytest
import torch

pytestmark = pytest.mark.skipif("cuda" not in backends.implemented("projection"), reason="no GPU and no emulator")


@pytest.mark.parametrize("dim", rows.WIDTHS)
def test_widths(dim: int) -> None:
    rows.forward_case("cuda", 19, dim, residual=torch.float16)
    rows.backward_case("cuda", 19, dim)


@pytest.mark.parametrize("dtype", rows.DTYPES)
@pytest.mark.parametrize("other", rows.DTYPES)
def test_pairs_of_dtypes(dtype: torch.dtype, other: torch.dtype) -> None:
    """A residual, or a gradient, of another dtype than y."""
    for layout in ("sliced", "offset", "expanded"):
        rows.forward_case("cuda", 9, 40, dtype=dtype, residual=other, layout=layout)
        rows.backward_case("cuda", 9, 40, dtype=dtype, grad=other, layout=layout)


@pytest.mark.parametrize("dim", (40, 1100))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("residual", (torch.bfloat16, None))
def test_what_is_left_out(dim: int, normalize: bool, bias: bool, residual: torch.dtype | None) -> None:
    rows.forward_case("cuda", 11, dim, normalize=normalize, bias=bias, residual=residual)
    rows.backward_case("cuda", 11, dim, normalize=normalize)


@pytest.mark.parametrize("dim", (33, 1100))
def test_the_bounds_reject_wrong_results(dim: int) -> None:
    y, truth, absolute, _ = rows.forward_case("cuda", 19, dim)
    assert oracle.prove(y, truth, A=absolute, K=1) >= 9
    dz, truth, absolute = rows.backward_case("cuda", 19, dim)
    assert oracle.prove(dz, truth, A=absolute, K=1) >= 9


@pytest.mark.parametrize("dim", (24, 1100))
def test_rows_without_a_direction_and_rows_beyond_range(dim: int) -> None:
    rows.special_rows("cuda", dim)


def test_addresses_beyond_32_bits() -> None:
    rows.distant_rows("cuda")


@pytest.mark.skipif(backends.EMULATOR is None, reason="the order of threads is the emulator's to choose")
@pytest.mark.parametrize("dim", (70, 1100))
def test_order_of_threads_and_blocks_changes_no_bit(dim: int) -> None:
    emulator = backends.EMULATOR
    assert emulator is not None
    found = []
    for seed in range(4):
        emulator.set_seed(seed)
        torch.manual_seed(0)
        y, _, _, inverse = rows.forward_case("cuda", 21, dim)
        found.append([y, inverse, rows.backward_case("cuda", 21, dim)[0]])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
