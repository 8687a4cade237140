"""Registers raw ops with torch: one schema, implementation and fake per backend overload."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("pyelastic", "FRAGMENT")
_overloads: list[Any] = []


def define(op: str, backend: str, schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define ``pyelastic::<op>.<backend>`` with ``schema`` ("(arguments) -> (results)"); returns the overload.

    The op has no autograd formula: a plain ``autograd.Function`` around it costs half of ``register_autograd``.
    """
    name = f"{op}.{backend}"
    _library.define(name + schema)
    _library.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyelastic::{name}", fake, lib=_library)
    overload = getattr(getattr(torch.ops.pyelastic, op), backend)
    _overloads.append(overload)
    return overload


def overloads() -> list[Any]:
    """Every overload defined so far, for the generated tests."""
    return list(_overloads)
