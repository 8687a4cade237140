"""``python -m pyelastic.info [--json | --matrix]``: what is built, what is not and why, for a bug report.

Nothing but the standard library is imported before the probes, and each probe is guarded: the report always prints.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import Any


def _guard(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except BaseException as error:  # a report must survive whatever it reports on
        return f"failed: {type(error).__name__}: {error}"


def _version(module: str) -> str:
    return str(__import__(module).__version__)


def _extension() -> dict[str, Any]:
    from pyelastic import _extension

    state = _extension.state()
    report = {"status": state.status, "reason": state.reason, "mend": state.mend, **_extension.build_metadata()}
    if state.status == "built":
        report["isa"] = _extension.load().isa()
    return report


def _devices() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def matrix() -> list[dict[str, str]]:
    """One row per op and backend, from the dispatcher's own table."""
    import pyelastic.ops  # noqa: F401  (registers)
    from pyelastic import _dispatch

    return [
        {
            "op": op,
            "backend": name,
            "state": "not implemented: " + backend.reason if backend.run is None else backend.label,
            "dtypes": " ".join(backend.dtypes),
            "directions": " ".join(backend.directions) if backend.run else "",
            "deterministic": str(backend.deterministic) if backend.run else "",
        }
        for op, table in _dispatch.registry().items()
        for name, backend in table.items()
    ]


def report() -> dict[str, Any]:
    """Everything; a probe that fails leaves its reason as the value."""
    return {
        "pyelastic": _guard(lambda: __import__("importlib.metadata").metadata.version("pyelastic")),
        "python": platform.python_version(),
        "platform": _guard(platform.platform),
        "torch": _guard(lambda: _version("torch")),
        "triton": _guard(lambda: _version("triton")),
        "cuda devices": _guard(_devices),
        "extension": _guard(_extension),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("PYELASTIC_")},
        "matrix": _guard(matrix),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pyelastic.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument("--matrix", action="store_true", help="op x backend only")
    options = parser.parse_args(arguments)
    full = report()
    if options.json:
        print(json.dumps(full, indent=1))
        return
    table = full.pop("matrix")
    for key, value in {} if options.matrix else full.items():
        print(f"{key}: {value}")
    for row in table if isinstance(table, list) else [{"matrix": table}]:
        print("  ".join(str(value) for value in row.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
