"""What the optimizer keeps: checkpoints, storage of moments and weights, projectors, and the choice of parameters."""

from __future__ import annotations

import copy
import importlib.util
import io
import types
from typing import Any

import pytest
import torch
from fira_models import fresh, gradients, groups, parameters, regression, state_of, train
from torch import nn

from pyelastic.optim import Apollo, Fira, captured_energy, divide_params, projectors, to_official_state_dict

KINDS: list[dict[str, Any]] = [
    {}, {"projector": "svd"}, {"projector": "random"}, {"projector": "randomized", "moment_transfer": "rotate"},
    {"state_dtype": "8bit"}, {"state_dtype": "bfloat16"}, {"stagger": True}, {"mode": "paper"},
]  # fmt: skip


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_resume_is_bit_exact(options: dict[str, Any], dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16:
        options = {**options, "weight_rounding": "stochastic"}
    params, optimizer = fresh(dtype=dtype, **options)
    train(optimizer, params, range(8))
    saved, weights = through_a_file(optimizer.state_dict()), [p.detach().clone() for p in params]
    train(optimizer, params, range(8, 20))
    others, other = fresh(dtype=dtype, **options)
    with torch.no_grad():
        for p, w in zip(others, weights, strict=True):
            p.copy_(w)
    other.load_state_dict(saved)
    train(other, others, range(8, 20))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
    mine, theirs = state_of(optimizer), state_of(other)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key


def test_a_copied_optimizer_goes_on_alike() -> None:
    params, optimizer = fresh(stagger=True, seed=3, max_grad_norm=1.0)
    train(optimizer, params, range(6))
    other = copy.deepcopy(optimizer)
    others = [p for group in other.param_groups for p in group["params"]]
    train(optimizer, params, range(6, 12))
    train(other, others, range(6, 12))
    assert all(torch.equal(p, q) and p is not q for p, q in zip(params, others, strict=True))


def test_loading_keeps_the_dtypes_of_state() -> None:
    """Optimizer.load_state_dict casts whatever it finds to the parameter's dtype."""
    params, optimizer = fresh(dtype=torch.bfloat16, state_dtype="8bit", weight_rounding="compensated")
    train(optimizer, params, range(3))
    before = state_of(optimizer)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    after = state_of(optimizer)
    assert {k: v.dtype for k, v in before.items()} == {k: v.dtype for k, v in after.items()}
    assert before[(0, "exp_avg")].dtype == torch.int8 and before[(0, "exp_avg_sq")].dtype == torch.uint8
    assert before[(0, "scaling_grad")].dtype == torch.float32 and before[(0, "remainder")].dtype == torch.bfloat16


def test_a_seeded_basis_is_not_stored() -> None:
    params, optimizer = fresh(projector="random")
    train(optimizer, params, range(3))
    saved = optimizer.state_dict()["state"][0]
    assert "projector" not in saved and "projector" in optimizer.state[params[0]]


def test_mismatched_checkpoints_are_refused() -> None:
    params, optimizer = fresh()
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    wider = [nn.Parameter(torch.randn(24, 41)), *parameters()[1:]]
    with pytest.raises(ValueError, match=r"moments \[4, 40\], which do not belong to a matrix \[24, 41\]"):
        Fira(groups(wider)).load_state_dict(saved)
    longer = [*parameters()[:-1], nn.Parameter(torch.randn(10))]
    with pytest.raises(ValueError, match=r"parameter 3 is \[9\], the optimizer's \[10\]"):
        Fira(groups(longer)).load_state_dict(saved)
    with pytest.raises(ValueError, match="has parameter 0 projected, the optimizer has it dense"):
        Fira([{"params": parameters()[:-1]}, {"params": parameters()[-1:]}]).load_state_dict(saved)
    with pytest.raises(ValueError):
        Fira(parameters()).load_state_dict(saved)  # torch's own: other groups


class OfficialProjector:
    """The attributes of fira.gradient_projection.GradientProjector, for where the package is not installed."""

    def __init__(self, rank: int, verbose: bool = False, update_proj_gap: int = 200, alpha: float = 1.0,
                 proj_type: str = "std") -> None:  # fmt: skip
        self.rank, self.verbose, self.update_proj_gap = rank, verbose, update_proj_gap
        self.alpha, self.proj_type, self.ortho_matrix = alpha, proj_type, None


def test_official_checkpoint_there_and_back() -> None:
    params, optimizer = fresh(projector="svd")
    train(optimizer, params, range(7))
    official = to_official_state_dict(optimizer, OfficialProjector)
    entry = official["state"][0]
    assert entry["step"] == 7 and isinstance(entry["projector"], OfficialProjector)
    assert entry["projector"].ortho_matrix.shape == (24, 4) and entry["scaling_grad"].ndim == 0
    others, other = fresh(projector="svd")
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    other.load_state_dict(official)
    train(optimizer, params, range(7, 14))
    train(other, others, range(7, 14))
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    _, galore = fresh(mode="galore")
    with pytest.raises(ValueError, match="only mode 'official'"):
        to_official_state_dict(galore, OfficialProjector)


@pytest.mark.skipif(importlib.util.find_spec("fira") is None, reason="needs the published package: pip install fira")
def test_checkpoints_of_the_published_package() -> None:
    from fira import FiraAdamW

    ours, theirs = parameters(), parameters()
    theirs_groups = groups(theirs)
    b = FiraAdamW(theirs_groups, lr=0.01, weight_decay=0.1, no_deprecation_warning=True)
    train(b, theirs, range(7))
    a = Fira(groups(ours), lr=0.01, weight_decay=0.1, projector="svd")
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    a.load_state_dict(b.state_dict())
    train(a, ours, range(7, 13))
    train(b, theirs, range(7, 13))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    b.load_state_dict(to_official_state_dict(a))
    train(a, ours, range(13, 20))
    train(b, theirs, range(13, 20))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# --- storage ------------------------------------------------------------------------------------------------------


def test_state_is_as_small_as_said() -> None:
    """d r + 2 L r and a few numbers; Adam's is 2 m n."""
    sizes = {}
    for state_dtype in ("float32", "bfloat16", "8bit"):
        w = nn.Parameter(torch.randn(256, 512))
        optimizer = Fira([{"params": [w], "rank": 32}], state_dtype=state_dtype)
        w.grad = torch.randn_like(w)
        optimizer.step()
        sizes[state_dtype] = sum(v.nbytes for v in optimizer.state[w].values() if isinstance(v, torch.Tensor))
    basis, gram, small = 256 * 32 * 4, 32 * 32 * 4, 64
    assert sizes["float32"] <= basis + gram + 2 * 512 * 32 * 4 + small
    assert sizes["bfloat16"] <= basis + gram + 2 * 512 * 32 * 2 + small
    assert sizes["8bit"] <= basis + gram + 2 * 512 * 32 + 2 * 512 * 4 + small


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
def test_small_moments_train_as_well(backend: str, state_dtype: str) -> None:
    start = regression(torch.float32, 20, 0.0, backend=backend)
    full = regression(torch.float32, 300, 0.05, backend=backend)
    small = regression(torch.float32, 300, 0.05, backend=backend, state_dtype=state_dtype)
    assert full < 0.02 * start and small < 2 * full + 1e-3 * start, (start, full, small)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_bfloat16_weights_need_stochastic_or_compensated_rounding(backend: str) -> None:
    """Steps below half a unit in the last place vanish when rounded to nearest; not so with either option."""
    loss = {
        rounding: regression(torch.bfloat16, 300, 0.05, backend=backend, weight_rounding=rounding)
        for rounding in ("nearest", "stochastic", "compensated")
    }
    exact = regression(torch.float32, 300, 0.05, backend=backend)
    assert loss["compensated"] < 1.1 * exact and loss["stochastic"] < 1.3 * exact, (exact, loss)
    assert loss["nearest"] > 10 * max(loss["compensated"], loss["stochastic"]), (exact, loss)


# --- projectors ---------------------------------------------------------------------------------------------------


def decaying(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, min(rows, columns), generator=generator))[0]
    v = torch.linalg.qr(torch.randn(columns, min(rows, columns), generator=generator))[0]
    return (u * torch.arange(1, min(rows, columns) + 1).float().pow(-0.7)) @ v.T


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", [*projectors.PROJECTORS])
def test_projectors_are_orthonormal_and_capture(name: str, left: bool) -> None:
    g = decaying(40, 90) if left else decaying(90, 40)
    best = captured_energy(g, projectors.svd(g, None, 8, left, 0), left)
    exact = torch.linalg.svdvals(g).square()
    assert best == pytest.approx(float(exact[:8].sum() / exact.sum()), rel=1e-5)
    p = projectors.refresh(name, g, None, 8, left, 0)
    assert p is not None and p.shape == (40, 8)
    torch.testing.assert_close(p.T @ p, torch.eye(8), atol=1e-5, rtol=0)
    energy = captured_energy(g, p, left)
    assert energy < best * 1.0001
    least = {"svd": 0.9999, "eigh": 0.9999, "randomized": 0.97, "subspace": 0.99, "random": 0.02}[name]
    assert energy > least * best, (energy, best)


