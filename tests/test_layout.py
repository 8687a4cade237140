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
    sources = [*ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cu")]
    lines = [line for path in sources for line in path.read_text().splitlines() if line.startswith("#include")]
    assert lines and not [line for line in lines if "torch" in line or "ATen" in line or "c10" in line]


@pytest.mark.parametrize(("folder", "banned"), [("eager", "ops"), ("eager", "nn"), ("ops", "nn"), ("ops", "optim")])
def test_imports_go_one_way(folder: str, banned: str) -> None:
    for path in (ROOT / "pyelastic" / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith(f"pyelastic.{banned}")], path


def test_every_overload_names_its_backend() -> None:
    names = [str(overload._schema.overload_name) for overload in _library.overloads()]
    assert names and set(names) <= set(_dispatch.BACKENDS)
