"""norm_linear_attention against its formulas: options, dtypes, sizes, states, golden data, the tolerance proof."""

from pathlib import Path

import backends
import numpy as np
import oracle
import pytest
import torch
from layouts import pairwise
from norm_linear_attention_cases import (
    BACKENDS,
    DTYPES,
    OP,
    Case,
    call,
    compare,
    grade,
    make,
    over_backends,
    stored,
    upstream_of,
)
from norm_linear_attention_reference import reference

import pyelastic
from pyelastic.ops.norm_linear_attention_step import empty_state

GOLDEN = Path(__file__).parents[1] / "data" / "nala_official.npz"
MODES, ROPES = ("split", "cos"), (None, "num", "both")


@over_backends
@pytest.mark.parametrize(
    ("mode", "rope", "causal", "dtype", "gate", "state", "learned", "eps_mode"),
    pairwise(
        mode=MODES,
        rope=ROPES,
        causal=(False, True),
        dtype=DTYPES,
        gate=(False, True),
        state=(False, True),
        learned=(False, True),
        eps_mode=("mean", "sum"),
    ),
)
def test_options(
    backend: str,
    mode: str,
    rope: str | None,
    causal: bool,
    dtype: torch.dtype,
    gate: bool,
    state: bool,
    learned: bool,
    eps_mode: str,
) -> None:
    more = {"mode": mode, "causal": causal, "eps_mode": eps_mode, "eps": 1e-3}
    compare(backend, make(dtype=dtype, rope=rope, gate=gate, state=state, learned=learned, **more), states=True)


@over_backends
@pytest.mark.parametrize(
    ("n", "d", "dv", "heads", "kv_heads", "mode", "causal"),
    pairwise(
        n=(1, 2, 15, 16, 17, 33, 63, 64, 65, 129),
        d=(2, 5, 16, 40),
        dv=(1, 8, 17, 32),
        heads=(2, 4),
        kv_heads=(1, 2),
        mode=MODES,
        causal=(False, True),
    ),
)
def test_sizes(backend: str, n: int, d: int, dv: int, heads: int, kv_heads: int, mode: str, causal: bool) -> None:
    """One token, odd sizes and those around tiles; heads that share keys."""
    compare(backend, make(1, n, heads=heads, kv_heads=kv_heads, d=d, dv=dv, mode=mode, causal=causal))


@over_backends
@pytest.mark.parametrize("d", (48, 64, 96, 128))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_widths_of_models(backend: str, d: int, dtype: torch.dtype) -> None:
    compare(backend, make(1, 20, heads=1, d=d, dv=d, dtype=dtype, rope="num"))
    compare(backend, make(1, 20, heads=1, d=d, dv=d, dtype=dtype, rope="num", causal=True))


@over_backends
@pytest.mark.parametrize("key_power", (0.5, 1.0, 2.0, 2.5, 4.0))
@pytest.mark.parametrize("mode", MODES)
def test_key_power(backend: str, key_power: float, mode: str) -> None:
    compare(backend, make(key_power=key_power, mode=mode))
    compare(backend, make(key_power=key_power, mode=mode, causal=True))


@over_backends
@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (3, 11), (70, 4)])
def test_queries_and_keys_of_different_numbers(backend: str, n: int, m: int) -> None:
    """No key: the state is read; no query: one is made."""
    compare(backend, make(2, n, m, state=True), states=True)
    if m:
        compare(backend, make(2, n, m, gate=True, learned=True), states=True)


@over_backends
@pytest.mark.parametrize("batch", (0, 1, 3))
@pytest.mark.parametrize("n", (0, 4))
@pytest.mark.parametrize("causal", (False, True))
def test_empty(backend: str, batch: int, n: int, causal: bool) -> None:
    compare(backend, make(batch, n, state=True, causal=causal), states=True)


@over_backends
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("lengths", [(5,), (3, 0, 7, 1), (17, 64, 2), (0, 0)])
@pytest.mark.parametrize("rope", (None, "num"))
def test_packed(backend: str, causal: bool, lengths: tuple[int, ...], rope: str | None) -> None:
    compare(backend, make(lengths=lengths, causal=causal, rope=rope, state=True, learned=True), states=True)
    compare(backend, make(lengths=lengths, causal=causal, rope=rope, gate=True, heads=2, kv_heads=1), states=True)


