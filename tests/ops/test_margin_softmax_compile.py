"""torch.compile without graph breaks, and opcheck on the raw ops."""

from typing import Any

import backends
import pytest
import torch
from margin_softmax_cases import BACKENDS, VARIANTS, call, make, over_backends
from torch import Tensor

import pyelastic
from pyelastic import margins as M
from pyelastic.ops import margin_softmax as op

KERNELS = [b for b in BACKENDS if b in op._OPS]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED: dict[str, tuple[Any, dict[str, Any]]] = {
    "ArcFace": (M.ArcFace(), {}),
    "MagFace": (M.MagFace(l_a=4, u_a=9), {"label_smoothing": 0.1}),
    "Curricular": (M.CurricularFace(t=0.2), {"reduction": "sum"}),
    "Elastic": (M.ElasticArcFace(sigma=0.05, plus="rank"), {"seed": 3}),
    "sampled": (M.CosFace(), {"classes": torch.arange(37), "subcenters": 2}),
    "aux": (M.ArcFace(), {"return_aux": True, "ignore_index": -1}),
}


@over_backends
@pytest.mark.parametrize("name", COMPILED)
def test_fullgraph(backend: str, name: str) -> None:
    """Tracing through dispatch, op and autograd; aot_eager runs the fake kernels, no compiler."""
    margin, options = COMPILED[name]
    case = make(subcenters=options.get("subcenters", 1))
    if "ignore_index" in options:
        case.labels[3] = -1

    def step(e: Tensor, w: Tensor, y: Tensor) -> Any:
        return pyelastic.margin_softmax(e, w, y, margin=margin, backend=backend, **options)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    want, e, w = call(backend, case, margin, **options)
    e2, w2 = e.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    got = compiled(e2, w2, case.labels.to(e.device))
    wanted, gotten = (out[0] if isinstance(out, tuple) else out for out in (want, got))
    wanted.backward()
    gotten.backward()
    near = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(gotten, wanted, **near)
    torch.testing.assert_close(e2.grad, e.grad, **near)
    torch.testing.assert_close(w2.grad, w.grad, **near)
    if options.get("return_aux"):
        for a, b in zip(got[1], want[1], strict=True):
            torch.testing.assert_close(a, b, **near)


@over_backends
def test_one_graph_serves_several_batch_sizes(backend: str) -> None:
    """dynamic=True: the second size must be right too, not only the traced one."""
    compiled = torch.compile(
        lambda e, w, y: pyelastic.margin_softmax(e, w, y, backend=backend),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for batch in (13, 7, 20):
        case = make(batch)
        want, e, _ = call(backend, case, None)
        got = compiled(e.detach(), case.weight.to(e.device), case.labels.to(e.device))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def raw_arguments(backend: str, **changes: Any) -> dict[str, Any]:
    """What the launcher passes to the forward op."""
    case = make(5, 7, 3, dtype=changes.pop("dtype", torch.float32))
    labels = case.labels.clone()
    labels[2] = -1
    return {
        "embeddings": case.embeddings,
        "weight": case.weight,
        "labels": labels,
        "classes": None,
        "threshold": None,
        "hard_map": None,
        "scale": 64.0,
        "subcenters": 1,
        "stats": 0,
        **changes,
    }


RAW: dict[str, dict[str, Any]] = {
    "plain": {},
    "every statistic": {"stats": 7},
    "hard negatives": {
        "threshold": torch.linspace(-0.2, 0.4, 5),
        "hard_map": torch.tensor([0.2, 1.2, 0.0]),
    },
    "float64": {"dtype": torch.float64, "stats": 1},
    "bfloat16": {"dtype": torch.bfloat16},
    "sampled": {"classes": torch.arange(7), "stats": 3},
    "empty": {"embeddings": torch.ones(0, 3), "labels": torch.ones(0).long()},
    "strided": {"embeddings": torch.ones(3, 5).mT, "weight": torch.randn(7, 6)[:, ::2]},
}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", RAW)
def test_opcheck(backend: str, name: str) -> None:
    """Schema, fake kernel and AOT dispatch of both raw ops."""
    forward, backward = op._OPS[backend]
    arguments = raw_arguments(backend, **RAW[name])
    backends.skip_unsupported(op.OP, backend, arguments["embeddings"].dtype)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(forward, tuple(arguments.values()), test_utils=tests)
    theta, lse_neg, *_, best = forward(*arguments.values())
    stats = arguments.pop("stats")
    grad_sum = torch.ones_like(theta) if stats & op.SUM_COS else None
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            backward,
            (*arguments.values(), theta, lse_neg, best, 0.3 * torch.ones_like(theta),
             torch.ones_like(theta), grad_sum, *need),
            test_utils=tests,
        )  # fmt: skip


@over_backends
def test_module_trains_under_compile(backend: str) -> None:
    """A few optimiser steps compiled and not: the same losses."""
    case = make(32, 10, 8)
    histories = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)):
        e = case.embeddings.clone().requires_grad_()
        w = case.weight.clone().requires_grad_()
        optimizer = torch.optim.SGD([e, w], lr=0.5)
        step = wrap(
            lambda e, w: pyelastic.margin_softmax(
                e, w, case.labels, margin=VARIANTS["CosFace"], scale=16.0, backend=backend
            )
        )
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = step(e, w)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        histories.append(losses)
    assert histories[0][-1] < histories[0][0]
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)
