"""Generated from the registry: every implemented backend is complete, every raw op is registered as torch wants it."""

import inspect
import os

import backends
import pytest
import torch

import pyelastic
import pyelastic.ops
from pyelastic import _dispatch, _library

OPS = sorted(_dispatch.registry())
IMPLEMENTED = [(op, name) for op in OPS for name, b in _dispatch.registry()[op].items() if b.run is not None]
OVERLOADS = _library.overloads()
# What a direction's raw op is called; an optimizer has steps, which change their arguments and return nothing.
RAW_OPS = {"forward": "fwd", "backward": "bwd", "step": "step"}
DTYPES = {"float16", "bfloat16", "float32", "float64", "int8"}


@pytest.mark.parametrize("op", OPS)
def test_door(op):
    """One public function of the op's name, with backend="auto" and a docstring that says shapes, errors, source."""
    door = getattr(pyelastic, op)
    assert inspect.signature(door).parameters["backend"].default == "auto"
    for word in ("Args:", "Returns:", "Raises:", "["):
        assert word in door.__doc__
    assert op in pyelastic.__all__


@pytest.mark.parametrize(("op", "name"), IMPLEMENTED)
def test_backend_describes_itself(op, name):
    backend = _dispatch.registry()[op][name]
    assert set(backend.dtypes) <= DTYPES and "float32" in backend.dtypes
    assert backend.label and backend.directions and set(backend.directions) <= set(RAW_OPS)


@pytest.mark.parametrize(("op", "name"), [pair for pair in IMPLEMENTED if pair[1] != "eager"])
def test_kernel_backend_has_a_raw_op_for_each_direction(op, name):
    """compile needs raw ops: a backend without them would break the graph."""
    found = {str(o._schema.name).removeprefix("pyelastic::") for o in OVERLOADS if o._schema.overload_name == name}
    wanted = {f"{op}_{RAW_OPS[direction]}" for direction in _dispatch.registry()[op][name].directions}
    assert wanted and wanted <= found


@pytest.mark.parametrize("overload", OVERLOADS, ids=str)
def test_raw_op_has_a_fake_and_mutates_only_what_its_schema_says(overload):
    name = f"{overload._schema.name}.{overload._schema.overload_name}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")
    assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None
    # No autograd formula of its own: the autograd.Function outside is the one place.
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd")


@pytest.mark.skipif(not os.environ.get("PYELASTIC_TEST_BACKENDS"), reason="the job expects nothing in particular")
@pytest.mark.parametrize("op", OPS)
def test_backends_that_the_job_expects_are_tested(op):
    """Without the emulator or Triton, their tests are not collected: no failure would show it. make test sets this."""
    expected = set(os.environ["PYELASTIC_TEST_BACKENDS"].split(","))
    left_out = {name for name, b in _dispatch.registry()[op].items() if b.run is None}
    assert expected <= set(_dispatch.BACKENDS)
    assert expected - left_out <= set(backends.implemented(op))


def test_matrix_is_the_registry():
    from pyelastic import info

    rows = {(row["op"], row["backend"]) for row in info.matrix()}
    assert rows == {(op, name) for op in OPS for name in _dispatch.BACKENDS}