@over_backends
def test_golden(backend: str) -> None:
    """The released code's results, in float64 to 1e-9, in float32 within the oracle's bound (test_options)."""
    data = {name: torch.from_numpy(x) for name, x in np.load(GOLDEN).items()}
    dtype = backends.widest(OP, backend)
    device = backends.device_of(backend)
    limit = {"rtol": 0, "atol": oracle.GOLDEN} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-4}
    q, k, v = (data[n].to(device, dtype).requires_grad_() for n in "qkv")
    more = {"layout": "bhnd", "norm_eps": 0.0, "backend": backend}
    tables = tuple(data[n].to(device, dtype) for n in ("sin", "cos"))
    o = pyelastic.norm_linear_attention(q, k, v, rope="num", rope_tables=tables, **more)
    torch.testing.assert_close(o.cpu().double(), data["out"], **limit)
    o.backward(data["grad_out"].to(device, dtype))
    for name, x in zip("qkv", (q, k, v), strict=True):
        torch.testing.assert_close(x.grad.cpu().double(), data[f"grad_{name}"], **limit)
    made = pyelastic.norm_linear_attention(q, k, v, rope="num", rope_grid=(5, 6), **more)
    torch.testing.assert_close(made.cpu().double(), data["out"], **limit)
    plain = pyelastic.norm_linear_attention(q, k, v, **more)
    torch.testing.assert_close(plain.cpu().double(), data["out_without_rope"], **limit)


@over_backends
def test_modes_meet_as_alpha_grows(backend: str) -> None:
    """split is the limit of cos; at alpha = 20 they differ by some tenths of a per cent."""
    case = make(2, 40, d=16, dv=8, rope="num", dtype=backends.widest(OP, backend))
    wanted = call(backend, case)[0]["o"].double()
    distances = []
    for alpha in (5.0, 20.0, 1e6):
        o = call(backend, case.having(mode="cos", alpha=alpha))[0]["o"].double()
        distances.append(float(((o - wanted).norm() / wanted.norm()).detach()))
    assert distances[0] > 4 * distances[1] > 1e-4 and distances[2] < max(2e-4 * distances[1], 2e-6)


