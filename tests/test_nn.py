"""Heads against the functional op they wrap, and the state they load and keep."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

import pyelastic
from pyelastic import margins, nn

HEADS = [c for c in map(nn.__dict__.get, nn.__all__) if issubclass(c, nn.MarginSoftmax) and c is not nn.MarginSoftmax]


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 16, generator=generator).to(dtype), torch.randint(0, 30, (12,), generator=generator)


@pytest.mark.parametrize("head_class", HEADS, ids=lambda c: c.__name__)
def test_state_dict_round_trip_gives_the_same_loss(head_class) -> None:
    embeddings, labels = batch()
    head = head_class(16, 30)
    head(embeddings, labels)  # moves running statistics
    other = head_class(16, 30)
    other.load_state_dict(head.state_dict())
    for module in (head, other):
        module.eval()
    assert torch.equal(head(embeddings, labels), other(embeddings, labels))
    assert torch.equal(copy.deepcopy(head)(embeddings, labels), head(embeddings, labels))


@pytest.mark.parametrize("name", ("ArcFace", "CosFace", "ElasticArcFace", "ElasticCosFace"))
def test_official_kernel_loads_and_reproduces_the_loss(name: str) -> None:
    golden = np.load(Path(__file__).parent / "data" / f"margin_{name}.npz")
    kernel = torch.tensor(golden["weight_DC"])
    head = getattr(nn, name)(kernel.shape[0], kernel.shape[1], s=float(golden["s"]), m=float(golden["m"])).double()
    head.load_state_dict({"kernel": kernel})
    loss = head(
        torch.tensor(golden["embeddings"]),
        torch.tensor(golden["labels"]),
        margins=torch.tensor(golden["drawn_margins"]),
        reduction="none",
    )
    torch.testing.assert_close(loss, torch.tensor(golden["loss_per_sample"]), rtol=1e-9, atol=1e-9)


def test_a_wrong_kernel_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.ArcFace(16, 30).load_state_dict({"kernel": torch.zeros(15, 30)})


def test_plus_true_is_the_papers_rule() -> None:
    embeddings, labels = batch()
    head = nn.ElasticArcFace(16, 30, std=0.05, plus=True)
    expected = pyelastic.margin_softmax(
        embeddings, head.weight, labels, margin=margins.ElasticArcFace(0.5, sigma=0.05, plus="rank"), seed=5
    )
    assert torch.equal(head(embeddings, labels, seed=5), expected)


def test_curricular_moves_t_before_use_and_only_in_training() -> None:
    embeddings, labels = batch()
    head = nn.CurricularFace(16, 30)
    unit = torch.nn.functional.normalize
    cosine = (unit(embeddings) * unit(head.weight.detach())[labels]).sum(1).mean()
    head(embeddings, labels)
    torch.testing.assert_close(head.t, 0.01 * cosine, rtol=1e-5, atol=1e-7)
    before = head.t.clone()
    head.eval()(embeddings, labels)
    assert torch.equal(head.t, before)


def test_adaface_running_statistics() -> None:
    embeddings, labels = batch()
    head = nn.AdaFace(16, 30, t_alpha=0.25)
    head(embeddings, labels)
    norms = embeddings.norm(dim=1)
    torch.testing.assert_close(head.batch_mean, 0.75 * torch.tensor(20.0) + 0.25 * norms.mean())
    torch.testing.assert_close(head.batch_std, 0.75 * torch.tensor(100.0) + 0.25 * norms.std())


def test_sampling_reads_only_the_sampled_rows() -> None:
    embeddings, labels = batch()
    head = nn.CosFace(16, 30, sample_rate=0.5)
    head(embeddings, labels).backward()
    touched = head.weight.grad.abs().sum(1) > 0
    assert int(touched.sum()) == 15 and bool(touched[labels].all())


def test_compiles_to_one_graph() -> None:
    embeddings, labels = batch()
    head = nn.ArcFace(16, 30)
    torch.testing.assert_close(torch.compile(head, fullgraph=True)(embeddings, labels), head(embeddings, labels))


OFFICIAL = {  # arguments after in_features and out_features, with their defaults, in the official order
    "ArcFace": {"s": 64.0, "m": 0.50},
    "CosFace": {"s": 64.0, "m": 0.35},
    "ElasticArcFace": {"s": 64.0, "m": 0.50, "std": 0.0125, "plus": False},
    "ElasticCosFace": {"s": 64.0, "m": 0.35, "std": 0.0125, "plus": False},
    "AdaFace": {"m": 0.4, "h": 0.333, "s": 64.0, "t_alpha": 1.0},
    "CurricularFace": {"m": 0.5, "s": 64.0},
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_arguments_are_those_of_the_official_class(name: str) -> None:
    parameters = list(inspect.signature(getattr(nn, name)).parameters.values())[2:]
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(OFFICIAL[name].items())


@pytest.mark.parametrize("name", ("AdaFace", "CurricularFace"))
def test_official_state_with_buffers_loads(name: str) -> None:
    """Theirs have shape [1]; AdaFace's t is read by nobody."""
    buffers = {"t": torch.full((1,), 0.25)}
    if name == "AdaFace":
        buffers |= {"batch_mean": torch.full((1,), 7.0), "batch_std": torch.full((1,), 3.0)}
    kernel = torch.randn(16, 30)
    head = getattr(nn, name)(16, 30)
    head.load_state_dict({"kernel": kernel, **buffers})
    assert torch.equal(head.weight, kernel.t())
    for key in head.state_dict().keys() & buffers.keys():
        assert torch.equal(head.state_dict()[key], buffers[key][0])


@pytest.mark.parametrize("head", (nn.AdaFace(16, 30, t_alpha=0.5), nn.CurricularFace(16, 30)), ids=type)
def test_running_statistics_skip_a_batch_without_valid_rows(head) -> None:
    embeddings, labels = batch()
    head(embeddings, labels)
    before = {name: value.clone() for name, value in head.named_buffers()}
    head(embeddings, torch.full_like(labels, -100))
    assert before and all(torch.equal(value, before[name]) for name, value in head.named_buffers())


@pytest.mark.parametrize("head_class", HEADS, ids=lambda c: c.__name__)
def test_wrong_inputs_are_refused_by_name(head_class) -> None:
    """Also by the heads that look at the batch before the op does."""
    embeddings, labels = batch()
    head = head_class(16, 30)
    for wrong, right, message in (
        (embeddings[0], labels, r"embeddings is \[16\]; expected 2 dimensions"),
        (embeddings[:, :5], labels, r"embeddings is \[12, 5\].*16\]"),
        (embeddings, labels[:3], r"\[12, 16\].*\[3"),
        (embeddings, labels.where(labels != labels[2], 99), r"labels\[\d\] is 99"),
    ):
        with pytest.raises(ValueError, match=f"margin_softmax: .*{message}"):
            head(wrong, right)


@pytest.mark.parametrize("name", ("AdaFace", "CurricularFace"))
def test_heads_with_statistics_compile_to_one_graph(name: str) -> None:
    embeddings, labels = batch()
    plain, traced = (getattr(nn, name)(16, 30) for _ in range(2))
    traced.load_state_dict(plain.state_dict())
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(embeddings, labels), plain(embeddings, labels))
    for (key, value), other in zip(plain.named_buffers(), traced.buffers(), strict=True):
        torch.testing.assert_close(other, value, msg=key)
