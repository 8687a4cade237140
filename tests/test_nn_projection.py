"""Projection heads and the late-interaction module: forms, loading, folding, absorbed scoring, training."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pyelastic
from pyelastic.nn import LateInteraction, ProjectionHead
from pyelastic.nn.projection import PRESETS

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


def state(head: ProjectionHead) -> dict[str, Tensor]:
    return {k: v.detach() for k, v in head.state_dict().items()}


def test_linear() -> None:
    head = ProjectionHead(8, 6, bias=True)
    s = state(head)
    want = F.normalize(X @ s["blocks.0.linear.weight"].T + s["blocks.0.linear.bias"], dim=-1)
    torch.testing.assert_close(head(X), want)
    assert ProjectionHead(8).d_out == 128 and sum(p.numel() for p in ProjectionHead(8, 6).parameters()) == 48


@pytest.mark.parametrize("activation", ("identity", "relu", "gelu", "silu", "tanh"))
@pytest.mark.parametrize("layers", (2, 3))
@pytest.mark.parametrize("skip", (False, True))
def test_ffn(activation: str, layers: int, skip: bool) -> None:
    """Against the formula, with residuals of both kinds: projected at the upscaled layer, identity inside."""
    head = ProjectionHead(8, 6, kind="ffn", layers=layers, expand=1.5, activation=activation, residual=True, skip=skip)
    s = state(head)
    act = {"identity": lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}[activation]
    h = act(X @ s["blocks.0.linear.weight"].T) + X @ s["blocks.0.residual.weight"].T
    assert h.shape[-1] == 12
    if layers == 3:
        h = act(h @ s["blocks.1.linear.weight"].T) + h
    z = h @ s[f"blocks.{layers - 1}.linear.weight"].T + (X @ s["skip.weight"].T if skip else 0.0)
    torch.testing.assert_close(head(X), F.normalize(z, dim=-1))


@pytest.mark.parametrize("activation", ("sigmoid", "silu", "gelu", "identity"))
@pytest.mark.parametrize("layers", (1, 2))
def test_glu(activation: str, layers: int) -> None:
    head = ProjectionHead(8, 6, kind="glu", layers=layers, activation=activation, skip=True)
    s = state(head)
    gate = {"sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu, "identity": lambda z: z}[activation]
    h = (X @ s["blocks.0.value.weight"].T) * gate(X @ s["blocks.0.gate.weight"].T)
    z = (h if layers == 1 else h @ s["blocks.1.linear.weight"].T) + X @ s["skip.weight"].T
    torch.testing.assert_close(head(X), F.normalize(z, dim=-1))


@pytest.mark.parametrize("norm", ("rms", "layer"))
def test_norm_comes_first(norm: str) -> None:
    head = ProjectionHead(8, 6, norm=norm)
    first = F.rms_norm(X, (8,)) if norm == "rms" else F.layer_norm(X, (8,))
    torch.testing.assert_close(head(X), F.normalize(first @ state(head)["blocks.0.linear.weight"].T, dim=-1))


def test_sizes_that_agree_need_no_projection() -> None:
    """An identity residual and an identity skip; both at once go round the fused epilogue."""
    for options in ({"residual": True}, {"skip": True}, {"residual": True, "skip": True}):
        head = ProjectionHead(8, 8, **options)
        assert len(list(head.parameters())) == 1
        want = X @ state(head)["blocks.0.linear.weight"].T + len(options) * X
        torch.testing.assert_close(head(X), F.normalize(want, dim=-1))
    assert not torch.allclose(ProjectionHead(8, 8, normalize=False)(X).norm(dim=-1), torch.ones(3, 5))


FOLDABLE: tuple[dict[str, Any], ...] = (
    {}, {"residual": True, "bias": True}, {"kind": "ffn", "residual": True}, {"kind": "ffn", "layers": 3, "bias": True},
    {"kind": "ffn", "residual": True, "skip": True, "bias": True},
)  # fmt: skip


@pytest.mark.parametrize("options", FOLDABLE, ids=str)
@pytest.mark.parametrize("d_out", (6, 8))
def test_fold(options: dict[str, Any], d_out: int) -> None:
    head = ProjectionHead(8, d_out, **options).double()
    folded = head.fold()
    assert sum(p.numel() for p in folded.parameters()) == 8 * d_out + (d_out if options.get("bias") else 0)
    torch.testing.assert_close(folded(X.double()), head(X.double()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", ({"kind": "glu"}, {"kind": "ffn", "activation": "gelu"}, {"norm": "rms"}), ids=str)
def test_fold_refuses_what_is_not_linear(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="non-linear"):
        ProjectionHead(8, 6, **options).fold()


def test_presets() -> None:
    for name in PRESETS:
        head = ProjectionHead.preset(name, 8, 6)
        assert head(X).shape == (3, 5, 6)
    assert ProjectionHead.preset("paper", 8, activation="silu", d_out=6)(X).shape == (3, 5, 6)
    torch.testing.assert_close(ProjectionHead.preset("pylate", 8, 6).fold()(X).norm(dim=-1), torch.ones(3, 5))


def test_from_linear_starts_as_the_linear_head() -> None:
    weight, bias = torch.randn(6, 8), torch.randn(6)
    want = F.normalize(X @ weight.T + bias, dim=-1)
    torch.testing.assert_close(ProjectionHead.from_linear(weight, bias)(X), want)
    for options in ({"activation": "gelu"}, {"expand": 1.0}, {}):
        head = ProjectionHead.from_linear(weight, bias, kind="ffn", residual=True, **options)
        torch.testing.assert_close(head(X), want, rtol=0.02, atol=0.02)
        before = [p.clone() for p in head.parameters()]
        (head(X) * torch.randn(3, 5, 6)).sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in head.parameters()) and len(before) >= 3
    deep = {"kind": "ffn", "residual": True}
    for wrong in (
        {"kind": "glu"}, {"kind": "ffn"}, {"skip": True}, {"norm": "layer"},
        {**deep, "expand": 0.5}, {**deep, "activation": "sigmoid"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="from_linear"):
            ProjectionHead.from_linear(weight, bias, **wrong)


def test_loads_colbert() -> None:
    """A state_dict with linear.weight among an encoder's."""
    weight = torch.randn(6, 8)
    head = ProjectionHead.from_dense({"linear.weight": weight, "bert.embeddings.weight": torch.randn(3, 3)})
    torch.testing.assert_close(head(X), F.normalize(X @ weight.T, dim=-1))


