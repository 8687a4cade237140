"""One dispatcher for all ops: every backend says itself why it cannot run a call.

Precedence of the request: argument > ``use_backend(...)`` > ``PYELASTIC_BACKEND`` > auto. Auto takes the first
backend, in the op's order for the tensor's device, whose ``why_not`` is None. Nothing here reads tensor data, and
``resolve`` is plain Python on metadata, so it can be traced by ``torch.compile(fullgraph=True)``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

BACKENDS = ("cuda", "triton", "cpu", "eager")
NAMES = ("auto", *BACKENDS)

_log = logging.getLogger("pyelastic")


class BackendError(RuntimeError):
    """No backend, or not the one asked for, can run a call; the message says why and what to do."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    ``why_not(call)`` is a sentence that says why this backend cannot run the call, or None. The other fields
    describe it.
    """

    name: str
    run: Callable[..., Any] | None
    why_not: Callable[[Any], str | None]
    dtypes: tuple[str, ...] = ()
    directions: tuple[str, ...] = ("forward", "backward")
    deterministic: bool = True
    label: str = ""
    reason: str = ""


@dataclass(frozen=True)
class _Op:
    backends: dict[str, Backend]
    make_call: Callable[..., Any]
    order: Callable[[Any], Sequence[str]]


_ops: dict[str, _Op] = {}
_requests: list[dict[str, str]] = []  # the stack of use_backend
_logged: set[str] = set()


def not_implemented(name: str, reason: str) -> Backend:
    """A backend that an op leaves out on purpose, with the reason that errors and the matrix show."""
    return Backend(name, None, lambda call: f"not implemented: {reason}", reason=reason)


def default_order(call: Any) -> Sequence[str]:
    """Backends to try for a call, best first."""
    if call.device.type == "cuda":
        return ("cuda", "triton", "eager")
    return ("cpu", "eager") if call.device.type == "cpu" else ("triton", "eager")


def register(
    op: str,
    *backends: Backend,
    make_call: Callable[..., Any],
    order: Callable[[Any], Sequence[str]] = default_order,
) -> None:
    """Make an op known. Every name in BACKENDS must be there, if only as ``not_implemented``."""
    table = {backend.name: backend for backend in backends}
    if set(table) != set(BACKENDS) or len(table) != len(backends):
        raise ValueError(f"{op}: register each of {', '.join(BACKENDS)} once; got {[b.name for b in backends]}")
    _ops[op] = _Op(table, make_call, order)


def registry() -> Mapping[str, Mapping[str, Backend]]:
    """Every registered op and its backends."""
    return {op: entry.backends for op, entry in _ops.items()}


def _parse(spec: str, source: str) -> dict[str, str]:
    """``"cpu"`` or ``"op=cpu,other=eager"`` as {op or '*': backend}."""
    requests = {}
    for part in filter(None, (piece.strip() for piece in spec.split(","))):
        op, _, name = part.rpartition("=")
        if name not in NAMES:
            raise ValueError(f"{source}: unknown backend '{name}'; choose from {', '.join(NAMES)}")
        requests[op or "*"] = name
    return requests


def _flag(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1", ""):
        raise ValueError(f"{name} is '{value}'; expected 0 or 1")
    return value == "1"


_environment = _parse(os.environ.get("PYELASTIC_BACKEND", ""), "PYELASTIC_BACKEND")
_strict = _flag("PYELASTIC_STRICT")
_debug = _flag("PYELASTIC_DEBUG")


def may_read(device: torch.device) -> bool:
    """Whether an argument's data may be checked: on a GPU that would synchronise, a traced tensor has none."""
    return (device.type == "cpu" or _debug) and not torch.compiler.is_compiling()


def check_requested_ops() -> None:
    """ValueError if PYELASTIC_BACKEND names an op that does not exist; called when all ops are registered."""
    _check_ops(_environment, "PYELASTIC_BACKEND")


def _check_ops(requests: dict[str, str], source: str) -> None:
    unknown = sorted(set(requests) - set(_ops) - {"*"})
    if unknown:
        raise ValueError(f"{source}: unknown op '{unknown[0]}'; choose from {', '.join(_ops)}")


