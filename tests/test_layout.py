"""The architecture is the folder listing: one stem per op in every layer, no file over 500 lines, imports one way."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

import pyelastic.ops  # noqa: F401  (registers)
from pyelastic import _dispatch, _library

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
LAYERS = (
    "pyelastic/eager/{}.py",
    "pyelastic/ops/{}.py",
    "tests/ops/test_{}.py",
    "csrc/{}.h",
    "benchmarks/bench_{}.py",
    "docs/ops/{}.md",
)
KERNELS = {"cpu": "csrc/cpu/{}.cpp", "cuda": "csrc/cuda/{}.cu", "triton": "triton_kernels/{}.py"}


@pytest.mark.parametrize("op", sorted(_dispatch.registry()))
def test_an_op_has_its_stem_in_every_layer(op: str) -> None:
    table = _dispatch.registry()[op]
    wanted = [layer.format(op) for layer in LAYERS]
    wanted += [path.format(op) for name, path in KERNELS.items() if table[name].run is not None]
    assert [path for path in wanted if not (ROOT / path).exists()] == []


@pytest.mark.skipif(not TRACKED, reason="not a git checkout")
def test_no_file_is_over_500_lines() -> None:
    sources = [p for p in TRACKED if p.endswith((".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".txt", ".toml"))]
    assert sources
    assert [p for p in sources if len((ROOT / p).read_text().splitlines()) > 500] == []


def test_the_core_includes_no_torch_header() -> None:
    sources = [path for path in ROOT.glob("csrc/**/*.*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    lines = [line for path in sources for line in path.read_text().splitlines() if line.startswith("#include")]
    assert lines and not [line for line in lines if "torch" in line or "ATen" in line or "c10" in line]


def test_the_median_file_is_short() -> None:
    code = [p for p in TRACKED if p.endswith((".py", ".cpp", ".h", ".cu", ".cuh"))]
    lengths = sorted(len((ROOT / p).read_text().splitlines()) for p in code)
    assert not code or lengths[len(lengths) // 2] <= 200


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports; ``from a import b`` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


# Folder -> what nothing in it may import; the layers are named in the order in which they build on each other.
LAYERED = ("triton_kernels", "pyelastic.eager", "pyelastic.ops", "pyelastic.nn", "benchmarks")
BANNED = {folder: LAYERED[i + 1 :] for i, folder in enumerate(LAYERED)}
BANNED["triton_kernels"] = ("pyelastic", "tests")
BANNED["benchmarks"] = ("tests",)


@pytest.mark.parametrize("folder", LAYERED)
def test_imports_go_one_way(folder: str) -> None:
    files = list((ROOT / folder.replace(".", "/")).glob("*.py"))
    assert files
    for path in files:
        wrong = [n for n in imported(path) if any(f"{n}.".startswith(f"{b}.") for b in BANNED[folder])]
        assert not wrong, (path, wrong)


def test_a_wrong_import_is_seen(tmp_path: Path) -> None:
    for text in ("from pyelastic import ops", "import pyelastic.ops as x", "from pyelastic.ops.a import b"):
        (tmp_path / "x.py").write_text(text)
        assert any(f"{n}.".startswith("pyelastic.ops.") for n in imported(tmp_path / "x.py")), text


def test_every_overload_names_its_backend() -> None:
    names = [str(overload._schema.overload_name) for overload in _library.overloads()]
    assert names and set(names) <= set(_dispatch.BACKENDS)