@over_backends
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rope", ROPES)
def test_last_causal_row_is_the_bidirectional_one(backend: str, mode: str, rope: str | None) -> None:
    case = make(2, 70, d=8, rope=rope, mode=mode)
    full, causal = (call(backend, case.having(causal=c))[0] for c in (False, True))
    torch.testing.assert_close(causal["o"][:, -1], full["o"][:, -1], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(causal["s"], full["s"], rtol=2e-5, atol=2e-5)
    assert not torch.allclose(causal["o"][:, 0], full["o"][:, 0], rtol=1e-2)


@over_backends
@pytest.mark.parametrize("rope", (None, "num", "both"))
def test_chained_states_are_one_pass(backend: str, rope: str | None) -> None:
    """Values, and gradients through the state, of three parts and of the whole."""
    case = make(2, 50, d=6, dtype=backends.widest(OP, backend), rope=rope, causal=True)
    upstream = upstream_of(case)["o"]
    whole, leaves = call(backend, case)
    device = whole["o"].device
    whole["o"].backward(upstream.to(device))
    parts = {n: leaves[n].detach().clone().requires_grad_() for n in "qkv"}
    state, outputs = None, []
    tables = None if case.tables is None else tuple(t.to(device) for t in case.tables)
    for span in (slice(0, 1), slice(1, 30), slice(30, None)):
        o, state = pyelastic.norm_linear_attention(
            *(parts[n][:, span] for n in "qkv"),
            causal=True,
            initial_state=state,
            output_final_state=True,
            rope=rope,
            rope_tables=tables,
            backend=backend,
        )
        outputs.append(o)
    made = torch.cat(outputs, 1)
    made.backward(upstream.to(device))
    limit = {"rtol": 1e-9, "atol": 1e-9} if made.dtype == torch.float64 else {"rtol": 2e-3, "atol": 2e-4}
    torch.testing.assert_close(made, whole["o"], **limit)
    assert state is not None and state.tokens.tolist() == [50, 50]
    torch.testing.assert_close(state.s, whole["s"], **limit)
    for n in "qkv":
        torch.testing.assert_close(parts[n].grad, leaves[n].grad, **limit)


@over_backends
@pytest.mark.parametrize("steps", ([1] * 6, [3, 1, 2], [6]))
@pytest.mark.parametrize("rope", (None, "num", "both"))
@pytest.mark.parametrize("gate", (False, True))
def test_decoding_is_the_causal_form(backend: str, steps: list[int], rope: str | None, gate: bool) -> None:
    case = make(2, 6, heads=4, kv_heads=2, dtype=backends.widest(OP, backend), rope=rope, gate=gate, causal=True)
    whole, leaves = call(backend, case)
    device = whole["o"].device
    state = empty_state(2, 2, 6, 5, device=device, double=whole["o"].dtype == torch.float64)
    pointers = [x.data_ptr() for x in state]
    tables = None if case.tables is None else tuple(t.to(device) for t in case.tables)
    outputs, at = [], 0
    for count in steps:
        q, k, v = (leaves[n][:, at : at + count] for n in "qkv")
        g = leaves["gate"][:, at : at + count] if gate else None
        o = pyelastic.norm_linear_attention_step(
            q, k, v, state, gate=g, rope=rope, rope_tables=tables, backend=backend
        )
        assert not o.requires_grad
        outputs.append(o)
        at += count
    limit = {"rtol": 1e-9, "atol": 1e-9} if whole["o"].dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.cat(outputs, 1), whole["o"].detach(), **limit)
    torch.testing.assert_close(state.s, whole["s"].detach(), **limit)
    torch.testing.assert_close(state.z, whole["z"].detach(), **limit)
    assert state.tokens.tolist() == [6, 6] and [x.data_ptr() for x in state] == pointers


# --- numerics -------------------------------------------------------------------------------------------------


@over_backends
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm_eps", (0.0, 1e-6))
def test_zero_queries_and_keys(backend: str, causal: bool, mode: str, norm_eps: float) -> None:
    """A zero query attends to nothing: o = 0, gradient 0, where the released code divides 0 by 0."""
    case = make(2, 20, mode=mode, causal=causal, norm_eps=norm_eps, learned=True)
    case.q[0, 3], case.k[1, 4], case.q[1, :, 0], case.k[0, :, 1] = 0, 0, 0, 0
    case.q[1, 7, 1, 2] = case.k[0, 5, 0, 3] = 0
    truth = compare(backend, case)
    assert not truth.value["o"][0, 3].any() and not truth.value["dq"][0, 3].any()
    assert all(x.isfinite().all() for x in truth.value.values())


@over_backends
def test_disjoint_supports(backend: str) -> None:
    """Queries and keys of opposite signs: nothing but eps is left of the denominator."""
    case = make(1, 12)
    case = case.having(q=case.q.abs(), k=-case.k.abs())
    truth = compare(backend, case)
    assert not truth.value["o"].any()


@over_backends
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("size", (50.0, 3e-3))
def test_large_and_small_keys(backend: str, dtype: torch.dtype, size: float) -> None:
    """|k|^3 beyond float16's range on both sides: 125,000 and 3e-8."""
    for causal in (False, True):
        case = make(1, 20, d=16, dv=8, dtype=dtype, causal=causal)
        case = case.having(k=(case.k.float().sign() * size * (0.9 + 0.1 * case.k.float().tanh())).to(dtype))
        if size < 1:
            case = case.having(eps=0.0)
        truth = compare(backend, case)
        assert truth.value["o"].isfinite().all() and truth.value["o"].abs().max() > 0.1


