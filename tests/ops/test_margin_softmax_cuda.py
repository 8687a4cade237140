"""What only the CUDA launcher has: float16 operands by choice, chunks, and kernels whose order must not matter."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import backends
import oracle
import pytest
import torch
from margin_softmax_cases import OP, VARIANTS, Case, call, compare, make
from margin_softmax_reference import reference
from torch import Tensor

from pyelastic import _extension
from pyelastic import margins as M
from pyelastic.ops import _margin_softmax_cuda as launcher
from pyelastic.ops import margin_softmax as op

pytestmark = pytest.mark.skipif("cuda" not in backends.implemented(OP), reason="no GPU and no emulator")
DEVICE = backends.device_of("cuda")


@pytest.fixture
def high_precision() -> Iterator[None]:
    """Let float32 GEMMs use 16-bit operands for the length of a test."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="since torch 2.9")
@pytest.mark.parametrize(("precision", "half"), [("tf32", True), ("ieee", False)])
@pytest.mark.parametrize("where", ("matmul", "everywhere"))
def test_the_newer_setting_of_the_precision(precision: str, half: bool, where: str) -> None:
    """In a process of its own: once it is used, torch.get_float32_matmul_precision raises."""
    code = f"""if True:
        import torch
        from pyelastic.ops._margin_softmax_cuda import half_operands
        x = torch.zeros(1)
        assert not half_operands(x, x)
        owner = torch.backends.cuda.matmul if {where!r} == "matmul" else torch.backends
        owner.fp32_precision = {precision!r}
        assert half_operands(x, x) == {half}"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of 128 classes, the last one partial."""
    monkeypatch.setattr(launcher, "TILE_BYTES", 1)


@pytest.mark.parametrize("variant", ("ArcFace-none", "Curricular", "MagFace"))
def test_float32_with_half_operands(variant: str, high_precision: None) -> None:
    """torch.set_float32_matmul_precision("high"): exact to what float16 operands allow."""
    case, margin = make(33, 150, 40), VARIANTS[variant]
    truth = reference(case.embeddings, case.weight, case.labels, margin, half=True)
    loss, e, w = call("cuda", case, margin)
    loss.backward()
    grade: dict[str, Any] = {"K": 1, "acc": torch.float16, "tolerance": "half operands"}
    oracle.check(loss, truth.loss, A=truth.A_loss, **grade)
    oracle.check(e.grad, truth.grad_e, A=truth.A_e, **grade)
    oracle.check(w.grad, truth.grad_w, A=truth.A_w, **grade)
    # The bound that accepts it rejects planted wrong results; at a scale of 64 it is above 1 % of an element.
    truth = reference(case.embeddings, case.weight, case.labels, margin, half=True, scale=4.0)
    mild, e, w = call("cuda", case, margin, scale=4.0)
    mild.backward()
    dropped = {"softmax term dropped": truth.no_softmax_e, "target dropped": truth.no_target_e}
    assert oracle.prove(e.grad.cpu(), truth.grad_e, A=truth.A_e, also=dropped, **grade) >= 11
    assert oracle.prove(w.grad.cpu(), truth.grad_w, A=truth.A_w, **grade) >= 9
    # It is another computation, not a relabelled one; and eager is never touched.
    torch.set_float32_matmul_precision("highest")
    assert not torch.equal(call("cuda", case, margin)[0], loss)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(
    "options",
    ({}, {"label_smoothing": 0.1}, {"subcenters": 2}, {"classes": torch.arange(0, 300, 2)}, {"scale": 8.0}),
    ids=str,
)
def test_chunks(dtype: torch.dtype, options: dict[str, Any], small_chunks: None) -> None:
    case = make(40, 300, 20, dtype=dtype, subcenters=options.get("subcenters", 1))
    if "classes" in options:
        case.labels = case.labels // 2 * 2
    compare("cuda", case, M.ArcFace(), **options)


