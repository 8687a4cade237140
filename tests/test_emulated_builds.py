"""The op tests of backend "cuda" once more, under the emulator's sanitizer builds, each in a process of its own.

Of a test's cases CASES, drawn at random, another draw for each build: all of them would take most of CI's time, and
cases of one test differ more in numbers than in what they touch. ``make sanitize`` runs all.
"""

import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch

ROOT = Path(__file__).parents[1]
# Without what launches no kernel that other tests do not launch as well.
TESTS = "cuda and not compile and not errors and not tolerance_proof"
CASES = os.environ.get("PYELASTIC_TEST_SANITIZED_CASES", "8")


def _library(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _environment(build: str) -> dict[str, str]:
    environment = {**os.environ, "PYELASTIC_TEST_EMULATOR": build}
    if build == "asan":
        # libstdc++ as well: else the interceptor of exceptions, which torch throws, finds nothing to call.
        environment["LD_PRELOAD"] = f"{_library('libasan.so')} {_library('libstdc++.so')}"
        environment["ASAN_OPTIONS"] = "detect_leaks=0"
    return environment


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, under compute-sanitizer")
@pytest.mark.skipif(emulated.NAME != "plain", reason="already in such a process")
def test_cuda_kernels_under_sanitizers(tmp_path: Path) -> None:
    """Both builds at once: each is a process on one core."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/ops", "-k", TESTS]
    started = {}
    for build in ("asan", "race"):
        if not list(emulated.BUILD.glob(f"_emulator_{build}.*")):
            pytest.skip("the emulator was not built; make test builds it")
        draw = ["--cases", CASES, "--draw", build]
        with (tmp_path / build).open("wb") as log:
            started[build] = subprocess.Popen(
                command + draw, cwd=ROOT, env=_environment(build), stdout=log, stderr=subprocess.STDOUT
            )
    try:
        for build, process in started.items():
            status = process.wait(timeout=3600)
            text = (tmp_path / build).read_text()
            assert status == 0 and " passed" in text.splitlines()[-1], (build, text[-6000:])
    finally:
        for process in started.values():
            process.kill()
