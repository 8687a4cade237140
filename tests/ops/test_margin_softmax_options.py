"""Every option of margin_softmax against the same option spelled out in the float64 reference."""

import itertools

import backends
import oracle
import pytest
import torch
from layouts import pairwise
from margin_softmax_cases import BACKENDS, OP, call, compare, make, over_backends, weighted_upstream
from margin_softmax_reference import reference

from pyelastic import _dispatch
from pyelastic import margins as M
from pyelastic.ops.margin_softmax import sample_classes

ARC = M.ArcFace()


@over_backends
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("ignore_index", (-100, -1, 5))
def test_ignored_rows(backend: str, reduction: str, ignore_index: int) -> None:
    """Ignored rows add nothing, are not counted by "mean", and what they hold does not matter."""
    case = make()
    case.labels[case.labels == 5] = 6
    case.labels[[0, 4, 12]] = ignore_index
    case.embeddings[4] = float("nan")
    up = weighted_upstream(case) if reduction == "none" else None
    compare(backend, case, ARC, reduction=reduction, ignore_index=ignore_index, upstream=up)
    loss, e, _ = call(backend, case, ARC, reduction=reduction, ignore_index=ignore_index)
    loss.sum().backward()
    assert bool((e.grad[[0, 4, 12]] == 0).all())


@over_backends
@pytest.mark.parametrize("variant", (M.AdaFace(), M.MagFace(l_a=4, u_a=9), M.CurricularFace()))
def test_ignored_rows_of_adaptive_margins(backend: str, variant: M.Margin) -> None:
    """Batch statistics come from the valid rows alone."""
    case = make()
    case.labels[[1, 7]] = -1
    case.embeddings[1], case.embeddings[7] = torch.nan, 1e4
    compare(backend, case, variant, ignore_index=-1)


@over_backends
def test_vectors_of_ignored_rows_do_not_matter(backend: str) -> None:
    """NaN margins and weights of ignored rows reach neither loss nor gradients: 0 * NaN is NaN in a backward."""
    case = make()
    case.labels[[1, 7]] = -100
    results = []
    for filler in (1.0, torch.nan):
        given = torch.linspace(0.1, 0.6, 13)
        given[[1, 7]] = filler
        loss, e, w = call(backend, case, ARC, margins=given, sample_weight=given)
        loss.backward()
        results.append((loss.detach(), e.grad, w.grad))
    for clean, dirty in zip(*results, strict=True):
        assert bool(clean.isfinite().all()) and torch.equal(clean, dirty)


