"""torch.compile without graph breaks, opcheck on the raw ops, autocast."""

from typing import Any

import backends
import pytest
import torch
from norm_linear_attention_cases import KERNELS, Case, call, make, over_backends, over_kernels, upstream_of
from torch import Tensor

import pyelastic
from pyelastic.ops import norm_linear_attention as op
from pyelastic.ops.norm_linear_attention_step import empty_state


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(backend: str, case: Case, **how: Any) -> Any:
    """Takes the case's tensors by name; no graph break."""

    def f(q: Tensor, k: Tensor, v: Tensor, s0: Tensor | None = None, z0: Tensor | None = None, **more: Any) -> Any:
        state = None
        if s0 is not None and z0 is not None:
            state = pyelastic.LinearAttentionState(s0, z0, torch.full((len(s0),), 3, device=s0.device))
        return pyelastic.norm_linear_attention(
            q,
            k,
            v,
            initial_state=state,
            mode=case.mode,
            rope=case.rope,
            rope_tables=case.tables,
            causal=case.causal,
            output_final_state=True,
            backend=backend,
            **more,
        )

    return torch.compile(f, backend="aot_eager", fullgraph=True, **how)


def assert_same(f: Any, backend: str, case: Case) -> None:
    """Value and gradients of f and of the plain call."""
    case = case if case.before is None else case.having(before=[3] * len(case.before))
    made, want = call(backend, case)
    _, leaves = call(backend, case)
    o, state = f(**leaves)
    upstream = upstream_of(case)["o"].to(o.device)
    made["o"].backward(upstream)
    o.backward(upstream)
    torch.testing.assert_close(o, made["o"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.s, made["s"], rtol=1e-4, atol=1e-5)
    for name, leaf in want.items():
        torch.testing.assert_close(leaves[name].grad, leaf.grad, rtol=1e-4, atol=1e-5)


@over_backends
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("options", ({}, {"gate": True, "learned": True}, {"state": True, "mode": "cos"}), ids=str)
def test_fullgraph(backend: str, causal: bool, options: dict[str, Any]) -> None:
    case = make(2, 6, causal=causal, **options)
    assert_same(compiled(backend, case), backend, case)


@over_kernels
def test_one_graph_serves_several_lengths(backend: str) -> None:
    """dynamic=True: the second length must be right too, not only the traced one."""
    f = compiled(backend, make(), dynamic=True)
    for n in (9, 5, 70):
        assert_same(f, backend, make(2, n))


@over_kernels
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("packed", (False, True))
def test_opcheck(backend: str, causal: bool, packed: bool) -> None:
    """Schema, fake kernel and AOT dispatch of the raw ops."""
    device = backends.device_of(backend)
    case = make(2, 5, gate=True, state=True, rope="num", causal=causal, lengths=(3, 2) if packed else None)
    tensors = {n: x.to(device) for n, x in case.tensors.items()}
    sin, cos = (t.to(device) for t in case.tables)
    params = torch.tensor([[3.0] * 2, [0.5] * 2, [1.0] * 2], device=device)
    count = torch.tensor(case.before, device=device)
    cu = case.cu_seqlens.to(device) if packed else None
    scalars = (0, False, causal, True, 3.0, 20.0, 1e-6, 1e-6, True)
    qkv = (tensors["q"], tensors["k"], tensors["v"], params, tensors["gate"], sin, cos)
    given = (*qkv, count if causal else None, cu, tensors["s0"], tensors["z0"], count, *scalars)
    forward, backward, step = op.OPS[backend]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(forward, given, test_utils=tests)
    o, s, z = forward(*given)
    for needs in (
        (True,) * 7,
        (True, False, False, False, True, False, False),
        (False, True, True, True, False, True, True),
    ):
        some = torch.ones_like(s) if needs[1] else None
        torch.library.opcheck(backward, (*given, s, z, torch.ones_like(o), some, None, needs), test_utils=tests)
    if not packed:  # short and without a state: in quadratic order on the CPU
        given = (*qkv, None, None, None, None, None, *scalars[:-1], False)
        torch.library.opcheck(forward, given, test_utils=tests)
        o, s, z = forward(*given)
        assert s.numel() == 0 or backend != "cpu"
        needs = (True, True, True, True, True, False, False)
        torch.library.opcheck(backward, (*given, s, z, torch.ones_like(o), None, None, needs), test_utils=tests)
        state = empty_state(2, 2, 6, 5, device=device)
        given = (*qkv, state.tokens, state.s, state.z, 0, False, True, 3.0, 20.0, 1e-6, 1e-6)
        torch.library.opcheck(step, given, test_utils=("test_schema", "test_faketensor"))


@over_kernels
@pytest.mark.parametrize("final", (False, True))
def test_fakes_know_the_order_of_results(backend: str, final: bool) -> None:
    """Heads first, and a gradient of another order: the strides of the fakes are those of the kernels."""
    device = backends.device_of(backend)
    case = make(2, 5, gate=True, causal=True, heads=4, kv_heads=2)
    assert case.gate is not None
    rows = (case.q, case.k, case.v, case.gate)
    q, k, v, gate = (x.to(device).transpose(1, 2).contiguous().transpose(1, 2) for x in rows)
    params = torch.tensor([[3.0] * 4, [0.5] * 4, [1.0] * 4], device=device)
    scalars = (0, False, True, True, 3.0, 20.0, 1e-6, 1e-6)
    given = (q, k, v, params, gate, *(None,) * 7, *scalars, final)
    forward, backward, step = op.OPS[backend]
    torch.library.opcheck(forward, given, test_utils="test_faketensor")
    o, s, z = forward(*given)
    grad = torch.ones(o.shape, device=device)
    arguments = (*given, s, z, grad, None, None, (True,) * 5 + (False,) * 2)
    torch.library.opcheck(backward, arguments, test_utils="test_faketensor")
    state = empty_state(2, 2, 6, 5, device=device)
    given = (q, k, v, params, gate, None, None, state.tokens, state.s, state.z, 0, False, True, *scalars[4:])
    torch.library.opcheck(step, given, test_utils="test_faketensor")


@over_backends
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    """The op takes inputs as they are, inside autocast too."""
    case = make(1, 8, causal=True, dtype=dtype)
    want, wanted = call(backend, case)
    with torch.autocast(backends.device_of(backend).type, torch.bfloat16):
        got, found = call(backend, case)
        if backend != "eager":  # whose backward is torch's own
            got["o"].sum().backward()
    if backend == "eager":
        got["o"].sum().backward()
    assert got["o"].dtype == dtype and torch.equal(got["o"], want["o"])
    want["o"].sum().backward()
    for name, leaf in wanted.items():
        assert torch.equal(leaf.grad, found[name].grad), name


def test_every_kernel_is_here() -> None:
    assert set(KERNELS) <= set(op.OPS) and "cpu" in KERNELS
