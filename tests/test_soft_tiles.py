"""csrc/cpu/gemm.cpp on AMX's tiles, whose instructions are C++ here: for CPUs with AVX-512 and without AMX."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import backends
import pytest
import torch
from torch import Tensor

from pyelastic import _extension

ROOT = Path(__file__).parent.parent
SETS = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mf16c"]
FLAGS = ["-std=c++17", "-O1", "-Wno-psabi", "-shared", "-fPIC", "-pthread", *SETS, "-D__AMX_BF16__=1"]
# rows, columns, depth: around the edges of tiles (16, 32) and of a sum in registers (256), either operand the shorter.
SIZES = [(1, 1, 1), (16, 32, 32), (17, 33, 31), (31, 16, 257)]
SIZES += [(33, 100, 300), (100, 33, 64), (64, 64, 256), (5, 700, 90)]
Multiply = Callable[[Tensor, Tensor, Tensor, bool, int], None]


@pytest.fixture(scope="module")
def soft(tmp_path_factory: pytest.TempPathFactory) -> Multiply:
    backends.require("cpu")
    if _extension.load().isa() not in ("avx512", "avx512bf16", "amx"):
        pytest.skip("the CPU has no AVX-512")
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        pytest.skip("no compiler")
    path = tmp_path_factory.mktemp("soft") / "soft.so"
    sources = [ROOT / "tests" / "soft_tiles.cpp", ROOT / "csrc" / "common" / "parallel.cpp"]
    command = [compiler, *FLAGS, "-DPYELASTIC_ISA=soft_amx", *map(str, sources), "-o", str(path)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    library = ctypes.CDLL(str(path))
    library.soft_room.restype = ctypes.c_int64
    library.soft_room.argtypes = [ctypes.c_int64] * 2
    operand = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    library.soft_gemm.argtypes = [
        *operand, *operand, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_int, ctypes.c_void_p, ctypes.c_int,
    ]  # fmt: skip

    def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool, threads: int) -> None:
        rows, columns = out.shape
        room = torch.empty(library.soft_room(rows, columns) + 64, dtype=torch.uint8)
        address = (room.data_ptr() + 63) // 64 * 64
        sides = a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride()
        library.soft_gemm(*sides, out.data_ptr(), rows, columns, a.shape[1], add, address, threads)

    return multiply


def operand(rows: int, columns: int, turned: bool) -> Tensor:
    """Laid out by columns if `turned`; NaN stands between the rows."""
    shape = (columns, rows) if turned else (rows, columns)
    room = torch.full((shape[0], shape[1] + 3), float("nan"), dtype=torch.bfloat16)[:, : shape[1]]
    room.copy_(torch.randn(shape))
    return room.t() if turned else room


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("turn_a", (False, True))
@pytest.mark.parametrize("turn_b", (False, True))
@pytest.mark.parametrize("add", (False, True))
def test_products(soft: Multiply, size: tuple[int, int, int], turn_a: bool, turn_b: bool, add: bool) -> None:
    rows, columns, depth = size
    a, b = operand(rows, depth, turn_a), operand(depth, columns, turn_b)
    before = torch.randn(rows, columns)
    out = before.clone() if add else torch.full_like(before, float("nan"))
    soft(a, b, out, add, 2)
    want = a.double() @ b.double() + (before.double() if add else 0)
    bound = (depth + 2) * 2.0**-24 * (a.double().abs() @ b.double().abs() + before.double().abs() * add)
    assert ((out.double() - want).abs() <= bound).all()
