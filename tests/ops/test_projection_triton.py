"""projection's Triton kernels row by row, and the launcher that the GPU backends share: chunks, autocast, operands."""

from typing import Any

import backends
import oracle
import projection_rows as rows
import pytest
import torch
from torch import Tensor

from pyelastic.ops import _projection as launcher

pytestmark = pytest.mark.skipif("triton" not in backends.implemented("projection"), reason="no GPU and no interpreter")


@pytest.mark.parametrize("dim", rows.WIDTHS)
def test_widths(dim: int) -> None:
    """Rows that do not fill the last program, and that do by one."""
    per_program = max(2, 2048 // (1 << (dim - 1).bit_length()))
    for count in {min(per_program, 64) - 1, min(per_program, 64) + 1}:
        rows.forward_case("triton", count, dim, residual=torch.float16)
        rows.backward_case("triton", count, dim)


@pytest.mark.parametrize("dtype", rows.DTYPES)
@pytest.mark.parametrize("other", rows.DTYPES)
def test_pairs_of_dtypes(dtype: torch.dtype, other: torch.dtype) -> None:
    for layout in ("sliced", "offset", "expanded"):
        rows.forward_case("triton", 9, 40, dtype=dtype, residual=other, layout=layout)
        rows.backward_case("triton", 9, 40, dtype=dtype, grad=other, layout=layout)


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("residual", (torch.bfloat16, None))
def test_what_is_left_out(normalize: bool, bias: bool, residual: torch.dtype | None) -> None:
    rows.forward_case("triton", 11, 40, normalize=normalize, bias=bias, residual=residual)
    rows.backward_case("triton", 11, 40, normalize=normalize)


@pytest.mark.parametrize("dim", (33, 1100))
def test_the_bounds_reject_wrong_results(dim: int) -> None:
    y, truth, absolute, _ = rows.forward_case("triton", 19, dim)
    assert oracle.prove(y, truth, A=absolute, K=1) >= 9
    dz, truth, absolute = rows.backward_case("triton", 19, dim)
    assert oracle.prove(dz, truth, A=absolute, K=1) >= 9


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, of the interpreter: inf * 0
@pytest.mark.parametrize("dim", (24, 1100))
def test_rows_without_a_direction_and_rows_beyond_range(dim: int) -> None:
    rows.special_rows("triton", dim)


def test_addresses_beyond_32_bits() -> None:
    """Under the interpreter any product in int32 would trip the overflow check before it is wrong."""
    rows.distant_rows("triton")


@pytest.mark.skipif(not backends.INTERPRETED, reason="the order of programs is the interpreter's to choose")
def test_order_of_programs_changes_no_bit() -> None:
    import interpreted

    found = []
    for seed in range(3):
        interpreted.seed(seed)
        torch.manual_seed(0)
        y, _, _, inverse = rows.forward_case("triton", 21, 300)
        found.append([y, inverse, rows.backward_case("triton", 21, 300)[0]])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


GPU_BACKENDS = tuple(name for name in ("cuda", "triton") if name in backends.implemented("projection"))


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("dtype", rows.DTYPES)
def test_autocast_changes_no_bit(backend: str, dtype: torch.dtype) -> None:
    plain = rows.everything(backend, dtype=dtype)
    with torch.autocast(plain[0].device.type, torch.bfloat16):  # around the backward too
        under = rows.everything(backend, dtype=dtype)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, under, strict=True))


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_chunks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one partial, change no bit of sums of whole numbers, which are exact in any order."""
    cases: tuple[dict[str, Any], ...] = ({"normalize": False}, {"normalize": False, "skip": False}, {"skip": False})
    once = [rows.everything(backend, whole=True, **case) for case in cases]
    monkeypatch.setattr(launcher, "CPU_ROWS", 5)
    monkeypatch.setattr(launcher, "GPU_ROWS", 5)
    for case, expected in zip(cases, once, strict=True):
        found = rows.everything(backend, whole=True, **case)
        of_rows = (0, 4) if case.get("normalize", True) else range(len(found))  # y and dz: not summed over rows
        assert all(torch.equal(expected[i], found[i]) for i in of_rows), case


@pytest.mark.skipif(backends.GPU, reason="stands in for torch.mm(out_dtype=), which a GPU has")
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_16_bit_operands_stay_such_where_torch_can(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of an NVIDIA GPU with torch >= 2.8, with float32 products of the same operands in torch.mm's place."""
    want, calls, mm = rows.everything(backend, dtype=dtype), [], torch.mm

    def stand_in(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if out_dtype is None:
            return mm(a, b, **options)
        calls.append((a.dtype, b.dtype, out_dtype))
        return mm(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(launcher, "_keeps_16_bits", lambda a, b: a.dtype == b.dtype and a.dtype.itemsize == 2)
    monkeypatch.setattr(torch, "mm", stand_in)
    found = rows.everything(backend, dtype=dtype)
    # W x and R r, whose rows are not aligned for `linear` of cuda; four gradients of two parts each.
    count = (2 if backend == "cuda" else 0) + (8 if dtype == torch.bfloat16 else 0)
    assert calls == [(dtype, dtype, torch.float32)] * count
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))


def test_products_that_keep_float32_operands() -> None:
    half, single = torch.zeros(2, 2, dtype=torch.float16), torch.zeros(2, 2)
    for a, b in ((single, single), (half, single), (half, half.bfloat16()), (half, half)):
        assert not launcher._keeps_16_bits(a, b)  # the last one: not on the CPU
