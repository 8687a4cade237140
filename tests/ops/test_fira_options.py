"""fira: options, storage of state, layouts, errors, and the raw op under torch.compile and opcheck.

What each parametrization covers: `options` every switch of the step; `kind` every memory layout; `state_dtype` every
storage of moments.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import backends
import oracle
import pytest
import torch
from fira_cases import Problem, accuracy, dequantized, over_backends, over_kernels, problem, run, truth
from layouts import KINDS, lay

import pyelastic
from pyelastic.eager import fira as eager
from pyelastic.ops import _fira_matrix
from pyelastic.ops import _fira_triton as triton_launcher
from pyelastic.ops import fira as ops

OPTIONS: list[dict[str, Any]] = [
    {"gamma": None}, {"correct_bias": False}, {"maximize": True}, {"per_matrix": True, "mode": "apollo"},
    {"betas": (0.5, 0.9), "eps": 1e-3}, {"weight_decay": 0.0}, {"grad_factor": torch.tensor(0.125)}, {"alpha": 1.0},
    {"grad_factor": torch.tensor(3.0), "maximize": True, "mode": "paper"}, {"found_inf": torch.tensor(0.0)},
    {"collapse": True}, {"lr": torch.tensor(0.25)}, {"per_matrix": True, "mode": "paper"},
]  # fmt: skip


def check(backend: str, given: Problem, got: Problem) -> None:
    how = accuracy(backend, given.w.dtype)
    exact, A, K = truth(given, how["half"])
    tolerance = "half operands" if how["half"] else oracle.DEFAULT
    oracle.check(got.w.cpu(), exact.w, A=A, K=K, acc=how["acc"], tolerance=tolerance, name="W")


@over_backends
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(backend: str, left: bool, options: dict[str, Any]) -> None:
    given = problem(33, 47, 6, left, gram=True, **options)
    got = given.clone(device=backends.device_of(backend))
    run(backend, got)
    check(backend, given, got)


@over_backends
@pytest.mark.parametrize("left", [False, True])
def test_found_inf_changes_no_bit(backend: str, left: bool) -> None:
    given = problem(33, 47, 6, left, found_inf=torch.tensor(1.0))
    given.g[2, 3] = float("inf")
    got = given.clone(device=backends.device_of(backend))
    run(backend, got)
    assert torch.equal(got.w.cpu(), given.w)
    for name in ("exp_avg", "exp_avg_sq", "step", "limiter_norm"):
        assert torch.equal(getattr(got.state, name).cpu(), getattr(given.state, name)), name


@over_backends
@pytest.mark.parametrize("left", [False, True])
def test_first_step_and_zero_gradient(backend: str, left: bool) -> None:
    given = problem(33, 47, 6, left, seen=0)
    got = given.clone(device=backends.device_of(backend))
    run(backend, got)
    exact, _, _ = truth(given)
    assert float(got.state.limiter_norm) == pytest.approx(float(exact.state.limiter_norm), rel=1e-5)
    check(backend, given, got)
    norm = float(got.state.limiter_norm)
    got.g.zero_()
    run(backend, got)
    assert float(got.state.limiter_norm) == norm and got.w.isfinite().all()
    run(backend, got, collapse=True)
    assert float(got.state.limiter_norm) == 0.0


@over_backends
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(backend: str, bad: float) -> None:
    """In its own vector; elsewhere through the limiter's norm, as in the formula."""
    given = problem(33, 47, 6, False)
    given.g[5, 7] = bad
    got = given.clone(device=backends.device_of(backend))
    run(backend, got)
    assert not got.w[5].isfinite().any()
    assert not bool(got.state.limiter_norm.isfinite())


@over_backends
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts(backend: str, left: bool, dtype: torch.dtype, kind: str) -> None:
    """Of gradients and of weights, whose padding must stay as it was."""
    given = problem(21, 35, 5, left, dtype)
    given.g = lay(given.g, kind)
    device = backends.device_of(backend)
    got = given.clone(device=device)
    got.g = lay(given.g.to(device), kind)
    if kind != "expanded":  # an expanded weight cannot be written
        got.w = lay(given.w.to(device), kind)
    before = got.g.clone()
    run(backend, got)
    check(backend, given, got)
    assert torch.equal(got.g, before)