def test_loads_a_stack_of_dense() -> None:
    """PyLate's module numbers in the keys, residual.weight where sizes differ, an identity residual told."""
    s = {
        "1.linear.weight": torch.randn(12, 8), "1.linear.bias": torch.randn(12),
        "1.residual.weight": torch.randn(12, 8),
        "2.linear.weight": torch.randn(12, 12), "10.linear.weight": torch.randn(6, 12),
    }  # fmt: skip
    head = ProjectionHead.from_dense(s, ["gelu", "gelu", "identity"], [True, True, False])
    h = F.gelu(F.linear(X, s["1.linear.weight"], s["1.linear.bias"])) + F.linear(X, s["1.residual.weight"])
    h = F.gelu(F.linear(h, s["2.linear.weight"])) + h
    torch.testing.assert_close(head(X), F.normalize(F.linear(h, s["10.linear.weight"]), dim=-1))
    activated = ProjectionHead.from_dense({"linear.weight": torch.randn(6, 8)}, ["tanh"])
    assert activated(X).shape == (3, 5, 6)


def test_loading_errors() -> None:
    with pytest.raises(ValueError, match=r"no linear.weight among \['x'\]"):
        ProjectionHead.from_dense({"x": X})
    with pytest.raises(ValueError, match=r"\[6, 8\] is followed by \[5, 7\]"):
        ProjectionHead.from_dense({"0.linear.weight": torch.randn(6, 8), "1.linear.weight": torch.randn(5, 7)})
    with pytest.raises(ValueError, match="1 layers, 2 activations"):
        ProjectionHead.from_dense({"linear.weight": torch.randn(6, 8)}, ["gelu", "gelu"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mlp"}, "kind is 'mlp'"), ({"activation": "elu"}, "activation is 'elu'"),
        ({"norm": "batch"}, "norm is"),
        ({"layers": 2}, "'linear' has 1"), ({"kind": "ffn", "layers": 4}, "'ffn' has 2 or 3"),
        ({"kind": "glu", "layers": 3}, "'glu' has 1 or 2"), ({"kind": "ffn", "expand": 0.0}, "expand 0.0"),
    ],
)  # fmt: skip
def test_wrong_heads(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProjectionHead(8, 6, **options)
    with pytest.raises(ValueError, match="preset is 'best'"):
        ProjectionHead.preset("best", 8)


def data() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    q, d, grouped = (torch.randn(*shape, generator=random) for shape in ((4, 3, 8), (4, 6, 8), (4, 2, 6, 8)))
    return q, d, grouped


def test_late_interaction_is_head_and_loss() -> None:
    q, d, grouped = data()
    model = LateInteraction(ProjectionHead.preset("paper", 8, 6), temperature=0.1)
    loss = model(q, d)
    s = torch.einsum("isd,jtd->ijst", model.head(q), model.head(d)).max(-1).values.sum(-1)
    torch.testing.assert_close(loss, F.cross_entropy(s / 0.1, torch.arange(4)))
    torch.testing.assert_close(model.score(q, d), s)
    teacher = torch.randn(4, 2)
    distill = LateInteraction(ProjectionHead(8, 6), ProjectionHead(8, 6), loss="kl_distill")
    want = pyelastic.maxsim_kl_distill(distill.query_head(q), distill.head(grouped), teacher)
    torch.testing.assert_close(distill(q, grouped, teacher), want)
    for wrong in (lambda: model(q, d, teacher), lambda: distill(q, grouped)):
        with pytest.raises(ValueError, match="teacher_scores"):
            wrong()
    with pytest.raises(ValueError, match="loss is 'mse'"):
        LateInteraction(ProjectionHead(8, 6), loss="mse")


def test_k_negatives_give_gradients_to_rows_that_won_only() -> None:
    """The gradients of head and states are those of autograd on the whole tensor, few rows won or not."""
    q, _, grouped = data()
    grads = []
    head = ProjectionHead(8, 6)
    for ours in (True, False):
        head.zero_grad()
        x = grouped.clone().requires_grad_()
        if ours:
            loss = LateInteraction(head)(q[:, :1], x)
        else:
            d = F.normalize(F.linear(x, head.blocks[0].linear.weight), dim=-1)
            s = torch.einsum("isd,iktd->ikst", head(q[:, :1]), d)
            loss = F.cross_entropy(s.max(-1).values.sum(-1), torch.zeros(4).long())
        loss.backward()
        grads.append((x.grad, head.blocks[0].linear.weight.grad.clone()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert int((grads[0][0] != 0).any(-1).sum()) == 8  # one winner for each of the 4 x 2 documents


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("normalize", (True, False))
def test_absorbed_scores(dtype: torch.dtype, normalize: bool) -> None:
    """Scoring raw states with absorbed queries is scoring projected states."""
    q, d, _ = (x.to(dtype) for x in data())
    model = LateInteraction(ProjectionHead.preset("pylate", 8, 6, normalize=normalize).to(dtype))
    got = pyelastic.maxsim(model.absorb_queries(q), model.absorb_documents(d))
    torch.testing.assert_close(got, model.score(q, d).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="without bias"):
        LateInteraction(ProjectionHead(8, 6, bias=True)).absorb_queries(q.float())
    with pytest.raises(ValueError, match="non-linear"):
        LateInteraction(ProjectionHead(8, 6, kind="glu")).absorb_documents(d.float())


@pytest.mark.parametrize("name", PRESETS)
def test_training_lowers_the_loss(name: str) -> None:
    q, d, _ = data()
    model = LateInteraction(ProjectionHead.preset(name, 8, 6), temperature=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(q, d)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    again = LateInteraction(ProjectionHead.preset(name, 8, 6), temperature=0.5)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(q, d), model(q, d))


def test_compiles_in_one_graph() -> None:
    q, d, _ = data()
    torch._dynamo.reset()
    model = LateInteraction(ProjectionHead.preset("pylate-gelu", 8, 6), temperature=0.5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, d), model(q, d))


def test_autocast() -> None:
    """States in bfloat16 and float32 parameters: unit vectors in bfloat16, and a float32 loss."""
    q, d, _ = data()
    model = LateInteraction(ProjectionHead.preset("paper", 8, 6))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(q.bfloat16(), d.bfloat16())
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())
