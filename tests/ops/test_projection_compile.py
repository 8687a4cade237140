"""torch.compile without graph breaks, opcheck on the raw ops, autocast."""

from typing import Any

import backends
import pytest
import torch
from projection_cases import KERNELS, SKIPS, Case, call, gradients_of, make, over_backends, over_kernels, upstream_of
from torch import Tensor

import pyelastic
from pyelastic.ops import projection as op


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(backend: str, case: Case, **how: Any) -> Any:
    """Takes the case's tensors by name; no graph break."""

    def f(**tensors: Tensor) -> Tensor:
        return pyelastic.projection(**tensors, normalize=case.normalize, backend=backend)

    return torch.compile(f, backend="aot_eager", fullgraph=True, **how)


def assert_same(f: Any, backend: str, case: Case) -> None:
    """Value and gradients of f and of the plain call."""
    y, want = call(backend, case)
    _, leaves = call(backend, case)
    out = f(**leaves)
    upstream = upstream_of(case).to(y.device)
    y.backward(upstream)
    out.backward(upstream)
    torch.testing.assert_close(out, y, rtol=1e-5, atol=1e-5)
    found, gradients = gradients_of(leaves), gradients_of(want)
    assert found.keys() == gradients.keys() == case.tensors.keys()
    for name, grad in gradients.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-5)


@over_backends
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("normalize", (False, True))
def test_fullgraph(backend: str, skip: str, normalize: bool) -> None:
    case = make(2, 3, skip=skip, normalize=normalize, bias=skip != "identity")
    assert_same(compiled(backend, case), backend, case)


@over_backends
def test_one_graph_serves_several_sizes(backend: str) -> None:
    """dynamic=True: the second size must be right too, not only the traced one."""
    f = compiled(backend, make(), dynamic=True)
    for rows, d_in, d_out in ((13, 20, 9), (7, 11, 5), (40, 6, 17)):
        assert_same(f, backend, make(rows, d_in=d_in, d_out=d_out, skip="projected"))


@over_kernels
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("normalize", (False, True))
def test_opcheck(backend: str, skip: str, normalize: bool) -> None:
    """Schema, fake kernel and AOT dispatch of both raw ops."""
    case = make(skip=skip, normalize=normalize, dtype=torch.bfloat16, parameters=torch.float32)
    tensors = backends.to_device(backend, case.tensors)
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    r, r_w = tensors.get("residual"), tensors.get("residual_weight")
    forward, backward = op.OPS[backend]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(forward, (x, weight, bias, r, r_w, normalize), test_utils=tests)
    y, inverse = forward(x, weight, bias, r, r_w, normalize)
    every = (True, True, True, r is not None, r_w is not None)
    for needs in (every, (True, False, True, False, False), (False, True, False, r is not None, False)):
        arguments = (torch.ones_like(y), x, weight, r, r_w, y, inverse, normalize, needs)
        torch.library.opcheck(backward, arguments, test_utils=tests)


@over_backends
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    """The op takes inputs as they are, inside autocast too."""
    case = make(skip="projected", dtype=dtype)
    want, wanted = call(backend, case)
    with torch.autocast(backends.device_of(backend).type, torch.bfloat16):
        got, found = call(backend, case)
    assert got.dtype == dtype and torch.equal(got, want)
    want.sum().backward()
    got.sum().backward()
    for name, leaf in wanted.items():
        assert leaf.grad is not None and found[name].grad is not None
        assert torch.equal(leaf.grad, found[name].grad), name


@over_kernels
def test_backward_under_autocast(backend: str) -> None:
    case = make(skip="projected")
    want, wanted = call(backend, case)
    got, found = call(backend, case)
    want.sum().backward()
    with torch.autocast(backends.device_of(backend).type, torch.bfloat16):
        got.sum().backward()
    for name, grad in gradients_of(wanted).items():
        assert torch.equal(grad, gradients_of(found)[name]), name


def test_every_kernel_is_here() -> None:
    assert set(KERNELS) <= set(op.OPS) and "cpu" in KERNELS
