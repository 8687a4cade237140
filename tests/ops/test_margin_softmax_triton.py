"""What only the Triton launcher has: wide rows through a GEMM, splits, chunks, order of programs, int64 addresses."""

from typing import Any

import backends
import pytest
import torch
from margin_softmax_cases import OP, VARIANTS, Case, call, compare, make
from torch import Tensor

from pyelastic import margins as M
from pyelastic.ops import _margin_softmax_triton as launcher
from pyelastic.ops import margin_softmax as op

pytestmark = pytest.mark.skipif("triton" not in backends.implemented(OP), reason="no GPU and no interpreter")
OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"label_smoothing": 0.1}, {"subcenters": 2}, {"classes": torch.arange(0, 150, 2)}, {"margin": "Curricular"}
)  # fmt: skip


def check(dtype: torch.dtype, options: dict[str, Any], dim: int = 20) -> None:
    options = dict(options)
    margin = VARIANTS[options.pop("margin", "ArcFace-none")]
    case = make(20, 150, dim, dtype=dtype, subcenters=options.get("subcenters", 1))
    if "classes" in options:
        case.labels = case.labels // 2 * 2
    compare("triton", case, margin, **options)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """P of a chunk and a GEMM, in several chunks; a limit of 0 stands in for D > 512."""
    for name in ("MARGIN_SOFTMAX_CONFIGS", "MARGIN_SOFTMAX_CONFIGS_SCATTERED"):
        table = getattr(launcher._kernels(), name)
        monkeypatch.setattr(launcher._kernels(), name, {key: value for key, value in table.items() if key[1] == 0})
    monkeypatch.setattr(launcher, "CHUNK_BYTES", 1)
    monkeypatch.setattr(launcher, "FINISH_ELEMENTS", 128)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_wider_than_the_fused_kernels(dtype: torch.dtype, options: dict[str, Any], narrow: None) -> None:
    check(dtype, options)


def test_a_backward_called_under_autocast_keeps_its_precision(narrow: None) -> None:
    """Autocast would take the GEMMs of the backward to bfloat16."""
    gradients = []
    for enabled in (False, True):
        loss, e, w = call("triton", make(20, 150, 20), M.ArcFace())
        with torch.autocast(loss.device.type, torch.bfloat16, enabled=enabled):
            loss.backward()
        gradients.append((e.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_chunks_stay_within_a_grid() -> None:
    """One row needs few bytes a class: the blocks of a chunk would pass CUDA's limit of 65,535."""
    for class_bytes in (2, 4, 6, 2048, 1 << 30):
        chunk = launcher._chunk_classes(class_bytes, 64)
        assert chunk % 64 == 0 and 1 <= chunk // 64 <= 65_535
        assert chunk == 64 or chunk * class_bytes <= launcher.CHUNK_BYTES


def test_a_row_really_that_wide() -> None:
    check(torch.float32, {}, dim=600)


@pytest.mark.parametrize("dim", (130, 260, 512))
@pytest.mark.parametrize("options", ({}, {"subcenters": 2}), ids=str)
def test_each_configuration(dim: int, options: dict[str, Any]) -> None:
    check(torch.float16, options, dim)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("programs", (1, 2))
def test_any_number_of_splits(options: dict[str, Any], programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "PROGRAMS", programs)
    check(torch.float32, options)


def everything(case: Case) -> list[Tensor]:
    (loss, aux), e, w = call("triton", case, M.ArcFace(), return_aux=True, label_smoothing=0.1)
    loss.backward()
    return [loss.detach(), e.grad, w.grad, *(x.detach() for x in aux)]


@pytest.mark.skipif(not backends.INTERPRETED, reason="the order of programs is the interpreter's to choose")
def test_order_of_programs_changes_no_bit() -> None:
    import interpreted

    case = make(70, 200, 24)
    interpreted.seed(0)
    first = everything(case)
    for seed in range(1, 4):
        interpreted.seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(first, everything(case), strict=True))


@pytest.mark.skipif(not backends.INTERPRETED, reason="the overflow checks are the interpreter's")
def test_addresses_beyond_32_bits() -> None:
    """Row strides of 2^29 on three rows: any product in int32 would trip the overflow check before it is wrong."""
    storage = torch.empty(0, dtype=torch.float16)
    storage.untyped_storage().resize_(2 * ((1 << 29) * 4 + 16))  # committed lazily: three rows are touched
    weight = storage.set_(storage.untyped_storage(), 0, (5, 16), (1 << 29, 1))
    small = make(4, 5, 16, dtype=torch.float16)
    weight.copy_(small.weight)
    inputs = (small.embeddings, weight, small.labels, None, None, None, 8.0, 1, 0)
    theta, lse, *_, best = op._OPS["triton"][0](*inputs)
    contiguous = op._OPS["triton"][0](small.embeddings, small.weight, *inputs[2:])
    assert torch.equal(lse, contiguous[1]) and torch.equal(theta, contiguous[0])
    ones = torch.ones_like(lse)
    wide = op._OPS["triton"][1](*inputs[:-1], theta, lse, best, ones, ones, None, True, False)[0]
    near = op._OPS["triton"][1](
        small.embeddings, small.weight, *inputs[2:-1], theta, lse, best, ones, ones, None, True, False
    )[0]
    assert torch.equal(wide, near)


def test_label_out_of_range_is_nan() -> None:
    case = make(6, 20, 8)
    labels = case.labels.clone()
    labels[2] = 1 << 40
    device = backends.device_of("triton")
    inputs = (case.embeddings.to(device), case.weight.to(device), labels.to(device), None, None, None, 8.0, 1, 0)
    theta = op._OPS["triton"][0](*inputs)[0]
    assert theta.isnan().tolist() == [i == 2 for i in range(6)]
