"""The error catalogue: each wrong call raises what the design fixes, naming the argument."""

from typing import Any

import backends
import pytest
import torch
from projection_cases import OP, call, make, over_kernels

import pyelastic

X, W, B = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3)
R, R_PROJECTED, R_W = torch.randn(5, 3), torch.randn(5, 2), torch.randn(3, 2)

CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x type": ({"x": [1.0]}, TypeError, "x is list; expected a tensor"),
    "weight type": ({"weight": None}, TypeError, "weight is NoneType; expected a tensor"),
    "bias type": ({"bias": True}, TypeError, "bias is bool; expected a tensor"),
    "residual type": ({"residual": True}, TypeError, "residual is bool; expected a tensor"),
    "x rank": ({"x": torch.tensor(1.0)}, ValueError, r"x is \[\]; expected \[..., d_in\]"),
    "weight rank": ({"weight": B}, ValueError, r"weight is \[3\]; expected 2 dimensions \[d_out, d_in\]"),
    "integer x": ({"x": X.int()}, TypeError, "x is int32; expected one of float16, bfloat16, float32, float64"),
    "integer weight": ({"weight": W.long()}, TypeError, "weight is int64"),
    "complex bias": ({"bias": B.cfloat()}, TypeError, "bias is complex64"),
    "float64 weight": ({"weight": W.double()}, TypeError, "x is torch.float32 and weight is torch.float64"),
    "float64 x": ({"x": X.double()}, TypeError, "x is torch.float64 and weight is torch.float32; float64 needs both"),
    "float64 residual": ({"residual": R.double()}, TypeError, "residual is torch.float64"),
    "d_in": ({"x": X[:, :3]}, ValueError, r"x is \[5, 3\] and weight is \[3, 4\]; expected \[..., d_in\]"),
    "d_in is 0": ({"x": X[:, :0], "weight": W[:, :0]}, ValueError, r"x is \[5, 0\] and weight is \[3, 0\]"),
    "d_out is 0": ({"weight": W[:0], "bias": None}, ValueError, r"weight is \[0, 4\]"),
    "bias shape": ({"bias": B[:2]}, ValueError, r"bias is \[2\]; expected \[3\]"),
    "bias rank": ({"bias": B[None]}, ValueError, r"bias is \[1, 3\]; expected \[3\]"),
    "residual width": ({"residual": R_PROJECTED}, ValueError, r"residual is \[5, 2\]; expected \[5, 3\]"),
    "residual rows": ({"residual": R[:4]}, ValueError, r"residual is \[4, 3\]; expected \[5, 3\]"),
    "residual rank": ({"residual": R[None]}, ValueError, r"residual is \[1, 5, 3\]; expected \[5, 3\]"),
    "residual of weight": ({"residual": R, "residual_weight": R_W}, ValueError, r"residual is \[5, 3\]; .*\[5, 2\]"),
    "weight alone": ({"residual_weight": R_W}, ValueError, "residual_weight needs residual"),
    "residual_weight rank": (
        {"residual": R_PROJECTED, "residual_weight": B}, ValueError, r"residual_weight is \[3\]; .*\[d_out, d_r\]",
    ),
    "residual_weight rows": (
        {"residual": R_PROJECTED, "residual_weight": R_W[:2]}, ValueError, r"is \[2, 2\]; expected \[3, d_r\]",
    ),
    "d_r is 0": (
        {"residual": R[:, :0], "residual_weight": R_W[:, :0]}, ValueError, r"residual_weight is \[3, 0\]",
    ),
    "backend": ({"backend": "cud"}, ValueError, "unknown backend 'cud'; choose from auto, cuda, triton, cpu, eager"),
    "devices": ({"weight": W.to("meta")}, ValueError, "one device; x is on cpu, weight is on meta, bias is on cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_wrong_call(name: str) -> None:
    changes, error, message = CALLS[name]
    with pytest.raises(error, match=message) as caught:
        pyelastic.projection(**{"x": X, "weight": W, "bias": B, **changes})
    assert str(caught.value).startswith("projection: ")


def test_a_dtensor_is_refused() -> None:
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(TypeError, match=r"projection: weight is a DTensor.*to_local"):
        pyelastic.projection(X, W.as_subclass(DTensor))


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        pyelastic.projection(X, W, B, R)  # type: ignore[misc]


@over_kernels
@pytest.mark.parametrize("normalize", (False, True))
def test_double_backward_is_refused(backend: str, normalize: bool) -> None:
    y, leaves = call(backend, make(normalize=normalize))
    (grad,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"projection: double backward needs backend='eager'"):
        grad.square().sum().backward()


def test_eager_has_a_double_backward() -> None:
    y, leaves = call("eager", make(dtype=torch.float64))
    (grad,) = torch.autograd.grad(y.pow(3).sum(), leaves["x"], create_graph=True)
    grad.square().sum().backward()
    second = leaves["weight"].grad
    assert second is not None and second.isfinite().all() and second.any()


def test_backends_say_why_not() -> None:
    reasons = pyelastic.backends(OP, X, W)
    assert reasons["eager"] is None and (backends.GPU or reasons["cuda"] is not None)
    x, w = X.to("meta"), W.to("meta")
    with pytest.raises(pyelastic.BackendError, match=r"projection: backend 'cpu' cannot run this call: x is on meta"):
        pyelastic.projection(x, w, backend="cpu")
