"""The layers over norm_linear_attention: official weights, decoding, NaLaFormer's variants."""

import importlib.util

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyelastic
from pyelastic.nn import CausalNormAwareLinearAttention, NaLaFormer, NormAwareLinearAttention
from pyelastic.nn.norm_linear_attention import SoftmaxAttention

# Parameters in millions and FLOPs in 10^9 of the paper's table. XT: the released configuration gives 6.1 and 0.6.
TABLE = {"T": (15, 2.7), "S": (26, 5.1), "B": (52, 12), "L": (95, 18)}


def official(layer: NormAwareLinearAttention, x: Tensor) -> Tensor:
    """The released block, written out in plain torch."""
    b, c, h, w = x.shape
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v, g = layer.qkvg(tokens).chunk(4, -1)
    lepe = layer.lepe(v.transpose(1, 2).reshape(b, c, h, w)).flatten(2).transpose(1, 2)
    q, k, v = (t.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    norm = q.norm(dim=-1, keepdim=True)
    power = 3 * (0.5 + torch.tanh(norm))
    fq = torch.cat([(F.relu(q) / norm) ** power, (F.relu(-q) / norm) ** power], -1)
    fk = torch.cat([F.relu(k**3), F.relu(-(k**3))], -1)
    sin, cos = (t.repeat_interleave(2, -1) for t in pyelastic.rope_tables((h, w), q.shape[-1], dtype=x.dtype))

    def turn(f: Tensor) -> Tensor:
        halves = f.unflatten(-1, (2, -1))
        swapped = torch.stack((-halves[..., 1::2], halves[..., ::2]), -1).flatten(-2)
        return (halves * cos[:, None] + swapped * sin[:, None]).flatten(-2)

    o = turn(fq) @ (turn(fk).mT @ v / (h * w)) / (fq @ fk.mean(-2, keepdim=True).mT + 1e-6)
    return (
        layer.out_proj(layer.ln(o.transpose(1, 2).flatten(2) + lepe) * F.silu(g)).transpose(1, 2).reshape(b, c, h, w)
    )


@pytest.mark.parametrize("heads", (1, 2))
def test_block_is_the_released_one(heads: int) -> None:
    torch.manual_seed(0)
    layer = NormAwareLinearAttention(16, heads).double()
    assert {n.split(".")[0] for n in layer.state_dict()} == {"qkvg", "lepe", "ln", "out_proj"}
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64, requires_grad=True)
    y, want = layer(x), official(layer, x)
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (wanted,) = torch.autograd.grad(want.square().sum(), x)
    torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=1e-9)


def test_softmax_block_is_attention_with_rope() -> None:
    torch.manual_seed(0)
    layer = SoftmaxAttention(8, 1).double()
    q, k, v = (torch.randn(1, 6, 1, 8, dtype=torch.float64) for _ in range(3))
    sin, cos = pyelastic.rope_tables((2, 3), 8, dtype=torch.float64)
    o = layer.attend(q, k, v, (sin, cos))

    def turn(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)).flatten(
            -2
        )

    weights = (turn(q[0, :, 0]) @ turn(k[0, :, 0]).T / 8**0.5).softmax(-1)
    torch.testing.assert_close(o[0, :, 0], weights @ v[0, :, 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kv_heads", (None, 1))
@pytest.mark.parametrize("learned", (False, True))
def test_causal_layer_decodes_what_it_trains(kv_heads: int | None, learned: bool) -> None:
    torch.manual_seed(0)
    layer = CausalNormAwareLinearAttention(16, 2, num_kv_heads=kv_heads, learned_power=learned).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    y, after = layer(x)
    first, state = layer(x[:, :4])
    second, state = layer(x[:, 4:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.s, after.s, rtol=1e-9, atol=1e-9)
    decoded = layer.empty_state(2)
    steps = [layer.step(x[:, i : i + n], decoded) for i, n in ((0, 1), (1, 1), (2, 3), (5, 4))]
    torch.testing.assert_close(torch.cat(steps, 1), y, rtol=1e-9, atol=1e-9)
    changed = x.clone()
    changed[:, 6] += 1
    assert torch.equal(layer(changed)[0][:, :6], y[:, :6]) and not torch.equal(layer(changed)[0][:, 6:], y[:, 6:])
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
    assert learned == ("lam" in dict(layer.named_parameters()))


def test_causal_layer_takes_packed_sequences() -> None:
    torch.manual_seed(0)
    layer = CausalNormAwareLinearAttention(8, 2)
    x = torch.randn(1, 7, 8)
    packed, _ = layer(x, cu_seqlens=torch.tensor([0, 3, 7]))
    parts = torch.cat((layer(x[:, :3])[0], layer(x[:, 3:])[0]), 1)
    torch.testing.assert_close(packed, parts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormAwareLinearAttention(10, 4), "dim is 10 and num_heads 4"),
        (lambda: CausalNormAwareLinearAttention(12, 4), "dim is 12, num_heads 4"),
        (lambda: CausalNormAwareLinearAttention(16, 4, num_kv_heads=3), "num_kv_heads 3"),
        (lambda: NaLaFormer("XL"), "unknown variant 'XL'; choose from XT, T, S, B, L"),
    ],
)
def test_wrong_sizes(make, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("variant", TABLE)
def test_variants_have_the_papers_size(variant: str) -> None:
    """Counted on the meta device: within 7 % of the table's rounded numbers."""
    from torch.utils.flop_counter import FlopCounterMode

    model = NaLaFormer(variant, backend="eager").eval()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    if variant != "T":  # its 1,000 x 1,000 x 3 pixels more cost time, and nothing more is learned
        assert abs(millions / TABLE[variant][0] - 1) < 0.07
        return
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    assert abs(millions / 15 - 1) < 0.07 and abs(counter.get_total_flops() / 2e9 / 2.7 - 1) < 0.07


def test_a_small_one_trains_and_keeps_the_released_names() -> None:
    torch.manual_seed(0)
    model = NaLaFormer(
        num_classes=3,
        widths=(16, 32, 32, 32),
        depths=(1, 1, 1, 1),
        heads=(1, 2, 2, 2),
        projection=32,
        drop_path_rate=0.0,
    )
    names = set(model.state_dict())
    for name in (
        "patch_embed.proj.0.weight",
        "layers.0.RoPE.angle",
        "layers.0.blocks.0.norm1.norm.weight",
        "layers.0.blocks.0.attn.qkvg.weight",
        "layers.3.blocks.0.attn.lepe.bias",
        "layers.1.blocks.0.ffn.dwconv.weight",
        "layers.1.blocks.0.gamma_1",
        "layers.2.downsample.reduction.weight",
        "proj.weight",
        "norm.running_mean",
        "head.bias",
    ):
        assert name in names
    x, labels = torch.randn(6, 3, 64, 64), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert model.eval()(x).shape == (6, 3)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm")
def test_timm_makes_them() -> None:
    import timm

    from pyelastic.nn.nalaformer import register_timm_models

    assert "nalaformer_t" in register_timm_models()
    assert timm.create_model("nalaformer_xt", num_classes=7).head.out_channels == 7