@over_backends
def test_elastic_plus_skips_ignored_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank counts valid rows only: the result is that of the batch without the ignored ones."""
    from pyelastic import _random

    drawn = torch.linspace(0.9, 0.1, 13, dtype=torch.float64)
    keep = torch.tensor([i not in (2, 3, 9) for i in range(13)])
    case = make(dtype=backends.widest(OP, backend))
    for plus in ("rank", "official"):
        margin = M.ElasticArcFace(m=0.0, sigma=1.0, plus=plus)
        short = make(dtype=backends.widest(OP, backend))
        short.embeddings, short.labels = case.embeddings[keep], case.labels[keep]
        monkeypatch.setattr(_random, "normal", lambda seed, rows: drawn[keep].to(rows.device))
        (_, want), *_ = call(backend, short, margin, return_aux=True)
        monkeypatch.setattr(_random, "normal", lambda seed, rows: drawn.to(rows.device))
        long = make(dtype=backends.widest(OP, backend))
        long.labels[~keep] = -100
        (_, got), *_ = call(backend, long, margin, return_aux=True)
        assert torch.equal(got.margin[keep], want.margin)


@over_backends
@pytest.mark.parametrize("empty", ("no rows", "all ignored"))
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_nothing_to_learn(backend: str, empty: str, reduction: str) -> None:
    """No valid row: loss 0 (not torch's NaN) and zero gradients of the right shape."""
    case = make(0 if empty == "no rows" else 6)
    case.labels[:] = -100
    for margin in (ARC, M.ElasticArcFace(plus="rank"), M.AdaFace(), M.MagFace(), M.SVSoftmax()):
        (loss, aux), e, w = call(backend, case, margin, reduction=reduction, return_aux=True)
        loss.sum().backward()
        assert loss.dtype == torch.float32
        assert loss.shape == (case.labels.shape if reduction == "none" else ())
        assert bool((loss == 0).all())
        assert torch.equal(e.grad, torch.zeros_like(e)) and torch.equal(w.grad, torch.zeros_like(w))
        assert aux.rank.tolist() == [-1] * len(case.labels)


@over_backends
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_sample_weight(backend: str, reduction: str) -> None:
    """Weights multiply the rows; the mean still divides by the number of rows."""
    case = make()
    case.labels[3] = -100
    weight = torch.linspace(0.0, 3.0, 13)
    up = weighted_upstream(case) if reduction == "none" else None
    compare(backend, case, ARC, reduction=reduction, sample_weight=weight, upstream=up)
    loss, *_ = call(backend, case, ARC, reduction=reduction, sample_weight=weight)
    wide, *_ = call(backend, case, ARC, reduction=reduction, sample_weight=weight.double())
    assert wide.dtype == torch.float32 and torch.equal(wide, loss)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cpu"])  # whose launcher raises
@pytest.mark.parametrize("margin", (ARC, M.CurricularFace(t=0.3)))
@pytest.mark.parametrize("label", (-7, 37, 1 << 40, 36))
@pytest.mark.parametrize("sampled", (False, True))
def test_labels_that_nobody_checked(
    backend: str, margin: M.Margin, label: int, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where reading them would synchronise: the row's loss is NaN and the others are what they were."""
    case = make()
    case.labels %= 36
    classes = torch.arange(36) if sampled else None
    if label == 36 and not sampled:
        return  # a right label
    want, *_ = call(backend, case, margin, reduction="none", classes=classes)
    case.labels[4] = label
    monkeypatch.setattr(_dispatch, "may_read", lambda device: False)
    got, e, _ = call(backend, case, margin, reduction="none", classes=classes)
    keep = torch.arange(13) != 4
    assert bool(got[4].isnan()) and torch.equal(got[keep], want[keep])
    got[keep].sum().backward()
    assert bool(e.grad[keep].isfinite().all())


@over_backends
@pytest.mark.parametrize("smoothing", (0.05, 0.5))
@pytest.mark.parametrize("margin", (ARC, M.CurricularFace(t=0.3), M.NormFace()))
def test_label_smoothing(backend: str, smoothing: float, margin: M.Margin) -> None:
    compare(backend, make(), margin, label_smoothing=smoothing)
    compare(backend, make(subcenters=2), margin, label_smoothing=smoothing, subcenters=2)


@over_backends
@pytest.mark.parametrize("margin", (ARC, M.SVSoftmax()))
def test_z_loss(backend: str, margin: M.Margin) -> None:
    compare(backend, make(), margin, z_loss=1e-2)


PAIRS = pairwise(
    reduction=("none", "mean", "sum"),
    smoothing=(0.0, 0.1),
    z_loss=(0.0, 1e-3),
    weights=(False, True),
    ignored=(False, True),
    subcenters=(1, 3),
    sampled=(False, True),
    margin=(ARC, M.CosFace(), M.CurricularFace(t=0.2), M.MagFace(l_a=4, u_a=9)),
    dtype=(torch.float32, torch.float64, torch.bfloat16),
)


@over_backends
@pytest.mark.parametrize(
    ("reduction", "smoothing", "z_loss", "weights", "ignored", "subcenters", "sampled", "margin",
     "dtype"),
    PAIRS,
)  # fmt: skip
def test_pairs_of_options(
    backend: str,
    reduction: str,
    smoothing: float,
    z_loss: float,
    weights: bool,
    ignored: bool,
    subcenters: int,
    sampled: bool,
    margin: M.Margin,
    dtype: torch.dtype,
) -> None:
    """Every pair of option values occurs together at least once."""
    case = make(seed=2, subcenters=subcenters, dtype=dtype)
    if ignored:
        case.labels[[2, 8]] = -100
    sampled_ids = torch.cat((case.labels[case.labels >= 0], torch.arange(0, 37, 3))).unique()
    compare(
        backend,
        case,
        margin,
        reduction=reduction,
        label_smoothing=smoothing,
        z_loss=z_loss,
        sample_weight=torch.linspace(0.1, 2.0, 13) if weights else None,
        subcenters=subcenters,
        classes=sampled_ids if sampled else None,
        upstream=weighted_upstream(case) if reduction == "none" else None,
    )


@over_backends
@pytest.mark.parametrize("subcenters", (1, 2))
def test_sampled_classes(backend: str, subcenters: int) -> None:
    """Partial FC: the loss over the classes given, and no gradient for any other."""
    case = make(subcenters=subcenters)
    classes = torch.cat((case.labels, torch.tensor([0, 36]))).unique()
    truth = compare(backend, case, ARC, classes=classes, subcenters=subcenters)
    others = torch.ones(37, dtype=torch.bool)
    others[classes] = False
    assert bool(others.any())
    assert not bool(truth.grad_w.unflatten(0, (37, -1))[others].any())
    # Every class given is the same as none given.
    every = {"classes": torch.arange(37), "subcenters": subcenters}
    compare(backend, case, ARC, **every)


@over_backends
@pytest.mark.parametrize("subcenters", (1, 2))
def test_sparse_gradient(backend: str, subcenters: int) -> None:
    """sparse_grad holds exactly the rows read, with the values of the dense gradient."""
    if backend == "eager":
        pytest.skip("eager gathers by autograd: documented to give a dense gradient")
    case = make(subcenters=subcenters)
    classes = torch.cat((case.labels, torch.tensor([0, 36]))).unique()
    options = {"classes": classes, "subcenters": subcenters}
    compare(backend, case, ARC, sparse_grad=True, **options)
    loss, _, w = call(backend, case, ARC, sparse_grad=True, **options)
    loss.backward()
    assert w.grad.is_sparse
    rows = (classes[:, None] * subcenters + torch.arange(subcenters)).flatten()
    grad = w.grad.coalesce()
    assert torch.equal(grad.indices()[0].cpu(), rows)
    dense, _, w_dense = call(backend, case, ARC, **options)
    dense.backward()
    assert torch.equal(grad.to_dense(), w_dense.grad)


def test_sample_classes() -> None:
    labels = torch.tensor([3, 99, 3, -100, 42])
    chosen = sample_classes(labels, 100, 0.2, seed=1)
    assert len(chosen) == 20 and torch.equal(chosen, chosen.unique())
    assert {3, 99, 42} <= set(chosen.tolist()) and -100 not in chosen
    assert torch.equal(chosen, sample_classes(labels, 100, 0.2, seed=1))
    assert not torch.equal(chosen, sample_classes(labels, 100, 0.2, seed=2))
    assert torch.equal(sample_classes(labels, 100, 1.0, seed=1), torch.arange(100))
    counts = torch.zeros(100)
    for seed in range(300):
        counts[sample_classes(labels, 100, 0.2, seed=seed)] += 1
    rest = counts[[i for i in range(100) if i not in (3, 99, 42)]]
    # Binomial(300, 17/97): mean 52.6, deviation 6.6; five deviations either way.
    assert bool(((rest > 19) & (rest < 86)).all())
    with pytest.raises(ValueError, match="rate"):
        sample_classes(labels, 100, 0.0)


@over_backends
@pytest.mark.parametrize("need", list(itertools.product((False, True), repeat=2))[1:])
def test_only_wanted_gradients(backend: str, need: tuple[bool, bool]) -> None:
    case = make()
    truth = reference(case.embeddings, case.weight, case.labels, ARC)
    loss, e, w = call(backend, case, ARC, grad=need)
    loss.backward()
    assert (e.grad is not None, w.grad is not None) == need
    for x, want, A in ((e, truth.grad_e, truth.A_e), (w, truth.grad_w, truth.A_w)):
        if x.grad is not None:
            oracle.check(x.grad, want, A=A, K=truth.K)


@over_backends
def test_without_gradients(backend: str) -> None:
    case = make()
    truth = reference(case.embeddings, case.weight, case.labels, ARC)
    loss, *_ = call(backend, case, ARC, grad=(False, False))
    assert not loss.requires_grad
    oracle.check(loss, truth.loss, A=truth.A_loss, K=truth.K)
    with torch.inference_mode():
        loss, *_ = call(backend, case, ARC, grad=(False, False))
    oracle.check(loss, truth.loss, A=truth.A_loss, K=truth.K)


@over_backends
def test_backward_twice(backend: str) -> None:
    """retain_graph: the second backward adds the same gradient again (saved tensors are intact)."""
    loss, e, w = call(backend, make(), ARC)
    loss.backward(retain_graph=True)
    first = e.grad.clone(), w.grad.clone()
    loss.backward(torch.full_like(loss, 3.0))
    for now, once in zip((e.grad, w.grad), first, strict=True):
        torch.testing.assert_close(now, 4 * once, rtol=0, atol=1e-5 * float(once.abs().max()))


@over_backends
@pytest.mark.parametrize("labels", (torch.int32, torch.int64))
@pytest.mark.parametrize(
    ("e", "w"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32),
     (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)],
)  # fmt: skip
def test_mixed_dtypes(backend: str, e: torch.dtype, w: torch.dtype, labels: torch.dtype) -> None:
    """16-bit embeddings on float32 weights is the usual case; each gradient keeps its dtype."""
    case = make()
    case.embeddings, case.weight = case.embeddings.to(e), case.weight.to(w)
    case.labels = case.labels.to(labels)
    compare(backend, case, ARC)


@over_backends
def test_autocast_changes_nothing(backend: str) -> None:
    """The op computes in float32 whatever autocast is in force."""
    case = make()
    want, e_want, _ = call(backend, case, ARC)
    want.backward()
    with torch.autocast(backends.device_of(backend).type, torch.bfloat16):
        got, e_got, _ = call(backend, case, ARC)
    got.backward()
    assert torch.equal(got, want) and torch.equal(e_got.grad, e_want.grad)


@over_backends
def test_default_margin_is_arcface(backend: str) -> None:
    case = make()
    assert torch.equal(call(backend, case, None)[0], call(backend, case, M.ArcFace(0.5))[0])
