"""What every op's tests share."""

import backends
import pytest


@pytest.fixture(autouse=True)
def backend_is_there(request: pytest.FixtureRequest) -> None:
    """Skip where the extension was honestly not built; "auto" means cpu on a CPU tensor."""
    callspec = getattr(request.node, "callspec", None)
    name = callspec.params.get("backend") if callspec else None
    if name is not None:
        backends.require("cpu" if name == "auto" else name)
