"""Tables of addresses of fira's Triton steps: what is copied to the device, how many are kept, what a graph may use."""

from __future__ import annotations

from typing import Any

import backends
import pytest
import torch
from fira_cases import Problem, problem, run

import pyelastic
from pyelastic.ops import _device_tables as tables

interpreted = pytest.mark.skipif("triton" not in backends.implemented("fira"), reason="Triton is missing")


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the tables that were copied, from an empty cache on."""
    seen: list[int] = []
    original = tables.upload

    def counted(numbers: Any, device: torch.device) -> torch.Tensor:
        seen.append(len(numbers))
        return original(numbers, device)

    monkeypatch.setattr(tables, "upload", counted)
    monkeypatch.setattr(tables, "_kept", type(tables._kept)())
    return seen


def group(**options: Any) -> list[Problem]:
    specs = [(40, 24, 6, False), (17, 70, 3, True), (48, 80, 16, True), (96, 32, 16, False), (33, 20, 5, False)]
    made = [problem(m, n, r, left, seed=i, **options) for i, (m, n, r, left) in enumerate(specs)]
    return [p.clone(device=backends.device_of("triton")) for p in made]


def same(a: list[Problem], b: list[Problem]) -> bool:
    fields = ("exp_avg", "exp_avg_sq", "limiter_norm", "step")
    return all(
        torch.equal(x.w, y.w) and all(torch.equal(getattr(x.state, f), getattr(y.state, f)) for f in fields)
        for x, y in zip(a, b, strict=True)
    )


@interpreted
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_second_step_copies_nothing(copies: list[int], stochastic: bool) -> None:
    """Whatever else changes: rates, betas, alpha, gradients' values, seeds that are not used. The same bits."""
    options: dict[str, Any] = {"stochastic": True, "dtype": torch.bfloat16} if stochastic else {}
    kept, fresh = group(**options), group(**options)
    device = kept[0].w.device
    for i in range(4):
        change = {
            "lr": torch.tensor(0.5 / (i + 1), device=device), "betas": (0.9 - 0.1 * i, 0.999), "alpha": 0.2 + 0.1 * i,
            "weight_decay": 0.1 * i, "seeds": [3] * 5 if stochastic else [i] * 5,
        }  # fmt: skip
        for p, q in zip(kept, fresh, strict=True):
            p.g.mul_(1.25)
            q.g = q.g * 1.25
        run("triton", *kept, **change)
        # Two sides, aligned or not: four groups, copied by the first step alone.
        assert len(copies) == 4, i
        before = dict(tables._kept)
        tables._kept.clear()
        run("triton", *fresh, **change)
        assert len(copies) == 8
        tables._kept.clear()
        tables._kept.update(before)
        del copies[4:]
        assert same(kept, fresh), i


@interpreted
def test_other_addresses_sizes_or_seeds_are_another_table(copies: list[int]) -> None:
    given = problem(40, 24, 6, False, torch.bfloat16, stochastic=True).clone(device=backends.device_of("triton"))
    for count, change in enumerate(("", "gradient", "seed", "basis", "stride"), 1):
        old = given.g, given.state.projector, given.w  # held: their addresses are not given away again
        if change == "gradient":
            given.g = given.g.clone()
        if change == "basis":
            given.state = given.state._replace(projector=given.state.projector.clone())
        if change == "stride":
            given.w = torch.cat([given.w, given.w[:, :3]], 1)[:, :24]
        seeds = [int(count > 2)]
        for _ in range(2):
            run("triton", given, seeds=seeds)
            assert len(copies) == count, change
        assert old[0] is not None


@interpreted
def test_a_capture_uses_only_what_was_copied_before(copies: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    given = group()
    capture = False
    monkeypatch.setattr(tables, "capturing", lambda device: capture)
    before = [p.clone() for p in given]
    capture = True
    with pytest.raises(pyelastic.BackendError, match=r"fira: backend 'triton' cannot run .* Run a warm-up step"):
        run("triton", *given)
    assert same(given, before) and copies == []
    capture = False
    run("triton", *given)
    capture = True
    run("triton", *given)
    assert len(copies) == 4
    given[0].g = given[0].g.clone()
    with pytest.raises(pyelastic.BackendError, match="gradients at the same addresses"):
        run("triton", *given)


@interpreted
def test_few_tables_are_kept_and_those_of_graphs_always(copies: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    capture = False
    monkeypatch.setattr(tables, "capturing", lambda device: capture)
    monkeypatch.setattr(tables, "LIMIT", 3)
    many = [problem(6, 4, 2, False, seed=i).clone(device=backends.device_of("triton")) for i in range(7)]
    run("triton", many[0])
    capture = True
    run("triton", many[0])
    capture = False
    for p in many[1:]:
        run("triton", p)
    assert len(copies) == 7 and len(tables._kept) == 4
    run("triton", many[0])
    run("triton", many[4])  # the oldest of the three
    assert len(copies) == 7
    run("triton", many[1])
    assert len(copies) == 8
    run("triton", many[4])  # was used after the other two
    run("triton", many[6])
    assert len(copies) == 8


@pytest.mark.skipif(not backends.GPU, reason="CUDA graphs")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_replays_of_a_graph_are_steps(backend: str) -> None:
    plain, graphed = group(), group()
    lr = torch.tensor(0.5, dtype=torch.float64, device="cuda")
    for given in (plain, graphed):
        run(backend, *given, lr=lr)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(backend, *graphed, lr=lr)
    for i in range(3):
        lr.fill_(0.25 / (i + 1))
        for p, q in zip(plain, graphed, strict=True):
            p.g.mul_(1.5)
            q.g.mul_(1.5)
        run(backend, *plain, lr=lr)
        graph.replay()
        assert same(plain, graphed), i
