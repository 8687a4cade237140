"""pyelastic.optim.Fira: parity with the published package, and what users of torch.optim expect.

What each parametrization covers: `backend` the two that run a step on CPU tensors; `options` the forms and storage of
state; the golden files cover decay, both alphas, wide, tall, square and 1-D parameters.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fira_models import fresh, gradients, groups, parameters, state_of, train
from torch import nn

from pyelastic.optim import Apollo, Fira, GaLore, projectors

DATA = Path(__file__).parent.parent / "data"
# The float32 rounding of the published package, as a share of the way a weight has moved; measured 8.5e-6 at most.
PARITY = 5e-5
over_backends = pytest.mark.parametrize("backend", ["eager", "cpu"])


def displacement(got: torch.Tensor, want: torch.Tensor, start: torch.Tensor) -> float:
    return float((got - want).norm() / (want - start).norm())


def svd_bound(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """How far the first singular vectors of two float32 SVDs may be apart, which is another LAPACK's choice.

    A backward error of c eps sigma_1 turns vector k by at most c eps sigma_1 / gap_k (Wedin). c is 12 for each:
    the golden data's are off by 8.2 at most from the float64 vectors, MKL's on a Xeon by 5.5.
    """
    sigma = torch.linalg.svdvals(matrix.double())
    gaps = (sigma[:, None] - sigma).abs().fill_diagonal_(float("inf"))
    return 2 * 12 * 2.0**-24 * sigma[0] / gaps.min(1).values[:rank]


@over_backends
@pytest.mark.parametrize("name", ["fira_alpha0.25_wd0.1", "fira_alpha1.0_wd0.0"])
def test_golden_with_own_svd(backend: str, name: str) -> None:
    with np.load(DATA / f"{name}.npz") as file:
        data = {key: torch.from_numpy(file[key]) for key in file.files}
    params = [nn.Parameter(data[f"{k}_init"].clone()) for k in ("w0", "w1", "w2", "w3", "b")]
    keys = {"rank": int(data["rank"]), "update_proj_gap": int(data["update_proj_gap"]), "alpha": float(data["alpha"])}
    optimizer = Fira(
        groups(params, **keys), lr=float(data["lr"]), weight_decay=float(data["weight_decay"]), projector="svd",
        betas=(float(data["beta1"]), float(data["beta2"])), eps=float(data["eps"]), backend=backend,
    )  # fmt: skip
    for t in range(int(data["steps"])):
        for p, key in zip(params, ("w0", "w1", "w2", "w3", "b"), strict=True):
            p.grad = data[f"{key}_grad{t}"]
        optimizer.step()
        for p, key in zip(params, ("w0", "w1", "w2", "w3", "b"), strict=True):
            assert displacement(p.detach(), data[f"{key}_after{t}"], data[f"{key}_init"]) < PARITY, (key, t)
        for i in range(4):
            stored, want = optimizer.state[params[i]]["projector"], data[f"w{i}_projector{t // 5 * 5}"]
            apart = (stored.double() - want.double()).norm(dim=stored.shape.index(max(stored.shape)))
            assert (apart <= svd_bound(data[f"w{i}_grad{t // 5 * 5}"], len(apart))).all()


def official_groups(params: list[nn.Parameter], alpha: float, proj_type: str) -> list[dict[str, Any]]:
    return groups(params, alpha=alpha, proj_type=proj_type, update_proj_gap=20)


@over_backends
@pytest.mark.skipif(importlib.util.find_spec("fira") is None, reason="needs the published package: pip install fira")
@pytest.mark.parametrize("alpha", [0.0625, 0.25, 1.0, 2.0])
@pytest.mark.parametrize(("proj_type", "decay"), [("std", 0.1), ("reverse_std", 0.0), ("left", 0.1), ("right", 0.0)])
def test_60_steps_of_the_published_package(backend: str, alpha: float, proj_type: str, decay: float) -> None:
    from fira import FiraAdamW

    start, ours, theirs = parameters(), parameters(), parameters()
    a = Fira(official_groups(ours, alpha, proj_type), lr=0.01, weight_decay=decay, projector="svd", backend=backend)
    b = FiraAdamW(
        official_groups(theirs, alpha, proj_type), lr=0.01, weight_decay=decay, no_deprecation_warning=True
    )
    for t in range(60):
        gradients(ours, t)
        gradients(theirs, t)
        a.step()
        b.step()
    for p, q, s in zip(ours, theirs, start, strict=True):
        assert displacement(p.detach(), q.detach(), s.detach()) < PARITY


def test_refresh_calls() -> None:
    """At the calls 1, gap + 1, 2 gap + 1, ... of the published package; staggered, spread over the gap."""
    calls: list[tuple[int, int]] = []
    now = 0

    def projector(g: torch.Tensor, previous: Any, rank: int, left: bool) -> torch.Tensor:
        calls.append((now, g.shape[0]))
        return projectors.svd(g, previous, rank, left, 0)

    params, optimizer = fresh(projector=projector)
    for t in range(12):
        now = t
        train(optimizer, params, range(t, t + 1))
    assert [t for t, rows in calls if rows == 24] == [0, 5, 10]
    calls.clear()
    params, optimizer = fresh(projector=projector, stagger=True)
    for t in range(16):
        now = t
        train(optimizer, params, range(t, t + 1))
    per_matrix = {rows: [t for t, r in calls if r == rows] for rows in (24, 40, 16)}
    assert all(times[0] == 0 and np.diff(times[1:]).tolist() == [5] * (len(times) - 2) for times in per_matrix.values())
    assert len({times[1] for times in per_matrix.values()}) == 3


def test_matrices_that_come_later() -> None:
    """A weight that was empty at the steps before, a new group, and one weight in the place of another."""
    first, late = nn.Parameter(torch.empty(0, 8)), nn.Parameter(torch.randn(16, 8))
    added, swapped = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(10, 8))
    optimizer = Fira([{"params": [first, late], "rank": 4}], lr=0.1, weight_rounding="stochastic")

    def moved(*params: nn.Parameter) -> bool:
        before = [p.detach().clone() for p in params]
        for p in (first, late, added, swapped):
            p.grad = torch.randn_like(p)
        optimizer.step()
        return all(not torch.equal(p, old) for p, old in zip(params, before, strict=True))

    assert moved(late)
    first.data = torch.randn(12, 8)
    assert moved(first, late)
    optimizer.add_param_group({"params": [added], "rank": 2})
    assert moved(first, late, added)
    optimizer.param_groups[0]["params"][0] = swapped
    assert moved(swapped, late, added)


def test_adaptive_gap_waits_longer_while_the_subspace_stands() -> None:
    count = 0

    def projector(g: torch.Tensor, previous: Any, rank: int, left: bool) -> torch.Tensor:
        nonlocal count
        count += 1
        return projectors.eigh(g, previous, rank, left, 0)

    w = nn.Parameter(torch.zeros(20, 12))
    optimizer = Fira([{"params": [w], "rank": 3, "update_proj_gap": 2}], projector=projector, adaptive_gap=True)
    low = torch.randn(20, 3) @ torch.randn(3, 12)
    for _ in range(32):
        w.grad = low + 1e-4 * torch.randn(20, 12)
        optimizer.step()
    assert count <= 6  # 16 without


def test_first_step_is_not_limited_and_growth_is_gamma() -> None:
    params, optimizer = fresh(group={"update_proj_gap": 1000})
    train(optimizer, params, range(1))
    first = float(optimizer.state[params[0]]["scaling_grad"])
    gradients(params, 0, scale=50.0)
    optimizer.step()
    assert float(optimizer.state[params[0]]["scaling_grad"]) == pytest.approx(1.01 * first, rel=1e-5)


@over_backends
def test_bfloat16_norm_grows_by_exactly_gamma(backend: str) -> None:
    """The published package keeps the norm in bfloat16, where it grows by 1.0000 to 1.0192 and may freeze."""
    params, optimizer = fresh(dtype=torch.bfloat16, backend=backend, group={"update_proj_gap": 1000})
    train(optimizer, params, range(1))
    before = float(optimizer.state[params[0]]["scaling_grad"])
    for t in range(1, 30):
        gradients(params, t, scale=float(1e3 * 1.5**t))
        optimizer.step()
        now = float(optimizer.state[params[0]]["scaling_grad"])
        assert now / before == pytest.approx(1.01, rel=1e-6)
        before = now


@over_backends
def test_a_zero_gradient_does_not_stop_the_residual(backend: str) -> None:
    norms = {}
    for collapse in (False, True):
        params, optimizer = fresh(backend=backend, collapse=collapse, group={"update_proj_gap": 1000})
        train(optimizer, params, range(3))
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        train(optimizer, params, range(3, 6))
        norms[collapse] = float(optimizer.state[params[0]]["scaling_grad"])
    assert norms[False] > 1.0 and norms[True] < 1e-6  # the published package's, behind the flag


@over_backends
def test_zero_gradient_at_the_first_step(backend: str) -> None:
    """A basis is needed though there is nothing to follow; the real one comes with the first gradient."""
    params, optimizer = fresh(backend=backend, projector="svd")
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old * (1 - 0.01 * 0.1))
    gradients(params, 1)
    optimizer.step()
    want = projectors.svd(params[0].grad, None, 4, True, 0)  # type: ignore[arg-type]
    assert torch.allclose(optimizer.state[params[0]]["projector"], want, atol=1e-6)


@over_backends
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("projector", [*projectors.PROJECTORS])
def test_gradients_that_are_not_finite_never_raise(backend: str, bad: float, projector: str) -> None:
    """At a refresh the basis is kept; the weights show what came, as with torch's optimizers."""
    params, optimizer = fresh(backend=backend, projector=projector)
    train(optimizer, params, range(5))
    basis = optimizer.state[params[0]]["projector"].clone()
    gradients(params, 5)
    params[0].grad[3, 4] = bad  # type: ignore[index]
    optimizer.step()
    if projector != "random":
        assert torch.equal(optimizer.state[params[0]]["projector"], basis)
    assert not params[0].isfinite().all() and params[1].isfinite().all()


