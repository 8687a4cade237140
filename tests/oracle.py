"""The one function that decides whether a result is right, and the proof that it can say no.

Truth is float64 on the same rounded inputs. A result passes when, per element,

    |out - ref| <= c_out u(out) |ref|  +  c_acc u(acc) sqrt(K) A

where u is the unit roundoff, K the reduction length and A the sum of absolute products behind that
element, computed in float64 by the test; when the RMS error is at most a quarter of the RMS bound
(a bias hides below a per-element bound, but not below this); and when the same elements are finite.
Of the rounding term the RMS may use three quarters: one honest rounding to bfloat16 already has an
RMS of 0.43 u |ref|, which no quarter can hold, and a few large elements may dominate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Factors of the bound; no test carries numbers of its own."""

    c_out: float = 1.0  # one final rounding to the output's dtype
    c_acc: float = 4.0  # random-walk error of a sum, four standard deviations
    rms: float = 0.25
    rms_out: float = 0.75  # the share of the rounding term; measured: 0.43 on a random product
    rms_from: int = 16  # elements from which an RMS says more than its largest term
    eager: float = 2.0  # on a GPU, also against what eager makes in the same dtype
    coarse: float = 1.0  # factor of the mutants that are a little off, in bfloat16


# The only table. An exception is keyed by name and says in a comment what was measured.
DEFAULT = "default"
TOLERANCES: dict[str, Tolerance] = {
    DEFAULT: Tolerance(),
    # Operands of a GEMM rounded to float16, sums in float32: the error is that of rounding unit vectors, which the
    # length of the sum does not raise (K = 1).
    "half operands": Tolerance(c_acc=1.0),
    # The same where a few terms outweigh the rest, as cubes of keys do: such a sum errs like its largest rounding, of
    # which an RMS of 0.43 of the bound is honest, as of the last one. A is a running error (running_error.py).
    # Where three bfloat16 operands and the result are rounded, an element may be 3 % off and right.
    "stored operands": Tolerance(c_acc=1.0, rms=0.75, coarse=8.0),
}

