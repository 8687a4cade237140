"""margin_softmax against the papers' formulas: golden files, every variant, the tolerance proof.

What each parametrization covers: `backend` every implementation the registry has, `variant` every
margin class with every guard and gradient mode, `dtype` the four input types.
"""

from pathlib import Path
from typing import Any

import backends
import numpy as np
import oracle
import pytest
import torch
from margin_softmax_cases import (
    BACKENDS,
    DTYPES,
    OP,
    VARIANTS,
    Case,
    accuracy,
    call,
    compare,
    make,
    over_backends,
    over_variants,
    weighted_upstream,
)
from margin_softmax_reference import reference
from torch import Tensor
from torch.nn import functional as F

from pyelastic import _random
from pyelastic import margins as M

DATA = Path(__file__).parent.parent / "data"
GOLDEN = {
    "ArcFace": lambda d: M.ArcFace(m=d["m"]),
    "CosFace": lambda d: M.CosFace(m=d["m"]),
    "ElasticArcFace": lambda d: M.ElasticArcFace(m=d["m"], sigma=d["sigma"]),
    "ElasticCosFace": lambda d: M.ElasticCosFace(m=d["m"], sigma=d["sigma"]),
    "ElasticArcFacePlus": lambda d: M.ElasticArcFace(m=d["m"], sigma=d["sigma"], plus="official"),
    "ElasticCosFacePlus": lambda d: M.ElasticCosFace(m=d["m"], sigma=d["sigma"], plus="official"),
}


def golden(name: str) -> dict[str, Any]:
    """A file written by the official code, weight turned to our [C, D]; scalars as floats."""
    with np.load(DATA / f"margin_{name}.npz") as file:
        data = {k: torch.from_numpy(file[k]) for k in file.files}
    data["weight"] = data["weight_DC"].T.contiguous()
    data["grad_weight"] = data["grad_weight_DC"].T.contiguous()
    return {k: float(v) if v.ndim == 0 else v for k, v in data.items()}