def test_closure_may_call_backward() -> None:
    params, optimizer = fresh()
    seen = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p.square().sum() for p in params), torch.zeros(()))
        loss.backward()
        seen.append(float(loss.detach()))
        return loss

    first = optimizer.step(closure)
    second = optimizer.step(closure)
    assert float(first.detach()) == seen[0] > float(second.detach()) == seen[1]


@over_backends
def test_maximize_is_the_negative_gradient(backend: str) -> None:
    params, optimizer = fresh(backend=backend, maximize=True, projector="eigh")
    others, other = fresh(backend=backend, projector="eigh")
    for t in range(6):
        gradients(params, t)
        gradients(others, t)
        for p in others:
            p.grad.neg_()
        optimizer.step()
        other.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


@over_backends
def test_lr_as_a_tensor_and_under_a_scheduler(backend: str) -> None:
    runs = []
    for tensor in (False, True):
        params, optimizer = fresh(backend=backend)
        if tensor:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(0.01, dtype=torch.float64)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        train(optimizer, params, range(6), lambda t, s=scheduler: s.step() if t else None)
        runs.append(params)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01 * 0.5**2)
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q)


@over_backends
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(backend: str, fused: bool) -> None:
    """The scale is undone inside the step, and a step with an infinite gradient changes no bit."""
    params, optimizer = fresh(backend=backend, fused=fused)
    plain, other = fresh(backend=backend, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(4):
        gradients(plain, t)
        other.step()
        gradients(params, t)
        for p in params:
            p.grad.mul_(1024.0)
        scaler.scale(torch.ones(()))  # makes the scaler's own state
        scaler.step(optimizer)
        scaler.update()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    gradients(params, 4)
    params[1].grad[0, 0] = float("inf")  # type: ignore[index]
    weights, state = [p.detach().clone() for p in params], state_of(optimizer)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    for p, w in zip(params, weights, strict=True):
        assert torch.equal(p, w)
    for key, value in state_of(optimizer).items():
        if key[1] not in ("schedule",):
            assert torch.equal(value, state[key]), key


@over_backends
def test_clipping_is_torch_s(backend: str) -> None:
    params, optimizer = fresh(backend=backend, max_grad_norm=1.0)
    others, other = fresh(backend=backend)
    for t in range(4):
        gradients(params, t)
        gradients(others, t)
        untouched = params[0].grad.clone()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        optimizer.step()
        other.step()
        assert torch.equal(params[0].grad, untouched)  # no pass that writes
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_add_param_group_and_bad_groups() -> None:
    params = parameters()
    optimizer = Fira([{"params": params[:1], "rank": 4}], lr=0.01)
    optimizer.add_param_group({"params": params[1:2], "rank": 2, "proj_type": "right"})
    with pytest.raises(ValueError, match="rank is 0; expected an integer of at least 1"):
        optimizer.add_param_group({"params": params[2:3], "rank": 0})
    with pytest.raises(ValueError, match="'full' fails in the published package too"):
        optimizer.add_param_group({"params": params[2:3], "rank": 2, "proj_type": "full"})
    assert len(optimizer.param_groups) == 2
    gradients(params, 0)
    optimizer.step()
    assert optimizer.state[params[1]]["projector"].shape == (2, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"), ({"betas": (0.9, 1.0)}, "betas are"), ({"eps": -1.0}, "eps is -1.0"),
        ({"mode": "fast"}, "mode is 'fast'; choose from official, paper, galore, apollo"),
        ({"projector": "qr"}, "projector is 'qr'"), ({"state_dtype": "4bit"}, "state_dtype is '4bit'"),
        ({"weight_rounding": "up"}, "weight_rounding is 'up'"), ({"moment_transfer": "drop"}, "moment_transfer is"),
        ({"differentiable": True}, "differentiable=True is not supported"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fira(parameters(), **options)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(10, 8, sparse=True)
    optimizer = Fira([{"params": embedding.parameters(), "rank": 2}])
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        optimizer.step()


def test_update_in_backward() -> None:
    """One optimizer a parameter, stepped from a hook: the limiter is per matrix, so nothing is lost."""
    together, single = parameters(), parameters()
    optimizer = Fira(groups(together), lr=0.01)
    single_groups = groups(single)
    each = {p: Fira([{**g, "params": [p]}], lr=0.01) for g in single_groups for p in g["params"]}
    for p in single:

        def hook(p: Any) -> None:
            each[p].step()
            p.grad = None

        p.register_post_accumulate_grad_hook(hook)
    for t in range(4):
        generator = torch.Generator().manual_seed(t)
        targets = [torch.randn(p.shape, generator=generator) for p in together]
        for params in (together, single):
            sum((p - x).square().sum() for p, x in zip(params, targets, strict=True)).backward()  # type: ignore
        optimizer.step()
        optimizer.zero_grad()
    # Seeds of a cold start depend on a matrix's number, so the subspaces differ by what randomized leaves.
    for p, q in zip(together, single, strict=True):
        torch.testing.assert_close(p, q, rtol=0.05, atol=0.05)


def test_hooks_and_parameters_without_gradients() -> None:
    params, optimizer = fresh()
    order: list[str] = []
    optimizer.register_step_pre_hook(lambda *a: order.append("before"))
    optimizer.register_step_post_hook(lambda *a: order.append("after"))
    gradients(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert order == ["before", "after"] and torch.equal(params[1], before) and params[1] not in optimizer.state
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@over_backends
def test_rank_above_the_dimension_and_small_parameters(backend: str) -> None:
    small = [nn.Parameter(torch.randn(s)) for s in ((6, 3), (7,), (), (0, 5), (1, 1))]
    optimizer = Fira([{"params": small, "rank": 128}], lr=0.01, backend=backend)
    for _ in range(3):
        for p in small:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert optimizer.state[small[0]]["projector"].shape == (3, 3)
    assert optimizer.state[small[1]]["exp_avg"].shape == (7,) and optimizer.state[small[2]]["exp_avg"].shape == ()
    assert small[3] not in optimizer.state and all(p.isfinite().all() for p in small)


@over_backends
def test_hyper_parameters_changed_in_the_run(backend: str) -> None:
    params, optimizer = fresh(backend=backend)
    train(optimizer, params, range(5))
    group = optimizer.param_groups[0]
    group["rank"], group["alpha"] = 7, 0.5
    train(optimizer, params, range(5, 7))
    state = optimizer.state[params[0]]
    assert state["projector"].shape == (24, 7) and state["exp_avg"].shape == (7, 40) and float(state["step"]) == 7
    assert state["exp_avg"].count_nonzero() == 7 * 40  # rotated into the new basis, not lost
    group["proj_type"] = "reverse_std"
    train(optimizer, params, range(7, 11))
    assert optimizer.state[params[0]]["projector"].shape == (7, 40)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("options", [{"mode": "paper"}, {"mode": "galore"}, {"mode": "apollo"}])
def test_kernels_follow_eager_over_many_steps(options: dict[str, Any]) -> None:
    runs = []
    for backend in ("eager", "cpu"):
        params, optimizer = fresh(backend=backend, projector="svd", **options)
        train(optimizer, params, range(20))
        runs.append(params)
    for p, q, start in zip(*runs, parameters(), strict=True):
        assert displacement(q.detach(), p.detach(), start.detach()) < PARITY


def test_galore_and_apollo_are_forms_of_the_same_step() -> None:
    params, gs = parameters(), groups(parameters(), scale=0.5)
    a = GaLore([{**gs[0], "params": params[:-1]}], lr=0.01, projector="svd")
    others = parameters()
    b = Fira([{**groups(others)[0], "alpha": 0.5}], lr=0.01, mode="galore", projector="svd")
    train(a, params, range(4))
    train(b, others, range(4))
    assert all(torch.equal(p, q) for p, q in zip(params[:-1], others[:-1], strict=True))
    # The update of GaLore lies in the subspace: its rank is that of the basis.
    start = parameters()[0].detach()
    assert int(torch.linalg.matrix_rank(params[0].detach() - start, atol=1e-4)) == 4
    w = nn.Parameter(torch.zeros(20, 12))
    apollo = Apollo([{"params": [w], "rank": 1, "scale": 4.0, "scale_type": "tensor"}], lr=0.1)
    w.grad = torch.randn(20, 12)
    apollo.step()
    ratio = w.detach() / w.grad
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))  # a multiple of the gradient