# Absolute error allowed against files written by the papers' own code in float64.
GOLDEN = 1e-9


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff: half the gap between 1 and the next number."""
    return torch.finfo(dtype).eps / 2


def _floor(dtype: torch.dtype) -> float:
    """What rounding near zero may cost, where relative error means nothing.

    float16 has subnormals exactly where gradients live, so there only the last one counts; for the
    wider exponents a flush to zero below the smallest normal is allowed.
    """
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps if dtype == torch.float16 else info.smallest_normal


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype our kernels accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bounds(
    ref: Tensor, A: Tensor, K: int, dtype: torch.dtype, acc: torch.dtype, tolerance: Tolerance
) -> tuple[Tensor, Tensor]:
    """The two terms of the bound: final rounding (with the floor) and summing."""
    rounding = tolerance.c_out * unit(dtype) * ref.abs() + _floor(dtype)
    return rounding, tolerance.c_acc * unit(acc) * math.sqrt(max(K, 1)) * A


def _worst(err: Tensor, bound: Tensor, out: Tensor, ref: Tensor) -> str:
    ratio = (err / bound).nan_to_num(nan=math.inf, posinf=math.inf)
    flat = int(ratio.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), ratio.shape))
    return (
        f"worst at {at}: out {float(out[at])!r}, ref {float(ref[at])!r}, "
        f"error {float(err[at]):.3e}, bound {float(bound[at]):.3e}"
    )


def check(
    out: Tensor,
    ref: Tensor,
    *,
    A: Tensor,
    K: int,
    dtype: torch.dtype | None = None,
    acc: torch.dtype | None = None,
    eager: Tensor | None = None,
    name: str = "result",
    tolerance: str = DEFAULT,
) -> float:
    """Raise AssertionError unless `out` is `ref` up to the bound; return the share of it used.

    out: the result in its own dtype, on any device. ref, A: float64 on the CPU, A >= 0.
    dtype: what out's dtype must be (default: any). acc: accumulator, default that of our kernels.
    eager: what eager made in the same dtype; the error may then be at most twice eager's, plus two
    roundings of the largest value (without that floor a lucky eager fails correct kernels).
    """
    assert ref.dtype == torch.float64 and A.dtype == torch.float64, f"{name}: truth is float64"
    assert out.shape == ref.shape, f"{name}: shape {tuple(out.shape)}, want {tuple(ref.shape)}"
    assert dtype is None or out.dtype == dtype, f"{name}: dtype {out.dtype}, want {dtype}"
    factors = TOLERANCES[tolerance]
    got = out.detach().to("cpu", torch.float64)
    finite = ref.isfinite()
    if not torch.equal(got.isfinite(), finite):
        wrong = (got.isfinite() != finite).nonzero()[0].tolist()
        at = tuple(wrong)
        raise AssertionError(f"{name}: at {at} out is {float(got[at])}, ref {float(ref[at])}")
    if not finite.any():
        return 0.0
    err = torch.where(finite, (got - ref).abs(), 0.0)
    terms = bounds(ref, A, K, out.dtype, acc or accumulator(out.dtype), factors)
    rounding, summing = (torch.where(finite, term, 0.5) for term in terms)
    bound = rounding + summing
    where = _worst(err, bound, got, ref)
    assert bool((err <= bound).all()), f"{name}: error above the bound; {where}"
    limit = factors.rms_out * rounding + factors.rms * summing
    rms, allowed = (float(x[finite].square().mean().sqrt()) for x in (err, limit))
    assert int(finite.sum()) < factors.rms_from or rms <= allowed, (
        f"{name}: RMS error {rms:.3e}, allowed {allowed:.3e}; {where}"
    )
    if eager is not None:
        eager_err = (eager.detach().to("cpu", torch.float64) - ref)[finite].abs().max()
        floor = 2 * unit(out.dtype) * ref[finite].abs().max()
        assert bool(err.max() <= factors.eager * eager_err + floor), (
            f"{name}: error {float(err.max()):.3e}, eager's {float(eager_err):.3e}; {where}"
        )
    return float((err / bound).max())


def mutants(right: Tensor, coarse: float = 1.0) -> dict[str, Tensor]:
    """Wrong answers that look like `right`: what real kernel bugs make of it. coarse: 1 for 1 % and 0.5 %."""
    flat = right.flatten()
    peak = int(flat.abs().argmax())

    def at_peak(value: Tensor | float) -> Tensor:
        wrong = flat.clone()
        wrong[peak] = value
        return wrong.view(right.shape)

    made = {
        "all zeros": torch.zeros_like(right),
        "one element 1 % off": at_peak(flat[peak] * (1 + 0.01 * coarse)),
        "scaled by 1.005": right * (1 + 0.005 * coarse),
        "sign flipped": -right,
        "NaN in one element": at_peak(math.nan),
    }
    if right.ndim and right.shape[0] > 1:
        row = int(right.reshape(right.shape[0], -1).abs().sum(1).argmax())
        made["one row zero"] = right.clone()
        made["one row zero"][row] = 0
        made["rows rotated"] = right.roll(1, 0)
    if right.ndim == 2 and min(right.shape) > 1:
        made["transposed"] = right.mT.reshape(right.shape).clone()
        made["last tile skipped"] = right.clone()
        made["last tile skipped"][:, -max(1, right.shape[1] // 4) :] = 0
    return made


def prove(
    right: Tensor,
    ref: Tensor,
    *,
    A: Tensor,
    K: int,
    acc: torch.dtype | None = None,
    tolerance: str = DEFAULT,
    name: str = "result",
    also: Mapping[str, Tensor] | None = None,
) -> int:
    """Tolerance proof: `check` accepts `right` and rejects every mutant. Return how many."""
    check(right, ref, A=A, K=K, acc=acc, tolerance=tolerance, name=name)
    coarse = TOLERANCES[tolerance].coarse if acc == torch.bfloat16 else 1.0
    wrong = mutants(right, coarse) | dict(also or {})
    for mutant, value in wrong.items():
        try:
            check(value.to(right.dtype), ref, A=A, K=K, acc=acc, tolerance=tolerance, name=name)
        except AssertionError:
            continue
        raise AssertionError(f"{name}: the tolerance accepts the mutant {mutant!r}")
    return len(wrong)