@over_backends
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("dtype", "state_dtype"), [
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.int8),
    (torch.bfloat16, torch.int8), (torch.float16, torch.bfloat16), (torch.float16, torch.int8),
])  # fmt: skip
@pytest.mark.parametrize("rank", [30, 32])
def test_small_moments(backend: str, left: bool, dtype: torch.dtype, state_dtype: torch.dtype, rank: int) -> None:
    """Against eager on the same stored moments: they round alike but where R differs in the last bits.

    ``rank``: 32 is one of CUDA's matrix units, and of what Triton knows to be aligned.
    """
    m, n = (48, 160) if left else (160, 48)
    given = problem(m, n, rank, left, dtype, state_dtype=state_dtype)
    half = accuracy(backend, dtype)["half"]
    want = given.clone()
    run("eager", want)
    got = given.clone(device=backends.device_of(backend))
    run(backend, got)
    got = got.clone(device="cpu")
    if state_dtype == torch.int8:
        codes = (got.state.exp_avg.int() - want.state.exp_avg.int()).abs()
        if not half:  # a rounded R moves codes near zero, where they lie dense
            assert int(codes.max()) <= 1 and float((codes > 0).float().mean()) < 0.02
        got, want = dequantized(got), dequantized(want)
    # R of 16-bit operands is rounded itself, as finely as moments in bfloat16 are.
    unit = {torch.int8: 2.0**-6, torch.bfloat16: 2.0**-7}[state_dtype] * (2 if half else 1)
    for name in ("exp_avg", "exp_avg_sq"):
        a, b = (getattr(x.state, name).double() for x in (got, want))
        assert float((a - b).norm() / b.norm()) < unit / 8, name
    assert float((got.w.double() - want.w.double()).norm() / (want.w - given.w).double().norm()) < unit


