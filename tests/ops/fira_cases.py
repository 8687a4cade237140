"""What the tests of fira share: problems, the float64 truth with its error bound, and a run of one step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import backends
import oracle
import pytest
import torch
from torch import Tensor

import pyelastic
from pyelastic.eager import fira as eager
from pyelastic.ops.fira import MODES, FiraState

BACKENDS = backends.implemented("fira")
KERNELS = [name for name in BACKENDS if name != "eager"]
over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_kernels = pytest.mark.parametrize("backend", KERNELS)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)


@dataclass
class Problem:
    """One matrix, its gradient, and a state that has seen `seen` steps."""

    w: Tensor
    g: Tensor
    state: FiraState
    left: bool
    options: dict[str, Any] = field(default_factory=dict)

    def clone(self, dtype: torch.dtype | None = None, device: Any = None) -> Problem:
        """A copy; `dtype` casts everything but codes and counts (float64 is the truth's)."""

        def move(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(move(y) for y in x)
            if not isinstance(x, Tensor):
                return x
            cast = dtype is not None and x.is_floating_point() and x.dtype != torch.int8
            return x.detach().clone().to(device=device, dtype=dtype if cast else x.dtype)

        options = {
            k: v.to(device) if isinstance(v, Tensor) and device is not None else v for k, v in self.options.items()
        }
        state = FiraState(*(move(x) for x in self.state))
        return Problem(move(self.w), move(self.g), state, self.left, options)


def orthonormal(d: int, r: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64))[0]


def problem(
    m: int, n: int, rank: int, left: bool, dtype: torch.dtype = torch.float32, *, seed: int = 0, seen: int = 5,
    state_dtype: torch.dtype = torch.float32, captured: float = 0.6, gram: bool = False, compensated: bool = False,
    **options: Any,
) -> Problem:  # fmt: skip
    """A gradient of which the subspace holds about `captured` of the energy, and moments of earlier gradients."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    vectors, d = (n, m) if left else (m, n)
    p = orthonormal(d, rank, seed + 1)
    rms = (d / rank) ** 0.5
    x = randn(vectors, rank) @ p.T * rms * captured**0.5 + randn(vectors, d) * (1 - captured) ** 0.5
    w, g = randn(m, n), (x.T if left else x)
    projector = (p if left else p.T).to(dtype).contiguous()
    matrix = projector.double() if left else projector.double().T
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    state = pyelastic.fira_state(
        w.to(dtype), projector, left=left, state_dtype=state_dtype, compensated=compensated,
        gram=(matrix.T @ matrix).to(exact) if gram else None,
    )  # fmt: skip
    if seen:
        earlier = randn(vectors, rank) * rms * 0.7
        mean, square = earlier * 0.3, earlier.square() * 0.01 + 0.001
        if state.moment_scales is not None:
            for target, scale, value, signed in (
                (state.exp_avg, state.moment_scales[0], mean, True),
                (state.exp_avg_sq, state.moment_scales[1], square, False),
            ):
                code, s = eager.quantize(value.float(), signed=signed)
                target.copy_(code.T if left else code)
                scale.copy_(s)
        else:
            state.exp_avg.copy_(mean.T if left else mean)
            state.exp_avg_sq.copy_(square.T if left else square)
        state.step.fill_(seen)
        state.limiter_norm.fill_(float(x.norm()) * 0.5)  # lets the limiter act
    return Problem(w.to(dtype), g.to(dtype).contiguous(), state, left, options)


def run(backend: str, *problems: Problem, **options: Any) -> None:
    """One step in place. The problems' own options must agree."""
    common = {"lr": 0.5, "alpha": 0.25, "weight_decay": 0.1, **problems[0].options, **options}
    pyelastic.fira(
        [p.w for p in problems], [p.g for p in problems], [p.state for p in problems],
        left=[p.left for p in problems], backend=backend, **common,
    )  # fmt: skip


def truth(given: Problem, half: bool = False) -> tuple[Problem, Tensor, int]:
    """After a step in float64 by the textbook form; A of W, the sum of absolute products; K of the longest sum.

    ``half``: R and C enter the GEMMs rounded to 16 bits. Their roundings are independent, so C P^T errs by the root of
    the sum of squares of its products, of which A takes three: 5 standard deviations of a uniform error; and K is 1.
    """
    exact = given.clone(torch.float64)
    if exact.state.moment_scales is not None:
        exact = dequantized(exact)
    options = {"lr": 0.5, "alpha": 0.25, "weight_decay": 0.1, "gamma": 1.01, "betas": (0.9, 0.999), "eps": 1e-6}
    options |= given.options
    before = exact.clone()
    run("eager", exact, stochastic=False)
    a_r, a_n, a_s = MODES[options.get("mode", "official")](options["alpha"])
    left = given.left
    p = exact.state.projector if left else exact.state.projector.mT
    m, v = ((x.mT if left else x) for x in (exact.state.exp_avg, exact.state.exp_avg_sq))
    x = before.g.mT if left else before.g
    step = float(exact.state.step)
    c = (1 - options["betas"][1] ** step) ** 0.5 / (1 - options["betas"][0] ** step)
    n = (m / (v.sqrt() + options["eps"])).abs()
    factor = abs(float(options["grad_factor"])) if options.get("grad_factor") is not None else 1.0
    # phi over lim is at most phi, whose error is that of |N| and |R|: relative, a few roundings.
    r = (x @ p) * factor
    phi = n.norm(dim=1, keepdim=True) / (r.norm(dim=1, keepdim=True) + 1e-8)
    if options.get("per_matrix"):
        phi = torch.full_like(phi, float(n.norm() / (r.norm() + 1e-8)))
    # R's own error, sqrt(d) u |x| |p|, passes through N's derivative; N and R enter C.
    spread = r.abs() if half else (x.abs() * factor) @ p.abs()
    slope = (0.1 * spread) / (v.sqrt() + options["eps"]) + n * 0.001 * spread * r.abs() / (v + 1e-30)
    if half:
        rounded = (a_n * (n + slope)).square() + (a_s * phi * a_r * r).square()
        size = 3 * (rounded @ p.square().mT).sqrt()
    else:
        size = a_n * (n + slope) @ p.abs().mT + a_s * phi * (x.abs() * factor + a_r * spread @ p.abs().mT)
    A = options["lr"] * c * size
    A = (A.mT if left else A) + (exact.w - before.w).abs() + (0 if half else before.w.abs())
    return exact, A, 1 if half else max(given.w.shape)


def dequantized(given: Problem) -> Problem:
    """The same problem with moments as numbers."""
    scales = given.state.moment_scales
    assert scales is not None
    values = []
    for code, scale in ((given.state.exp_avg, scales[0]), (given.state.exp_avg_sq, scales[1])):
        moment = eager.dequantize(code.mT if given.left else code, scale.double())
        values.append((moment.mT if given.left else moment).contiguous())
    state = given.state._replace(exp_avg=values[0], exp_avg_sq=values[1], moment_scales=None)
    return replace(given, state=state)


def accuracy(backend: str, dtype: torch.dtype) -> dict[str, Any]:
    """How a result of this backend is graded: 16-bit GEMM operands where it has them."""
    half = dtype == torch.bfloat16 and backend == "cpu"
    half = half or (dtype in HALF and backend in ("cuda", "triton"))
    return {"acc": torch.bfloat16 if half else oracle.accumulator(dtype), "half": half}