@over_backends
def test_short_queries(backend: str) -> None:
    """The exponent moves most for norms below 2.5; a direction is free of scale, down to norm_eps."""
    case = make(1, 30, d=8, learned=True)
    lengths = torch.logspace(-5, 1, 30)[None, :, None, None]
    compare(backend, case.having(q=torch.nn.functional.normalize(case.q, dim=-1) * lengths))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "cpu"])
def test_sum_of_100_000_tokens(backend: str) -> None:
    case = make(1, 100_000, heads=1, d=4, dv=2, causal=True)
    made = call(backend, case, need=())[0]
    last = call("eager", case.having(q=case.q[:, -1:].double(), k=case.k.double(), v=case.v.double(), causal=False))[
        0
    ]
    torch.testing.assert_close(made["o"][:, -1:].double(), last["o"].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made["z"].double(), last["z"].detach(), rtol=1e-5, atol=0)


@over_backends
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("where", ("q", "k", "v"))
def test_not_finite(backend: str, value: float, where: str) -> None:
    """A query's NaN stays in its row; a key's or a value's reaches every row that attends to it.

    Rows before it that share a tile may see it too, as a masked weight of 0 times NaN: so does softmax attention.
    """
    case = make(1, 20, heads=1, causal=True)
    getattr(case, where)[0, 12, 0, 1] = value
    o = call(backend, case, need=())[0]["o"]
    bad = ~o.isfinite().flatten(2).all(-1)[0].cpu()
    rows = torch.arange(20)
    assert torch.equal(bad, rows == 12) if where == "q" else bad[12:].all()
    full = call(backend, case.having(causal=False), need=())[0]["o"]
    bad = ~full.isfinite().flatten(2).all(-1)[0].cpu()
    assert torch.equal(bad, rows == 12) if where == "q" else bad.all()


@over_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dv", "causal"), [(6, False), (6, True), (8, True)])
def test_tolerance_proof(backend: str, dtype: torch.dtype, dv: int, causal: bool) -> None:
    """The bound that accepts this backend's result rejects every planted wrong one."""
    case = make(1, 33, heads=2, d=8, dv=dv, dtype=dtype, causal=causal, rope="num", learned=True, eps=1e-2, seed=2)
    # Towards what lam changes: else lam's gradient is a sum that cancels, of which 1 % says nothing.
    plain = reference(case, {}).value["o"]
    moved = reference(case.having(lam=case.lam + 1e-3), {}).value["o"] - plain
    noise = 0.3 * upstream_of(case)["o"].double()
    upstream = {"o": (moved / moved.square().mean().sqrt() + noise).to(dtype)}
    truth = reference(case, upstream)
    made, leaves = call(backend, case)
    made["o"].backward(upstream["o"].to(made["o"].device))
    wrong: dict[str, Case] = {
        "no rope": case.having(rope=None, tables=None),
        "rope in both": case.having(rope="both"),
        "eps dropped": case.having(eps=0.0),
        "eps as a sum": case.having(eps_mode="sum"),
        "the other mask": case.having(causal=not causal),
        "tau of another head": case.having(lam=case.lam.flip(0)),
        "key power": case.having(key_power=2.9),
    }
    others = {name: reference(other, upstream) for name, other in wrong.items()}
    killed = oracle.prove(
        made["o"].detach(),
        truth.value["o"],
        name="o",
        also={n: t.value["o"] for n, t in others.items()},
        **grade(backend, case, truth, "o"),
    )
    # Of features stored in bfloat16 the bound adds up what every one may be off: for q and lam, 8 to 20 %.
    names = ("k", "v") if stored(backend, case) else ("q", "k", "v", "lam")
    for name in names:
        also = {n: t.value[f"d{name}"] for n, t in others.items() if n != "eps as a sum" or name != "lam"}
        told = grade(backend, case, truth, f"d{name}")
        killed += oracle.prove(leaves[name].grad, truth.value[f"d{name}"], name=name, also=also, **told)
    assert killed >= (1 + len(names)) * 12


def test_cpu_and_eager_are_here() -> None:
    """A generated parametrization that lost a backend would pass silently."""
    assert {"eager", "cpu"} <= set(BACKENDS)