def test_subspace_is_warm_and_keeps_its_signs() -> None:
    """One iteration from the basis of a slightly different gradient: an SVD's energy, and a momentum that stays put."""
    g = decaying(200, 120)
    noise = torch.randn(200, 120, generator=torch.Generator().manual_seed(1))
    moved = g + 0.1 * noise * g.norm() / noise.norm()
    p = projectors.svd(g, None, 16, False, 0)
    warm = projectors.refresh("subspace", moved, p, 16, False, 0)
    assert warm is not None
    best = captured_energy(moved, projectors.svd(moved, None, 16, False, 0), False)
    assert captured_energy(moved, warm, False) > 0.995 * best
    assert float((p * warm).sum(0).min()) > 0.9
    same = projectors.refresh("subspace", g, warm, 16, False, 0)
    assert same is not None and float((same * warm).sum(0).min()) > 0.9


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("name", ["svd", "eigh", "randomized", "subspace"])
def test_projectors_at_extreme_scales_and_rank_deficiency(name: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(30, 2, generator=generator) @ torch.randn(2, 20, generator=generator) * scale
    previous = projectors.random(g, None, 5, False, 0) if name == "subspace" else None
    p = projectors.refresh(name, g, previous, 5, False, 0)
    assert p is not None
    torch.testing.assert_close(p.T @ p, torch.eye(5), atol=1e-4, rtol=0)
    assert captured_energy(g / scale, p, False) > 0.999


def test_a_failing_svd_gives_way_to_eigh(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*a: Any, **k: Any) -> Any:
        raise torch.linalg.LinAlgError("linalg.svd: did not converge")

    monkeypatch.setattr(torch.linalg, "svd", broken)
    g = decaying(30, 20)
    with pytest.warns(UserWarning, match="projector 'svd' failed"):
        p = projectors.refresh("svd", g, None, 4, False, 0)
    assert p is not None and captured_energy(g, p, False) > 0.5


def test_moment_transfer() -> None:
    """At a refresh with an unrelated basis: kept as they are, rotated, or zero."""
    moments = {}
    for transfer in ("keep", "rotate", "reset"):
        bases = [projectors.random(torch.zeros(12, 20), None, 4, True, seed) for seed in (1, 2)]
        w = nn.Parameter(torch.randn(12, 20, generator=torch.Generator().manual_seed(0)))
        optimizer = Fira(
            [{"params": [w], "rank": 4, "update_proj_gap": 1}], moment_transfer=transfer,
            projector=lambda *a, bases=bases: bases.pop(0), betas=(0.0, 0.0),
        )  # fmt: skip
        w.grad = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        old = optimizer.state[w]["exp_avg"].clone(), optimizer.state[w]["projector"].clone()
        optimizer.param_groups[0]["betas"] = (1 - 1e-12, 1 - 1e-12)  # the second step changes no moment
        optimizer.step()
        moments[transfer] = optimizer.state[w]["exp_avg"]
        turn = optimizer.state[w]["projector"].T @ old[1]
        want = {"keep": old[0], "rotate": turn @ old[0], "reset": torch.zeros_like(old[0])}[transfer]
        torch.testing.assert_close(moments[transfer], want, atol=1e-6, rtol=1e-5)


# --- which parameters ---------------------------------------------------------------------------------------------


def model() -> nn.Module:
    net = nn.Module()
    net.embedding = nn.Embedding(20, 16)
    net.attention = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
    net.conv = nn.Conv2d(3, 8, 3)
    net.head = nn.Linear(16, 20, bias=False)
    net.head.weight = net.embedding.weight
    return net


def test_divide_params() -> None:
    net = model()
    found, coverage = divide_params(net, ["attention"], rank=4, return_coverage=True)
    assert [p.shape for p in found[0]["params"]] == [(16, 16), (16, 16)] and found[0]["rank"] == 4
    assert coverage.projected == ("attention.0.weight", "attention.2.weight")
    assert coverage.projected_elements == 512 and "2 parameters projected" in str(coverage)
    every = [p for g in found for p in g["params"]]
    assert len(every) == len({id(p) for p in every}) == len(list(net.parameters()))  # tied weights once
    default = divide_params(net, rank=4)
    assert {tuple(p.shape) for p in default[0]["params"]} == {(16, 16), (8, 3, 3, 3), (20, 16)}
    named = divide_params(net, lambda name, module: isinstance(module, nn.Embedding), rank=4)
    assert [p.shape for p in named[0]["params"]] == [(20, 16)]
    with pytest.raises(ValueError, match=r"target_modules \['Linear'\] matches no weight .* attention\.0"):
        divide_params(net, ["Linear"])


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_whole_model_with_convolutions_and_tied_weights(backend: str, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    net = model()
    net.conv.to(memory_format=layout)
    optimizer = Fira(divide_params(net, rank=4), lr=0.01, backend=backend)
    images, ids = torch.randn(4, 3, 8, 8).to(memory_format=layout), torch.randint(0, 20, (32,))
    losses = []
    for _ in range(30):
        logits = net.head(net.attention(net.embedding(ids)))
        loss = nn.functional.cross_entropy(logits, ids) + net.conv(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    # A convolution's weight is the matrix [out, rest], with its gradient in the same order.
    weight, plain = net.conv.weight, nn.Parameter(torch.zeros(8, 27))
    order = weight.permute(0, 2, 3, 1) if layout == torch.channels_last else weight
    plain.data.copy_(order.detach().reshape(8, 27))
    a = Fira([{"params": [weight], "rank": 4}], lr=0.01, backend=backend, projector="svd")
    b = Fira([{"params": [plain], "rank": 4}], lr=0.01, backend=backend, projector="svd")
    weight.grad = torch.randn(8, 3, 3, 3).to(memory_format=layout)
    grad = weight.grad.permute(0, 2, 3, 1) if layout == torch.channels_last else weight.grad
    plain.grad = grad.reshape(8, 27).clone()
    a.step()
    b.step()
    order = weight.permute(0, 2, 3, 1) if layout == torch.channels_last else weight
    torch.testing.assert_close(order.detach().reshape(8, 27), plain.detach())


def test_defaults_of_the_thin_forms() -> None:
    w = nn.Parameter(torch.randn(8, 6))
    optimizer = Apollo([{"params": [w], "rank": 2}])
    group = optimizer.param_groups[0]
    assert (group["mode"], group["alpha"], group["projector"], group["per_matrix"]) == ("apollo", 1.0, "random", False)
    assert isinstance(projectors.svd, types.FunctionType)
    with pytest.raises(ValueError, match="scale_type is 'row'"):
        Apollo([{"params": [w], "rank": 2, "scale_type": "row"}])
    gradients([w], 0)
    optimizer.step()
