"""The CUDA kernels on the CPU: builds of csrc/emulator, made by `make test` (CMake option PYELASTIC_EMULATOR).

``PYELASTIC_TEST_EMULATOR`` chooses one: plain (default), asan (needs libasan preloaded), race, or off.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

BUILD = Path(__file__).parents[1] / "build" / "emulator"
NAME = os.environ.get("PYELASTIC_TEST_EMULATOR", "plain")


def load(name: str = NAME) -> ModuleType | None:
    """The module of one build, or None if it was not built or is switched off."""
    if name == "off" or not list(BUILD.glob(f"_emulator_{name}.*")):
        return None
    if str(BUILD) not in sys.path:
        sys.path.append(str(BUILD))
    module = importlib.import_module(f"_emulator_{name}")
    module.set_seed(0)
    return module