def run_golden(
    backend: str,
    data: dict[str, Any],
    name: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> tuple[Any, Tensor, Tensor]:
    """The op on a golden file's inputs, with the file's margins in place of its own draw.

    They enter where the random numbers are made and not as margins=, which no plus= re-orders.
    """
    margin = GOLDEN[name](data)
    if margin.spread:
        normal = (data["drawn_margins"] - data["m"]) / data["sigma"]
        monkeypatch.setattr(_random, "normal", lambda seed, rows: normal.to(rows.device))
    case = Case(data["embeddings"].to(dtype), data["weight"].to(dtype), data["labels"])
    return call(backend, case, margin, scale=data["s"], **options)


@over_backends
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_float64(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = golden(name)
    (loss, aux), e, w = run_golden(backend, data, name, torch.float64, monkeypatch, return_aux=True)
    loss.backward()
    near = {"rtol": 0.0, "atol": oracle.GOLDEN}
    torch.testing.assert_close(aux.loss.cpu(), data["loss_per_sample"], **near)
    torch.testing.assert_close(loss.detach().cpu(), data["loss_per_sample"].mean(), **near)
    torch.testing.assert_close(e.grad.cpu(), data["grad_embeddings"], **near)
    torch.testing.assert_close(w.grad.cpu(), data["grad_weight"], **near)


def official_order(cos_target: Tensor, drawn: Tensor) -> Tensor:
    """The official ElasticFace+: sorted margins indexed by the argsort of the cosines."""
    return drawn.sort().values[cos_target.argsort(descending=True)]


def rank_order(cos_target: Tensor, drawn: Tensor) -> Tensor:
    """The paper's ElasticFace+: the r-th closest sample gets the r-th smallest margin."""
    out = torch.empty_like(drawn)
    out[cos_target.argsort(descending=True)] = drawn.sort().values
    return out


@over_backends
@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_by_the_oracle(backend: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    data = golden(name)
    e, w = data["embeddings"].to(dtype), data["weight"].to(dtype)
    drawn = data["drawn_margins"]
    if name.endswith("Plus"):
        cosines = F.normalize(e.double()) @ F.normalize(w.double()).T
        drawn = official_order(cosines.gather(1, data["labels"][:, None])[:, 0], drawn)
    fixed = name in ("ArcFace", "CosFace")
    told = {"scale": data["s"], "margins": None if fixed else drawn, "half": backends.half_operands(backend, dtype)}
    truth = reference(e, w, data["labels"], GOLDEN[name](data), **told)
    grade = accuracy(backend, Case(e, w, data["labels"]), truth)
    loss, e, w = run_golden(backend, data, name, dtype, monkeypatch)
    loss.backward()
    oracle.check(loss, truth.loss, A=truth.A_loss, name="loss", **grade)
    oracle.check(e.grad, truth.grad_e, A=truth.A_e, dtype=dtype, name="dE", **grade)
    oracle.check(w.grad, truth.grad_w, A=truth.A_w, dtype=dtype, name="dW", **grade)


def test_the_reference_reproduces_the_golden_files() -> None:
    """The reference is code too; files it did not write hold it to account."""
    for name, margin in GOLDEN.items():
        data = golden(name)
        drawn = data["drawn_margins"]
        if name.endswith("Plus"):
            cosines = F.normalize(data["embeddings"]) @ F.normalize(data["weight"]).T
            drawn = official_order(cosines.gather(1, data["labels"][:, None])[:, 0], drawn)
        truth = reference(data["embeddings"], data["weight"], data["labels"], margin(data), margins=drawn)
        near = {"rtol": 0.0, "atol": oracle.GOLDEN}
        torch.testing.assert_close(truth.logits, data["logits"], **near)
        torch.testing.assert_close(truth.rows, data["loss_per_sample"], **near)
        torch.testing.assert_close(truth.grad_e, data["grad_embeddings"], **near)
        torch.testing.assert_close(truth.grad_w, data["grad_weight"], **near)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_the_reference_is_cross_entropy(smoothing: float) -> None:
    case = make()
    truth = reference(case.embeddings, case.weight, case.labels, M.ArcFace(), label_smoothing=smoothing)
    torch_loss = F.cross_entropy(truth.logits, case.labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(truth.rows, torch_loss, rtol=1e-13, atol=1e-13)


@over_backends
@over_variants
@pytest.mark.parametrize("dtype", DTYPES)
def test_variant(backend: str, variant: str, dtype: torch.dtype) -> None:
    """Loss and gradients of every margin; elastic ones at given margins (draws: another file)."""
    case = make(dtype=dtype)
    options = {}
    if variant.startswith("Elastic"):
        options["margins"] = torch.linspace(0.1, 0.9, 13, dtype=torch.float64).to(dtype)
    compare(backend, case, VARIANTS[variant], **options)


@over_backends
@over_variants
def test_variant_per_row(backend: str, variant: str) -> None:
    """reduction='none' with a different gradient for every row, at a small scale; rows of 32, which are aligned."""
    case = make(dim=32, seed=1)
    options = {"margins": torch.linspace(0.1, 0.9, 13)} if variant.startswith("Elastic") else {}
    margin = VARIANTS[variant]
    compare(
        backend,
        case,
        margin,
        reduction="none",
        scale=8.0,
        upstream=weighted_upstream(case),
        **options,
    )


@over_backends
@pytest.mark.parametrize("variant", ["ArcFace-none", "CosFace", "Curricular", "MagFace"])
@pytest.mark.parametrize("subcenters", (2, 3))
def test_subcenters(backend: str, variant: str, subcenters: int) -> None:
    compare(backend, make(subcenters=subcenters), VARIANTS[variant], subcenters=subcenters)


@over_backends
@pytest.mark.parametrize("scale", (0.5, 30.0, 64.0, 100.0, 128.0))
def test_scale(backend: str, scale: float) -> None:
    """Beyond about 72 a constant shift overflows float32, and the kernels change their method."""
    compare(backend, make(dim=32), M.ArcFace(), scale=scale)


@over_backends
@pytest.mark.parametrize(
    ("batch", "classes", "dim"),
    [(1, 1, 1), (1, 2, 1), (3, 2, 5), (2, 257, 8), (65, 31, 3), (7, 1025, 17), (130, 64, 64)],
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_shape(backend: str, batch: int, classes: int, dim: int, dtype: torch.dtype) -> None:
    """One, odd, prime and tile +- 1 sizes; a single class has no negatives, so its loss is 0."""
    margin = M.CosFace() if dim == 1 else M.ArcFace()  # in one dimension every |cos| is 1
    compare(backend, make(batch, classes, dim, dtype=dtype), margin)


@over_backends
@pytest.mark.parametrize("plus", ("rank", "official"))
@pytest.mark.parametrize("family", (M.ElasticArcFace, M.ElasticCosFace))
def test_plus_deals_the_margins(backend: str, plus: str, family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(dtype=backends.widest(OP, backend))
    drawn = torch.linspace(0.6, 0.2, 13, dtype=torch.float64)
    drawn = drawn[torch.randperm(13, generator=torch.Generator().manual_seed(3))]
    fixed = reference(case.embeddings, case.weight, case.labels, M.NormFace())
    cos_target = fixed.cosines.gather(1, case.labels[:, None])[:, 0]
    dealt = {"rank": rank_order, "official": official_order}[plus](cos_target, drawn)
    assert not torch.equal(rank_order(cos_target, drawn), official_order(cos_target, drawn))
    truth = reference(case.embeddings, case.weight, case.labels, family(), margins=dealt)
    margin = family(m=0.0, sigma=1.0, plus=plus)  # the draw itself is the margin
    monkeypatch.setattr(_random, "normal", lambda seed, rows: drawn.to(rows.device))
    compare(backend, case, margin, truth=truth)
    (_, aux), *_ = call(backend, case, margin, return_aux=True)
    dtype = aux.margin.dtype
    assert torch.equal(aux.margin.cpu(), dealt.to(dtype))
    # Margins passed in are final, and evaluation deals nothing.
    (_, aux), *_ = call(backend, case, margin, margins=drawn, return_aux=True)
    assert torch.equal(aux.margin.cpu(), drawn.to(dtype))
    (_, aux), *_ = call(backend, case, margin, training=False, return_aux=True)
    assert torch.equal(aux.margin.cpu(), torch.zeros_like(drawn, dtype=dtype))


def test_plus_by_hand() -> None:
    """The example of the research notes: cosines (.1, .9, .5), margins (.4, .5, .6)."""
    cos_target, drawn = torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0.4, 0.5, 0.6])
    assert rank_order(cos_target, drawn).tolist() == pytest.approx([0.6, 0.4, 0.5])
    assert official_order(cos_target, drawn).tolist() == pytest.approx([0.5, 0.6, 0.4])


@over_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["ArcFace-none", "Combined", "Curricular"])
def test_tolerance_proof(backend: str, dtype: torch.dtype, variant: str) -> None:
    """The bound that accepts this backend's result rejects every planted wrong one."""
    case, margin = make(dtype=dtype), VARIANTS[variant]
    # float16 operands move a logit by scale * 2^-11: at 64 that is 3 % of a gradient, more than a mutant.
    half = backends.half_operands(backend, dtype)
    if half and dtype == torch.bfloat16:
        pytest.skip("rounding to bfloat16 on top leaves no room for a 1 % mutant; proved on float32 outputs elsewhere")
    options = {"reduction": "none", "scale": 4.0 if half else 64.0}
    truth = reference(case.embeddings, case.weight, case.labels, margin, half=half, **options)
    loss, e, w = call(backend, case, margin, **options)
    loss.sum().backward()
    dropped = {"softmax term dropped": truth.no_softmax_e, "target dropped": truth.no_target_e}
    grade = accuracy(backend, case, truth)
    killed = oracle.prove(loss.detach(), truth.loss, A=truth.A_loss, name="loss", **grade)
    killed += oracle.prove(e.grad, truth.grad_e, A=truth.A_e, name="dE", also=dropped, **grade)
    killed += oracle.prove(w.grad, truth.grad_w, A=truth.A_w, name="dW", **grade)
    assert killed >= 7 + 11 + 9


def test_margin_choices_are_checked() -> None:
    for bad in ({"guard": "soft"}, {"grad": "none"}):
        with pytest.raises(ValueError, match="choose from"):
            M.ArcFace(**bad)
    with pytest.raises(ValueError, match="plus is 'ranks'"):
        M.ElasticCosFace(plus="ranks")


def test_both_cpu_backends_are_here() -> None:
    """A generated parametrization that lost a backend would pass silently."""
    assert {"eager", "cpu"} <= set(BACKENDS)
    assert set(VARIANTS) and {type(v).__name__ for v in VARIANTS.values()} >= {
        name for name in M.__all__ if name != "Margin"
    }
