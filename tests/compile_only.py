"""Pytest plugin: Triton launches are bound and compiled by Triton's own JIT as on a GPU, and then left out.

``make launches`` runs the Triton tests so, with no GPU: what the launchers pass is what gets compiled, where the budget
(kernel_budget.py) compiles signatures that it writes itself. Results are rubbish, so tests fail, which does not count;
the run fails if a kernel does not compile or wants more shared memory than a block may have, and prints what spills.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # conftest.py sets it, after these imports

import compiled
import pyelastic.triton_kernels
import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from pyelastic.ops import _triton

ARCH = int(os.environ.get("PYELASTIC_TEST_ARCH", "90"))
FOLDER = Path(os.environ.setdefault("PYELASTIC_TEST_LAUNCHES", tempfile.mkdtemp()))  # the same for all processes


class Driver:
    """Of a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


triton.runtime.driver.set_active(Driver())
for module in pkgutil.iter_modules(pyelastic.triton_kernels.__path__):
    importlib.import_module(f"pyelastic.triton_kernels.{module.name}")
_triton.why_not = lambda *arguments: None
_run = JITFunction.run
_seen: set[str] = set()


def _say(kind: str, kernel: JITFunction, text: str) -> None:
    with (FOLDER / f"{os.getpid()}.log").open("a") as log:
        log.write(f"{kind} {kernel.fn.__name__}: {text}\n")


def run(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    try:
        made = _run(self, *arguments, grid=grid, warmup=True, **options)
    except Exception as error:
        _say("FAILED", self, f"{type(error).__name__}: {str(error)[:2000]!r}")
        raise
    if made.hash in _seen:
        return made
    _seen.add(made.hash)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        (figures,) = compiled.resources(file.name).values()
    constants = {self.arg_names[at[0]]: value for at, value in made.src.constants.items()}
    kind = "SHARED" if made.metadata.shared > compiled.SHARED_LIMIT[ARCH] else "SPILLS" if figures["STACK"] else "fits"
    _say(kind, self, f"{figures['STACK']} bytes of stack, {made.metadata.shared} shared, {constants}")
    return made


JITFunction.run = run


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return
    lines = sorted({line for log in FOLDER.glob("*.log") for line in log.read_text().splitlines()})
    kinds = Counter(line.split()[0] for line in lines)
    print("\n" + "\n".join(line for line in lines if not line.startswith("fits")))
    print(f"{sum(kinds.values())} launches compiled for sm_{ARCH}: {dict(kinds)}")
    session.exitstatus = int(not lines or kinds["FAILED"] + kinds["SHARED"] > 0)
