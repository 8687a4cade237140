"""Settings every test runs under: poisoned memory, reproducible fuzzing, strict dispatch."""

import os
import random
from collections import defaultdict
from collections.abc import Iterator

# pyelastic reads these once, so they are set before any test module imports it. A backend chosen in
# the developer's shell would silently move every "auto" test to it.
os.environ["PYELASTIC_STRICT"] = "1"
os.environ.pop("PYELASTIC_BACKEND", None)
# cuBLAS refuses deterministic mode without a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# torch.compile then refuses a custom op whose results are one another, which it otherwise only warns of.
os.environ["TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING"] = "1"

import hypothesis
import pytest
import torch

# Read when a Triton kernel is defined: with no GPU, kernels run on the CPU (tests/interpreted.py).
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None, max_examples=40)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=5000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, metavar="N", help="at most N cases of each test, drawn at random")
    parser.addoption("--draw", default="", metavar="SEED", help="of --cases; the same draw for the same seed")


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of each parametrized test keep as many cases as --cases says, for runs that are slow."""
    most = config.getoption("--cases")
    if most is None:
        return
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for name, found in cases.items():
        kept |= set(random.Random(config.getoption("--draw") + name).sample(found, min(most, len(found))))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN (integers: their maximum).

    torch does this itself in deterministic mode, for empty, empty_like, new_empty, empty_strided
    and resize_ alike, and torch.compile understands it, which a monkeypatch would not survive.
    Deterministic mode also makes torch raise where an op of ours would use a nondeterministic one.
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(was_on)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests may run in any order or alone, so no test inherits another one's random state."""
    torch.manual_seed(0)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """For tests that call torch.set_num_threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