@contextmanager
def use_backend(spec: str) -> Iterator[None]:
    """Within the block, calls without ``backend=`` use ``spec``: a name, or ``"op=name,op=name"``.

    Holds for the whole process, like ``torch.set_num_threads``; blocks nest. Raises ValueError for an unknown name of
    a backend or an op.
    """
    requests = _parse(spec, "use_backend")
    if set(requests) != {"*"}:
        import pyelastic.ops  # noqa: F401  (registers)

        _check_ops(requests, "use_backend")
    _requests.append(requests)
    try:
        yield
    finally:
        _requests.pop()


def _requested(op: str, argument: str) -> str:
    if argument not in NAMES:
        raise ValueError(f"{op}: unknown backend '{argument}'; choose from {', '.join(NAMES)}")
    if argument != "auto":
        return argument
    for requests in (*reversed(_requests), _environment):
        name = requests.get(op, requests.get("*", "auto"))
        if name != "auto":
            return name
    return "auto"


def unsupported_dtype(call: Any, supported: Sequence[torch.dtype]) -> str | None:
    """The sentence of a backend that lacks the call's dtype, with the cast that would help."""
    if call.dtype in supported:
        return None
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in supported)
    got = str(call.dtype).removeprefix("torch.")
    return f"{call.dtype_argument} is {got}; supported: {names}"


def _why_not(entry: _Op, backend: Backend, call: Any) -> str | None:
    """The backend's own sentence, or that it would break torch.use_deterministic_algorithms."""
    reason = backend.why_not(call)
    if reason is None and not backend.deterministic and torch.are_deterministic_algorithms_enabled():
        others = [b.name for b in entry.backends.values() if b.deterministic and b.why_not(call) is None]
        return (
            "it is not deterministic and torch.use_deterministic_algorithms(True) is in force; "
            f"deterministic here: {', '.join(others)}"
        )
    return reason


def resolve(op: str, call: Any, backend: str = "auto") -> Backend:
    """The backend that runs ``call``.

    Raises ValueError for an unknown name and BackendError where the backend asked for, or every backend, says why not.
    """
    entry = _ops[op]
    name = _requested(op, backend)
    if name != "auto":
        chosen = entry.backends[name]
        reason = _why_not(entry, chosen, call)
        if reason is not None:
            double = reason.startswith(f"{call.dtype_argument} is float64")
            hint = f" or {call.dtype_argument}.float()" if double else ""
            raise BackendError(
                f"{op}: backend '{name}' cannot run this call: {reason}. Use backend='eager'{hint}."
            )
        return chosen
    reasons = []
    for candidate in entry.order(call):
        reason = _why_not(entry, entry.backends[candidate], call)
        if reason is not None:
            reasons.append(f"{candidate}: {reason}")
            continue
        if candidate == "eager" and reasons:
            _fell_back(op, reasons)
        return entry.backends[candidate]
    raise BackendError("\n".join([f"{op}: no backend can run this call", *reasons]))


def _fell_back(op: str, reasons: list[str]) -> None:
    """Eager because no kernel can run: never silent, an error under PYELASTIC_STRICT=1."""
    message = "\n".join([f"{op}: no kernel can run this call; eager would", *reasons])
    if _strict:
        raise BackendError(f"{message}\nPYELASTIC_STRICT=1 makes this an error; backend='eager' asks for it.")
    if not torch.compiler.is_compiling() and message not in _logged:
        _logged.add(message)
        _log.warning(message)


def backends(op: str, *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """``{name: None or why it cannot run}`` for a call of ``op`` with these arguments."""
    import pyelastic.ops  # noqa: F401  (registers)

    if op not in _ops:
        raise ValueError(f"unknown op '{op}'; choose from {', '.join(_ops)}")
    entry = _ops[op]
    call = entry.make_call(*args, **kwargs)
    return {name: _why_not(entry, backend, call) for name, backend in entry.backends.items()}
