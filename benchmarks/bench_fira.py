"""fira: one optimizer step of one matrix, the basis given by an earlier step (gap = infinity).

Each variant is graded by its first step from W = 0.02 randn, lr = 1, where W' is all displacement, against a step in
float64 of the same algorithm (``Variant.truth``), all with one basis. Timed steps go on from there.
``python -m benchmarks.bench_fira`` prints what a refresh costs instead, with the energy that each projector captures.
The floor is the two GEMMs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pyelastic
from benchmarks.harness import Variant
from pyelastic.eager import fira as eager
from pyelastic.optim import Fira, captured_energy, projectors

OP = "fira"
OURS = ("pyelastic cuda", "pyelastic triton", "pyelastic cpu", "pyelastic eager")
STATEFUL = True
LR, ALPHA, GAP = 1.0, 0.25, 1 << 40
# Relative RMS error of W'. float32, measured: the published package 7e-7, ours 8e-7. bfloat16: the published package
# computes everything in it, measured 5e-3; 0.4 % is one rounding of W'.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
Step = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    rows: int
    columns: int
    rank: int
    dtype: torch.dtype

    @property
    def id(self) -> str:
        return f"{self.rows}x{self.columns}-r{self.rank}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def leaves(self) -> int:
        """A step: no autograd."""
        return 0

    def flops(self) -> float:
        """4 m n r: the projection and the way back."""
        return 4.0 * self.rows * self.columns * self.rank

    def bytes(self) -> float:
        """G read twice, W read and written, the basis read twice, two moments read and written."""
        small = 2.0 * min(self.rows, self.columns) + 4.0 * max(self.rows, self.columns)
        return self.dtype.itemsize * (4.0 * self.rows * self.columns + small * self.rank)

    def tiny(self) -> Case:
        return Case(32, 48, 4, self.dtype)

    def inputs(self, seed: int, device: str) -> tuple[Tensor, Tensor]:
        """W and G: a gradient with a decaying spectrum."""
        generator = torch.Generator().manual_seed(seed)
        randn = partial(torch.randn, generator=generator)
        d = min(self.rows, self.columns)
        width = min(2 * self.rank, d)
        decay = torch.arange(1, width + 1).float().rsqrt()
        g = (randn(self.rows, width) * decay) @ randn(width, self.columns) / math.sqrt(width)
        g += 0.05 * randn(self.rows, self.columns)
        w, g = (x.to(device, self.dtype) for x in (0.02 * randn(self.rows, self.columns), g))
        _RANKS[(w.shape, w.dtype, w.device)] = self.rank
        return w, g


def case(case_id: str) -> Case:
    """The case of an id such as ``1024x2736-r256-float32``."""
    match = re.fullmatch(r"(\d+)x(\d+)-r(\d+)-(\w+)", case_id)
    assert match is not None, case_id
    return Case(*map(int, match.groups()[:3]), getattr(torch, match.group(4)))


def cases(full: bool, device: str) -> list[Case]:
    if device == "cuda":
        shapes = [(4096, 4096, 128), (4096, 4096, 512), (4096, 11008, 128), (4096, 11008, 1024)]
        return [Case(*shape, dtype) for shape in shapes for dtype in (torch.bfloat16, torch.float32)]
    shapes = [(1024, 2736, 256), (2048, 2048, 128), (2048, 2048, 512), (4096, 4096, 128)]
    if not full:  # part of `make bench`, whose ops share a few minutes
        return [Case(*shapes[1], torch.float32)]
    return [Case(*shape, dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]


def memory_only(full: bool) -> list[Case]:
    return []


Known = dict[int, tuple[Tensor, Any]]  # by address of the weight: what is stepped, and its optimizer


def _keeping(make: Callable[[Tensor], Any], known: Known | None = None) -> Step:
    """A step of an optimizer that ``make`` builds around the weight, with the state of the calls before: ``known``."""
    known = {} if known is None else known

    def run(w: Tensor, g: Tensor) -> Tensor:
        if w.data_ptr() not in known:
            p = torch.nn.Parameter(w.clone())
            p.grad = g
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                known[w.data_ptr()] = (p, make(p))
            p, optimizer = known[w.data_ptr()]
            with _one_svd(g):
                optimizer.step()
        else:
            p, optimizer = known[w.data_ptr()]
            optimizer.step()
        return p.detach()

    return run


_BASES: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}


@contextlib.contextmanager
def _one_svd(g: Tensor) -> Iterator[None]:
    """All variants get one basis of ``g`` for an SVD, which is slow and not unique to rounding.

    What a step costs does not depend on it. The side that is not used is zero.
    """
    original = torch.linalg.svd
    key = (g.shape, g.dtype, float(g[0, 0]), float(g[-1, -1]))

    def svd(a: Tensor, full_matrices: bool = True, **options: Any) -> Any:
        if key not in _BASES:
            rank, left = _RANKS[(g.shape, g.dtype, g.device)], projectors.side_is_left(g.shape, "std")
            p = projectors.randomized(g, None, rank, left, 0)
            u = torch.zeros(g.shape[0], rank, device=g.device)
            vh = torch.zeros(rank, g.shape[1], device=g.device)
            u, vh = (p, vh) if left else (u, p.mT.contiguous())
            _BASES[key] = (u, torch.ones(rank, device=g.device), vh)
        return _BASES[key]

    torch.linalg.svd = svd
    try:
        yield
    finally:
        torch.linalg.svd = original


def _group(p: Tensor, rank: int, **keys: Any) -> list[dict[str, Any]]:
    return [{"params": [p], "rank": rank, "update_proj_gap": GAP, "proj_type": "std", **keys}]


def _truth(rank: int, mode: str, w: Tensor, g: Tensor) -> tuple[Tensor]:
    """With the basis as the variants have it: in the weight's dtype."""
    left = projectors.side_is_left(w.shape, "std")
    with _one_svd(g):
        basis = projectors.svd(g, None, rank, left, 0).to(w.dtype)
    return _exact(basis if left else basis.mT, mode, w, g)