@over_backends
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("rank", "seen"), [(128, 5), (130, 5), (300, 0)])
@pytest.mark.parametrize("mode", ["official", "paper"])
def test_blocks_of_8_bit_moments(backend: str, left: bool, rank: int, seen: int, mode: str) -> None:
    """Several blocks a vector, the last of them short; from nothing, too: all codes zero, all scales zero."""
    m, n = (310, 37) if left else (37, 310)
    given = problem(m, n, rank, left, state_dtype=torch.int8, seen=seen, mode=mode, gram=rank == 130)
    want, got = given.clone(), given.clone(device=backends.device_of(backend))
    run("eager", want)
    run(backend, got)
    got = got.clone(device="cpu")
    assert got.state.moment_scales is not None and want.state.moment_scales is not None
    for a, b in zip(got.state.moment_scales, want.state.moment_scales, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    for name in ("exp_avg", "exp_avg_sq"):
        off = (getattr(got.state, name).int() - getattr(want.state, name).int()).abs()
        assert int(off.max()) <= 1 and float((off > 0).float().mean()) < 0.02, name
    moved = (want.w - given.w).double().norm()
    assert float((got.w.double() - want.w.double()).norm() / moved) < 2.0**-6
    assert float(got.state.limiter_norm) == pytest.approx(float(want.state.limiter_norm), rel=2e-3)


@over_backends
@pytest.mark.parametrize("left", [False, True])
def test_8_bit_moments_that_are_not_finite_show(backend: str, left: bool) -> None:
    """In the scales of their own block: the codes of a block cannot say it."""
    m, n = (180, 20) if left else (20, 180)
    given = problem(m, n, 140, left, state_dtype=torch.int8)
    given.g[(7, 3) if left else (3, 7)] = float("nan")
    got = given.clone(device=backends.device_of(backend))
    run(backend, got)
    assert got.state.moment_scales is not None
    for scale in got.state.moment_scales:
        bad = ~scale.cpu().isfinite()
        assert bad[3].all() and int(bad.sum()) == 2
    skipped = given.clone(device=backends.device_of(backend))
    run(backend, skipped, found_inf=torch.tensor(1.0, device=skipped.w.device))
    assert skipped.state.moment_scales is not None and given.state.moment_scales is not None
    kept, before = ((*s[:2], *(s.moment_scales or ())) for s in (skipped.state, given.state))
    for a, b in zip(kept, before, strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("signed", [True, False])
def test_quantization(signed: bool) -> None:
    """The error against the value and against its block; zero stays zero, what is positive stays positive."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 300, generator=generator) * torch.logspace(-8, 8, 20)[:, None]
    x = x if signed else x.square()
    code, scale = eager.quantize(x, signed=signed)
    assert code.dtype == (torch.int8 if signed else torch.uint8) and scale.shape == (20, 3)
    y = eager.dequantize(code, scale)
    largest = scale.repeat_interleave(eager.BLOCK, 1)[:, :300]
    ratio = x.abs() / largest
    if signed:  # sqrt companding: half a code is sqrt(a |x|) / 127
        assert bool(((x - y).abs() <= (torch.sqrt(ratio) / 127 + 1 / 127**2) * largest * 1.01).all())
    else:
        assert bool(((x - y).abs() <= (2 * ratio.pow(0.75) / 255 + 3 * ratio.sqrt() / 255**2 + 1e-9) * largest).all())
        assert bool((y[x > 0] > 0).all())
    zero = eager.quantize(torch.zeros(2, 5), signed=signed)
    assert not eager.dequantize(*zero).any()


@over_backends
def test_stochastic_rounding(backend: str) -> None:
    """One of the two neighbours, with the mean of the exact value; the same bits in every backend for the same seed."""
    given = problem(24, 32, 8, False, torch.bfloat16, stochastic=True, lr=1e-3)
    exact, _, _ = truth(given)
    total = torch.zeros(24, 32, dtype=torch.float64)
    draws = 100
    first: dict[int, torch.Tensor] = {}
    for seed in range(draws):
        got = given.clone(device=backends.device_of(backend))
        run(backend, got, seeds=[seed])
        total += got.w.cpu().double()
        first[seed] = got.w.cpu()
    ulp = 2.0 ** (torch.floor(torch.log2(exact.w.abs())) - 7)
    assert float(((first[0].double() - exact.w).abs() / ulp).max()) < 1.001 + 0.01
    assert not torch.equal(first[0], first[1])
    mean_error = (total / draws - exact.w) / ulp
    # Near zero an ulp is smaller than what 16-bit operands of the GEMMs leave of the step.
    assert float(mean_error[exact.w.abs() > 0.1].abs().max()) < 5 * 0.5 / draws**0.5
    other = given.clone()
    run("eager", other, seeds=[0])
    assert float((first[0] != other.w).float().mean()) < 0.01  # the exact values differ in float32's last bits


def test_the_noise_is_uniform_and_independent_of_the_grid() -> None:
    bits = eager.noise(5, torch.tensor(3.0), 1 << 16).double() / 65536
    assert float(bits.mean()) == pytest.approx(0.5, abs=0.005) and float(bits.var()) == pytest.approx(1 / 12, rel=0.02)
    shifted = torch.corrcoef(torch.stack((bits[:-1], bits[1:])))
    assert abs(float(shifted[0, 1])) < 0.02
    assert not torch.equal(eager.noise(5, torch.tensor(4.0), 64), eager.noise(5, torch.tensor(3.0), 64))
    assert not torch.equal(eager.noise(5 + (1 << 32), torch.tensor(3.0), 64), eager.noise(5, torch.tensor(3.0), 64))


@over_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compensated_weights_carry_what_rounding_cut(backend: str, dtype: torch.dtype) -> None:
    given = problem(40, 56, 8, False, dtype, compensated=True, lr=1e-3)
    got = given.clone(device=backends.device_of(backend))
    exact, _, _ = truth(given, half=True)
    run(backend, got)
    assert got.state.remainder is not None and got.state.remainder.any()
    whole = got.w.double() + got.state.remainder.double()
    error = (whole.cpu() - exact.w).abs()
    assert float(error.max()) < 2.0**-15 * 4  # 16 bits of mantissa at |w| < 4, where 8 or 11 are stored
    assert float((got.w.cpu().double() - exact.w).abs().max()) > float(error.max()) * 4


@over_backends
def test_many_matrices_are_each_stepped_alone(backend: str) -> None:
    """Grouped: shapes, sides and ranks in any mix, an empty one among them, give the bits of one call each."""
    specs = [(40, 24, 6, False), (17, 70, 3, True), (5, 5, 5, False), (0, 8, 2, False), (130, 33, 9, False)]
    specs += [(48, 80, 16, True), (96, 32, 16, False), (32, 32, 16, False)]
    group = [problem(m, n, min(r, max(m, n)), left, seed=i) for i, (m, n, r, left) in enumerate(specs)]
    device = backends.device_of(backend)
    together, alone = ([p.clone(device=device) for p in group] for _ in range(2))
    run(backend, *together)
    for p in alone:
        run(backend, p)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.w, b.w) and torch.equal(a.state.exp_avg, b.state.exp_avg)
        assert float(a.state.step) == float(b.state.step) == 6


@over_backends
def test_more_matrices_than_one_launch_takes(backend: str) -> None:
    """16 on cuda, 64 on triton."""
    group = [problem(6, 4, 2, bool(i % 3), seed=i, alpha=1.0, gram=i % 2 == 0) for i in range(150)]
    together = [p.clone(device=backends.device_of(backend)) for p in group]
    run(backend, *together)
    for i in (0, 1, 63, 64, 100, 149):
        alone = group[i].clone(device=backends.device_of(backend))
        run(backend, alone)
        assert torch.equal(alone.w, together[i].w) and torch.equal(alone.state.exp_avg, together[i].state.exp_avg)


@pytest.mark.skipif(not backends.INTERPRETED, reason="counts what the interpreter launches")
@pytest.mark.parametrize(("alpha", "count"), [(0.25, 8), (1.0, 12)])
def test_triton_launches_a_group_at_once(alpha: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve matrices of two sides: four launches a side, six near a_r = 1."""
    from triton.runtime import interpreter

    launches = []
    call = interpreter.GridExecutor.__call__

    def counted(self: Any, *arguments: Any, **options: Any) -> None:
        launches.append(self.fn.__name__)
        call(self, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    run("triton", *(problem(8, 8, 4, bool(i % 2), seed=i) for i in range(12)), alpha=alpha)
    assert len(launches) == count, launches


@pytest.mark.skipif(not backends.INTERPRETED, reason="looks into the launcher")
@pytest.mark.parametrize("left", [False, True])
def test_triton_vouches_for_no_alignment_that_is_not_there(left: bool) -> None:
    """One size, stride or address off, and the matrix is not among the aligned; the interpreter checks the hints."""
    m, n = (48, 64) if left else (64, 48)
    for change, aligned in (("", True), ("rank", False), ("size", False), ("stride", False), ("address", False)):
        given = problem(m + (change == "size"), n, 16 + (change == "rank"), left)
        if change == "stride":
            given.g = torch.cat([given.g, given.g[:, :1]], 1)[:, :n]
        if change == "address":
            given.g = torch.cat([given.g.flatten(), given.g.new_zeros(1)])[1:].view_as(given.g)
        s = given.state
        state = [s.exp_avg, s.exp_avg_sq]
        made = _fira_matrix.Matrix(given.w, given.g, s.projector, state, None, s.limiter_norm, s.step, left, 0)
        assert triton_launcher._is_aligned(made) == aligned, change
        got = given.clone()
        got.g = given.g
        run("triton", got)
        check("triton", given, got)


@pytest.mark.parametrize("backend", [name for name in ("cuda", "triton") if name in backends.implemented("fira")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_matrices_do_not_share_a_launch(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scratch is bounded: five matrices in groups of 2, 2 and 1 give the bits of one group."""
    spied, empty = [], torch.empty

    def spy(*shape: Any, **how: Any) -> torch.Tensor:
        if isinstance(shape[0], int):
            spied.append(4 * shape[0])
        return empty(*shape, **how)

    def step() -> list[Problem]:
        got = [problem(48, 64, 16, False, dtype, seed=i).clone(device=backends.device_of(backend)) for i in range(5)]
        spied.clear()
        with mock.patch.object(torch, "empty", spy):
            run(backend, *got)
        return got

    together = step()
    assert len(spied) == 1
    one = spied[0] // 5
    monkeypatch.setattr(_fira_matrix, "SCRATCH_BYTES", 3 * one - 1)
    apart = step()
    assert spied == [2 * one, 2 * one, one]
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a.w, b.w) and torch.equal(a.state.exp_avg, b.state.exp_avg)


@over_kernels
@pytest.mark.parametrize("left", [False, True])
def test_repeated_calls_are_bitwise_equal(backend: str, left: bool, restore_threads: None) -> None:
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        got = problem(150, 90, 12, left).clone(device=backends.device_of(backend))
        run(backend, got)
        results.append(got.w)
    assert torch.equal(results[0], results[2])
    # Another number of threads: only the BLAS may differ, at the level of its rounding.
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def arguments(given: Problem) -> tuple[Any, ...]:
    s = given.state
    return (
        [given.w], [given.g], [s.exp_avg], [s.exp_avg_sq], [], [s.projector], [], [s.limiter_norm], [s.step], [],
        torch.tensor(0.1, dtype=torch.float64, device=given.w.device), None, None, [given.left], [0], 0.9, 0.999, 1e-6,
        0.1, 1.01, 0.25, 0.25, 1.0, 2,
    )  # fmt: skip


@over_kernels
def test_opcheck(backend: str) -> None:
    given = problem(24, 20, 4, False).clone(device=backends.device_of(backend))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(ops._OPS[backend], arguments(given), test_utils=tests)


@over_kernels
def test_compiled_without_graph_breaks(backend: str) -> None:
    given = problem(24, 20, 4, False).clone(device=backends.device_of(backend))
    plain = given.clone()

    def step(w: torch.Tensor, g: torch.Tensor, state: Any) -> None:
        pyelastic.fira([w], [g], [state], left=[False], lr=0.1, alpha=0.25, backend=backend)

    torch.compile(step, fullgraph=True, backend="aot_eager")(given.w, given.g, given.state)
    step(plain.w, plain.g, plain.state)
    assert torch.equal(given.w, plain.w) and torch.equal(given.state.exp_avg, plain.state.exp_avg)
    assert float(given.state.step) == 6


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"grads": []}, ValueError, "grads has 0 entries; expected 1, one per parameter"),
    ({"left": [True]}, ValueError, r"states\[0\].projector is \[4, 20\]; expected \[24, 20\], left=True of"),
    ({"grads": [torch.zeros(24, 21)]}, ValueError, r"grads\[0\] is \[24, 21\]; expected \[24, 20\]"),
    ({"grads": [torch.zeros(24, 20, dtype=torch.float16)]}, TypeError, r"grads\[0\] is torch.float16, params\[0\] is"),
    ({"grads": [torch.zeros(24, 20).to_sparse()]}, TypeError, r"grads\[0\] is sparse; expected a dense gradient"),
    ({"mode": "adam"}, ValueError, "mode is 'adam'; choose from official, paper, galore, apollo"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1.0; expected 0 <= beta < 1"),
    ({"lr": -0.1}, ValueError, "lr is -0.1; expected a non-negative number"),
    ({"lr": torch.zeros(2)}, ValueError, r"lr is \[2\]; expected one number"),
    ({"stochastic": True}, TypeError, r"stochastic=True rounds bfloat16 weights; params\[0\] is torch.float32"),
    ({"backend": "cud"}, ValueError, "unknown backend 'cud'; choose from"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = problem(24, 20, 4, False)
    good = {"params": [given.w], "grads": [given.g], "states": [given.state], "left": [False], "lr": 0.1}
    with pytest.raises(error, match=message):
        pyelastic.fira(**(good | change))


def test_errors_of_state() -> None:
    given = problem(24, 20, 4, False)
    for field, value, message in (
        ("exp_avg", torch.zeros(24, 5), r"states\[0\].exp_avg is \[24, 5\]; expected \[24, 4\], rank 4"),
        ("gram", torch.zeros(3, 3), r"states\[0\].gram is \[3, 3\]; expected \[4, 4\]"),
        ("exp_avg", torch.zeros(24, 4, dtype=torch.int8), "8-bit moments and no moment_scales"),
    ):
        state = given.state._replace(**{field: value})
        with pytest.raises(ValueError, match=message):
            pyelastic.fira([given.w], [given.g], [state], left=[False], lr=0.1)
    pyelastic.fira([], [], [], left=[], lr=0.1)
