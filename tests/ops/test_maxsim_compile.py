"""torch.compile without graph breaks, opcheck on the raw ops, autocast."""

from typing import Any

import backends
import pytest
import torch
from maxsim_cases import KERNELS, OP, Case, call, make, masks, over_backends, over_kernels
from torch import Tensor

import pyelastic
from pyelastic.ops import maxsim as op


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED: dict[str, tuple[str, dict[str, Any]]] = {
    "cross": ("cross", {"normalize": True}),
    "grouped": ("grouped", {"topk": 2}),
    "smooth": ("cross", {"temperature": 0.5}),
    "tokens": ("cross", {"reduction": "none"}),
    "prefixes": ("single", {"dims": (8, 20)}),
    "packed": ("packed", {"max_seqlen_q": 9, "max_seqlen_d": 17}),
    "mean": ("cross", {"reduction": "mean", "mask_mode": "zero"}),
}


def both(f: Any, case: Case, backend: str, **how: Any) -> None:
    """Value and gradients of f compiled and not."""
    device = backends.device_of(backend)
    results = []
    for wrapped in (f, torch.compile(f, backend="aot_eager", fullgraph=True, **how)):
        q = case.queries.detach().to(device).clone().requires_grad_()
        d = case.documents.detach().to(device).clone().requires_grad_()
        out = wrapped(q, d)
        out.square().sum().backward()
        results.append((out.detach(), q.grad, d.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@over_backends
@pytest.mark.parametrize("name", COMPILED)
def test_fullgraph(backend: str, name: str) -> None:
    layout, options = COMPILED[name]
    case = masks(make(layout)).having(**options)
    told = backends.to_device(backend, case.options)
    both(lambda q, d: pyelastic.maxsim(q, d, backend=backend, **told), case, backend)


@over_backends
def test_fullgraph_loss(backend: str) -> None:
    case = make()
    both(lambda q, d: pyelastic.maxsim_info_nce(q, d, temperature=3.0, backend=backend), case, backend)
    teacher = torch.randn(3, 2).to(backends.device_of(backend))
    both(lambda q, d: pyelastic.maxsim_kl_distill(q, d, teacher, backend=backend), make("grouped"), backend)


@over_backends
def test_one_graph_serves_several_sizes(backend: str) -> None:
    """dynamic=True: the second size must be right too, not only the traced one."""
    f = torch.compile(
        lambda q, d: pyelastic.maxsim(q, d, normalize=True, backend=backend), backend="aot_eager", fullgraph=True,
        dynamic=True,
    )  # fmt: skip
    for nd, ld in ((4, 19), (7, 11), (5, 30)):
        want, q, d = call(backend, make(nd=nd, ld=ld).having(normalize=True))
        torch.testing.assert_close(f(q.detach(), d.detach()), want, rtol=1e-5, atol=1e-5)


@over_kernels
@pytest.mark.parametrize("name", ("plain", "smooth", "tokens", "topk", "list", "recompute", "prefixes"))
def test_opcheck(backend: str, name: str) -> None:
    """Schema, fake kernel and AOT dispatch of both raw ops."""
    options: dict[str, Any] = {"smooth": {"temperature": 0.5}, "topk": {"topk": 2}, "prefixes": {"dims": (8, 20)}}
    options = options.get(name, {})
    case = masks(make("list" if name == "list" else "cross", nq=2, nd=2, ld=5)).having(**options)
    device = backends.device_of(backend)
    prepared = op.prepare(
        case.queries.to(device), case.documents.to(device), normalize=True, **backends.to_device(backend, case.options)
    )
    inputs = prepared.inputs._replace(weights=prepared.weights)
    reason = pyelastic.backends(OP, inputs.queries, inputs.documents, **options)[backend]
    if reason is not None:
        pytest.skip(reason)
    forward, backward = op.OPS[backend]
    flags = (name == "tokens", name != "recompute")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(forward, (*inputs, *flags), test_utils=tests)
    outputs = forward(*inputs, *flags)
    grad = torch.ones_like(outputs[1] if flags[0] else outputs[0])
    for need in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(backward, (*inputs, *outputs[1:], grad, flags[0], *need), test_utils=tests)


@over_backends
def test_autocast_changes_nothing(backend: str) -> None:
    """The op takes inputs as they are, and scores are float32, inside autocast too."""
    case = make(dtype=torch.bfloat16)
    want, *_ = call(backend, case)
    device = backends.device_of(backend).type
    with torch.autocast(device, torch.bfloat16):
        got, *_ = call(backend, case)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@over_backends
def test_a_few_steps_train(backend: str) -> None:
    """In-batch contrastive training lowers the loss, compiled as not."""
    histories = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)):
        q, d = make(nq=4, nd=4, lq=3, ld=5, dim=8).queries, make(nq=4, nd=4, lq=3, ld=5, dim=8, seed=1).documents
        leaves = [x.to(backends.device_of(backend)).requires_grad_() for x in (q, d)]
        optimizer = torch.optim.SGD(leaves, lr=0.5)
        loss_of = wrap(lambda q, d: pyelastic.maxsim_info_nce(q, d, normalize=True, temperature=0.5, backend=backend))
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss: Tensor = loss_of(*leaves)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        histories.append(losses)
    assert histories[0][-1] < 0.9 * histories[0][0]
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)


def test_every_kernel_is_here() -> None:
    assert set(KERNELS) <= set(op.OPS) and "cpu" in KERNELS