def everything(case: Case, margin: Any) -> list[Tensor]:
    (loss, aux), e, w = call("cuda", case, margin, return_aux=True, label_smoothing=0.1, subcenters=1)
    loss.backward()
    return [loss.detach(), e.grad, w.grad, *(x.detach() for x in aux)]


@pytest.mark.skipif(backends.EMULATOR is None, reason="the order of threads is the emulator's to choose")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("variant", ("ArcFace-none", "Curricular"))
def test_order_of_threads_and_blocks_changes_no_bit(dtype: torch.dtype, variant: str) -> None:
    case = make(21, 290, 24, dtype=dtype)
    emulator = backends.EMULATOR
    assert emulator is not None
    emulator.set_seed(0)
    first = everything(case, VARIANTS[variant])
    for seed in range(1, 6):
        emulator.set_seed(seed)
        again = everything(case, VARIANTS[variant])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("a_k_major", (True, False))
@pytest.mark.parametrize("b_k_major", (True, False))
@pytest.mark.parametrize(
    ("m", "n", "k", "splits"), [(1, 1, 1, 1), (130, 129, 33, 1), (16, 200, 257, 3), (128, 128, 128, 4), (5, 7, 0, 2)]
)
def test_tensor_core_gemm(a_k_major: bool, b_k_major: bool, m: int, n: int, k: int, splits: int) -> None:
    module, emulated = _extension.load_cuda()
    stream = 0 if emulated else torch.cuda.current_stream().cuda_stream

    def operand(rows: int, k_major: bool) -> tuple[Tensor, Tensor]:
        """Storage whose fast dimension is padded to 8: with zeros along k, else with NaN."""
        value = torch.randn(rows, k).half()
        stored = value if k_major else value.t()
        fast = (stored.shape[1] + 7) // 8 * 8
        storage = torch.full((stored.shape[0], fast), 0.0 if k_major else torch.nan, dtype=torch.float16)
        storage[:, : stored.shape[1]] = stored
        return value.double(), storage.to(DEVICE)

    (a, a_stored), (b, b_stored) = operand(m, a_k_major), operand(n, b_k_major)
    start = torch.randn(splits, m, n)
    for add in (False, True):
        out = start.clone().to(DEVICE)
        left = (a_stored.data_ptr(), a_stored.stride(0), a_k_major)
        right = (b_stored.data_ptr(), b_stored.stride(0), b_k_major)
        module.cuda_mma_gemm(*left, *right, m, n, k, out.data_ptr(), n, splits, add, stream)
        want = a @ b.t() + (start.double().sum(0) if add else 0.0)
        absolute = a.abs() @ b.abs().t() + (start.double().abs().sum(0) if add else 0.0)
        oracle.check(out.cpu().double().sum(0).float(), want, A=absolute, K=k + splits)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_label_out_of_range_is_nan_and_reads_nothing(dtype: torch.dtype) -> None:
    """On a GPU labels are not checked on the host; under the sanitizers this also shows that no row is read."""
    case = make(6, 20, 8, dtype=dtype)
    labels = case.labels.clone()
    labels[2] = 1 << 40
    inputs = (case.embeddings.to(DEVICE), case.weight.to(DEVICE), labels.to(DEVICE), None, None, None, 8.0, 1, 0)
    theta, lse, *_, best = op._OPS["cuda"][0](*inputs)
    assert theta.isnan().tolist() == [i == 2 for i in range(6)]
    ones = torch.ones_like(theta)
    d_e, d_w = op._OPS["cuda"][1](*inputs[:-1], theta, lse, best, ones, ones, None, True, True)
    assert bool(d_e[[0, 1, 3, 4, 5]].isfinite().all()) and d_w.shape == case.weight.shape


def test_why_not_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_emulator", None)
    assert "the tensors are on cpu" in str(_extension.cuda_why_not("cpu"))
    if _extension.state().status == "built" and not hasattr(_extension.load(), "cuda_mma_gemm"):
        assert "PYELASTIC_CUDA=ON" in str(_extension.cuda_why_not("cuda:0"))