def _sketch_truth(known: Known, w: Tensor, g: Tensor) -> tuple[Tensor]:
    """Of apollo-torch, by the sketch that it drew in the step before: state that the optimizer shows."""
    p, optimizer = known[w.data_ptr()]
    return _exact(optimizer.state[p]["projector"].ortho_matrix, "apollo", w, g)


def _exact(projector: Tensor, mode: str, w: Tensor, g: Tensor) -> tuple[Tensor]:
    left = projectors.side_is_left(w.shape, "std")
    exact = w.double()
    state = pyelastic.fira_state(exact, projector.double().contiguous(), left=left)
    pyelastic.fira([exact], [g.double()], [state], left=[left], lr=LR, alpha=ALPHA, mode=mode, backend="eager")
    return (exact,)


def _adam_truth(eps: float, w: Tensor, g: Tensor) -> tuple[Tensor]:
    return (w.double() - LR * g.double() / (g.double().abs() + eps),)


def _compiled(rank: int) -> Step:
    """torch.compile of the textbook form, on tensors of the shapes of Fira's state."""
    step = torch.compile(eager.step_, dynamic=False)

    class Compiled:
        def __init__(self, p: Tensor) -> None:
            left = projectors.side_is_left(p.shape, "std")
            with _one_svd(p.grad):
                basis = projectors.svd(p.grad, None, rank, left, 0)
            stored = (basis if left else basis.mT).to(p.dtype).contiguous()
            self.p, self.left = p.detach(), left
            self.g, self.s = p.grad, pyelastic.fira_state(p, stored, left=left)
            self.lr = torch.tensor(LR, dtype=torch.float64)

        def step(self) -> None:
            s = self.s
            step([self.p], [self.g], [s.exp_avg], [s.exp_avg_sq], [], [s.projector], [], [s.limiter_norm], [s.step], [],
                 self.lr, None, None, [self.left], [0], 0.9, 0.999, 1e-6, 0.0, 1.01, ALPHA, ALPHA, 1.0,
                 int(eager.Flags.CORRECT_BIAS))  # fmt: skip

    return _keeping(Compiled)


def _peer(module: str, name: str) -> Any:
    """A third-party optimizer class, or None; some print or warn when they are imported."""
    if importlib.util.find_spec(module) is None:
        return None
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return getattr(importlib.import_module(module), name, None)
        except ImportError:  # one of its own dependencies
            return None


