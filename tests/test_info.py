"""The bug report: complete on a healthy install, and printed on a broken one."""

from __future__ import annotations

import json
import subprocess
import sys


def run(*arguments: str, before: str = "") -> str:
    code = f"{before}\nimport sys; from pyelastic import info; info.main({list(arguments)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_json_names_every_backend_and_its_state() -> None:
    report = json.loads(run("--json"))
    states = {row["backend"]: row["state"] for row in report["matrix"] if row["op"] == "margin_softmax"}
    assert set(states) == {"cuda", "triton", "cpu", "eager"}
    assert states["triton"].startswith("interpreted") and states["cuda"].startswith("emulated")
    assert report["extension"]["status"] == "built"


def test_matrix_alone() -> None:
    lines = run("--matrix").splitlines()
    assert [line.split()[1] for line in lines[:4]] == ["cuda", "triton", "cpu", "eager"]
    assert any(line.startswith("margin_softmax  cuda") for line in lines)


def test_prints_with_a_broken_module() -> None:
    broken = "import sys; sys.modules['pyelastic._C'] = type(sys)('pyelastic._C'); sys.modules['torch.cuda'] = None"
    report = run(before=broken)
    assert "torch: failed: ModuleNotFoundError" in report and "extension: failed: " in report


def test_import_brings_neither_triton_nor_the_module() -> None:
    code = "import sys, pyelastic; print([m for m in ('triton', 'pyelastic._C') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