def variants(case: Case, device: str) -> dict[str, Variant]:
    """Ours first; peers only where they are installed."""
    limit, rank = LIMITS[case.dtype], case.rank
    fira_truth = partial(_truth, rank, "official")

    def ours(backend: str, **options: Any) -> Step:
        keys = {"lr": LR, "projector": "svd", "backend": backend, **options}
        return _keeping(lambda p: Fira(_group(p, rank, alpha=ALPHA), **keys))

    backends = ("cuda", "triton", "eager") if device == "cuda" else ("cpu", "eager")
    found = {f"pyelastic {name}": Variant(ours(name), limit, truth=fira_truth) for name in backends}
    for label, mode in (("GaLore", "galore"), ("Apollo", "apollo")):
        found[f"pyelastic {backends[0]}, {label} mode"] = Variant(
            ours(backends[0], mode=mode), limit, truth=partial(_truth, rank, mode)
        )
    found["eager, compiled"] = Variant(_compiled(rank), limit, truth=fira_truth)
    if official := _peer("fira", "FiraAdamW"):
        found["fira (published)"] = Variant(
            _keeping(lambda p: official(_group(p, rank, alpha=ALPHA), lr=LR, no_deprecation_warning=True)), limit,
            truth=fira_truth,
        )  # fmt: skip
    if other := _peer("pytorch_optimizer", "Fira"):
        keys = {"scale": ALPHA, "projection_type": "std"}
        found["pytorch_optimizer Fira"] = Variant(
            _keeping(lambda p: other(_group(p, rank, **keys), lr=LR, eps=1e-6)), limit, truth=fira_truth
        )
    if galore := _peer("galore_torch", "GaLoreAdamW"):
        found["galore-torch"] = Variant(
            _keeping(lambda p: galore(_group(p, rank, scale=ALPHA), lr=LR, no_deprecation_warning=True)), limit,
            truth=partial(_truth, rank, "galore"),
        )  # fmt: skip
    if apollo := _peer("apollo_torch", "APOLLOAdamW"):
        drawn: Known = {}
        sketched = partial(_group, rank=rank, scale=ALPHA, proj="random", scale_type="channel")
        found["apollo-torch"] = Variant(
            _keeping(lambda p: apollo(sketched(p), lr=LR), drawn), limit, truth=partial(_sketch_truth, drawn)
        )
    for name in ("fused", "foreach"):
        adam = partial(torch.optim.AdamW, lr=LR, eps=1e-8, weight_decay=0.0, **{name: True})
        found[f"torch AdamW {name}"] = Variant(
            _keeping(lambda p, adam=adam: adam([p])), limit, truth=partial(_adam_truth, 1e-8)
        )
    return found


def floor(w: Tensor, g: Tensor) -> None:
    """R = X P and C P^T, in the type of the operands."""
    rank = _RANKS[(w.shape, w.dtype, w.device)]
    key = (w.shape, w.dtype, w.device, rank)
    if key not in _FLOOR:  # in the first of the rounds, of which the median is taken
        left = projectors.side_is_left(w.shape, "std")
        p = torch.randn(min(w.shape), rank, device=w.device).to(w.dtype)
        r = torch.empty((rank, w.shape[1]) if left else (w.shape[0], rank), dtype=w.dtype, device=w.device)
        _FLOOR[key] = (left, p, r, torch.empty_like(w))
    left, p, r, out = _FLOOR[key]
    torch.mm(p.mT, g, out=r) if left else torch.mm(g, p, out=r)
    torch.mm(p, r, out=out) if left else torch.mm(r, p.mT, out=out)


_FLOOR: dict[Any, tuple[bool, Tensor, Tensor, Tensor]] = {}
_RANKS: dict[Any, int] = {}


def truth(w: Tensor, g: Tensor) -> tuple[Tensor]:
    raise NotImplementedError("every variant brings its own")


def refresh(rounds: int = 5) -> None:
    """CPU time and captured energy of each projector, one thread; ``subspace`` starts from a basis with other noise."""
    torch.set_num_threads(1)
    print("| shape, rank | projector | ms | captured energy | SVD's time / its |\n|---|---|---|---|---|")
    for rows, columns, rank in ((512, 1376, 128), (1024, 2736, 256), (2048, 2048, 128)):
        case = Case(rows, columns, rank, torch.float32)
        g = case.inputs(0, "cpu")[1]
        left = projectors.side_is_left(g.shape, "std")
        noise = torch.randn(g.shape, generator=torch.Generator().manual_seed(7))
        stale = projectors.svd(g + 0.3 * noise * g.norm() / noise.norm(), None, rank, left, 0)
        times: dict[str, float] = {}
        for name in ("svd", "eigh", "randomized", "subspace", "random"):
            samples = []
            for _ in range(2 if name == "svd" else rounds):
                start = time.process_time()
                p = projectors.refresh(name, g, stale if name == "subspace" else None, rank, left, 0)
                samples.append(time.process_time() - start)
            assert p is not None
            times[name] = statistics.median(samples)
            energy = captured_energy(g, p, left)
            print(f"| {case.id} | {name} | {times[name] * 1e3:.1f} | {energy:.4f} | {times['svd'] / times[name]:.1f} |")


if __name__ == "__main__":
    refresh()
