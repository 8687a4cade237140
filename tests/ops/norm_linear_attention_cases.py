"""Inputs for the norm_linear_attention tests, and the comparison of a backend with the truth."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import backends
import oracle
import pytest
import torch
from torch import Tensor

import pyelastic
from pyelastic import LinearAttentionState

OP = "norm_linear_attention"
BACKENDS = backends.implemented(OP)
KERNELS = [b for b in BACKENDS if b != "eager"]
OPTIONS = ("mode", "rope", "causal", "key_power", "alpha", "eps", "eps_mode", "norm_eps")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_kernels = pytest.mark.parametrize("backend", KERNELS)


@dataclass
class Case:
    """Arguments of a call, as the public function takes them; lam, tau, norm_scale may be tensors."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None = None
    s0: Tensor | None = None
    z0: Tensor | None = None
    before: list[int] | None = None
    lam: float | Tensor = 3.0
    tau: float | Tensor = 0.5
    norm_scale: float | Tensor = 1.0
    mode: str = "split"
    rope: str | None = None
    tables: tuple[Tensor, Tensor] | None = None
    causal: bool = False
    cu_seqlens: Tensor | None = None
    key_power: float = 3.0
    alpha: float = 20.0
    eps: float = 1e-6
    eps_mode: str = "mean"
    norm_eps: float = 1e-6

    def having(self, **changes: Any) -> "Case":
        return replace(self, **changes)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What can have a gradient."""
        names = ("q", "k", "v", "gate", "s0", "z0", "lam", "tau", "norm_scale")
        return {n: x for n in names if isinstance(x := getattr(self, n), Tensor)}

    @property
    def spans(self) -> list[tuple[int, slice]]:
        """Batch and tokens of each sequence."""
        if self.cu_seqlens is None:
            return [(i, slice(None)) for i in range(len(self.q))]
        bounds = self.cu_seqlens.tolist()
        return [(0, slice(a, b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]  # noqa: RUF007

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        lead = (len(self.spans), self.k.shape[2])
        return (*lead, 2 * self.q.shape[3], self.v.shape[3]), (*lead, 2 * self.q.shape[3])

    def tables_of(self, sequence: int) -> tuple[Tensor, Tensor] | None:
        """sin, cos in float64 from the sequence's first position on."""
        if self.tables is None:
            return None
        start = self.before[sequence] if self.before is not None and self.causal else 0
        return self.tables[0][start:].double(), self.tables[1][start:].double()


def make(
    batch: int = 2,
    n: int = 9,
    m: int | None = None,
    heads: int = 2,
    kv_heads: int | None = None,
    d: int = 6,
    dv: int = 5,
    dtype: torch.dtype = torch.float32,
    gate: bool = False,
    state: bool = False,
    learned: bool = False,
    rope: str | None = None,
    lengths: Iterable[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Random inputs. ``lengths``: packed sequences; ``learned``: lam [Hq], tau [], norm_scale [Hq] as tensors."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int, of: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(of)

    cu = None
    if lengths is not None:
        lengths = list(lengths)
        cu = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)])
        batch, n, m = 1, sum(lengths), None
    kv, m = kv_heads or heads, n if m is None else m
    sequences = batch if cu is None else len(cu) - 1
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    more: dict[str, Any] = {}
    if state:
        more |= {
            "s0": draw(sequences, kv, 2 * d, dv, of=statistics),
            "z0": draw(sequences, kv, 2 * d, of=statistics).abs() * 3 + 0.5,
            "before": [3 + i for i in range(sequences)],
        }
    if learned:
        more |= {
            "lam": (2.5 + torch.rand(heads, generator=random, dtype=torch.float64)).to(statistics),
            "tau": torch.tensor(0.6, dtype=statistics),
            "norm_scale": (0.3 + torch.rand(heads, generator=random, dtype=torch.float64)).to(statistics),
        }
    if rope is not None:
        more |= {"rope": rope, "tables": pyelastic.rope_tables(max(n, m) + 8, d, dtype=statistics)}
    q = draw(batch, n, heads, d) / d**0.5  # norms around 1, where the exponent still moves
    k, v = draw(batch, m, kv, d), draw(batch, m, kv, dv)
    made_gate = draw(batch, n, heads, dv, of=dtype) if gate else None
    return Case(q.to(dtype), k.to(dtype), v.to(dtype), made_gate, cu_seqlens=cu, **more, **options)


def upstream_of(case: Case, states: bool = False) -> dict[str, Tensor]:
    """Gradients of o, and of s and z, that no two elements share."""
    random = torch.Generator().manual_seed(77)
    statistics = torch.float64 if case.q.dtype == torch.float64 else torch.float32
    shapes = {"o": ((*case.q.shape[:3], case.v.shape[3]), case.q.dtype)}
    if states:
        s, z = case.state_shapes
        shapes |= {"s": (s, statistics), "z": (z, statistics)}
    return {n: torch.randn(s, generator=random, dtype=torch.float64).to(t) for n, (s, t) in shapes.items()}


def call(
    backend: str, case: Case, need: tuple[str, ...] | None = None, final: bool = True, **more: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({o, s, z}, leaves of that call by name); ``need``: those that require a gradient, default all.

    Without ``final`` o alone: short sequences then go in quadratic order.
    """
    backends.skip_unsupported(OP, backend, case.q.dtype)
    device = backends.device_of(backend)
    leaves = {n: x.detach().to(device).requires_grad_(need is None or n in need) for n, x in case.tensors.items()}
    state = None
    if "s0" in leaves:
        state = LinearAttentionState(
            leaves["s0"], leaves["z0"], torch.tensor(case.before, dtype=torch.int64, device=device)
        )
    made = pyelastic.norm_linear_attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        gate=leaves.get("gate"),
        initial_state=state,
        output_final_state=final,
        rope_tables=None if case.tables is None else tuple(t.to(device) for t in case.tables),
        cu_seqlens=None if case.cu_seqlens is None else case.cu_seqlens.to(device),
        **{n: leaves.get(n, getattr(case, n)) for n in ("lam", "tau", "norm_scale")},
        **{n: getattr(case, n) for n in OPTIONS},
        backend=backend,
        **more,
    )
    if isinstance(made, Tensor):
        return {"o": made}, leaves
    o, after = made
    return {"o": o, "s": after.s, "z": after.z}, leaves


def calls_of(
    problem: Any, monkeypatch: pytest.MonkeyPatch, see: Callable[[Any, str], Any] = lambda problem, name: name
) -> list[Any]:
    """What ``see`` makes of each kernel that a launcher's problems call from now on: its name."""
    called: list[Any] = []
    original = problem.call

    def spy(self: Any, name: str, *arguments: Any) -> None:
        called.append(see(self, name))
        original(self, name, *arguments)

    monkeypatch.setattr(problem, "call", spy)
    return called


def polaformer(tokens: int, d: int, dtype: torch.dtype, causal: bool) -> list[tuple[Tensor, Tensor]]:
    """(cuda's, eager's in float64) of o and each gradient of polaformer_attention, both of its maps."""
    random, device = torch.Generator().manual_seed(3), backends.device_of("cuda")
    given = [torch.randn(1, tokens, 2, w, generator=random).to(dtype) for w in (d, d, 16)]
    given.append(1 + 2 * torch.rand(2, d, generator=random))
    upstream, found = torch.randn(1, tokens, 2, 16, generator=random).to(dtype), []
    for backend in ("cuda", "eager"):
        exact = backend == "eager"
        leaves = [(x.double() if exact else x.to(device)).detach().requires_grad_() for x in given]
        o = pyelastic.polaformer_attention(*leaves, causal=causal, backend=backend, eps=1e-3)
        o.backward(upstream.to(o))
        found.append([o.detach(), *(x.grad for x in leaves)])
    return list(zip(*found, strict=True))


def stored(backend: str, case: Case) -> bool:
    """Whether kernels multiply features rounded to bfloat16: on tensor cores (docs/ops)."""
    if case.q.dtype != torch.bfloat16:
        return False
    return backend == "triton" or (backend == "cuda" and case.q.shape[3] % 8 == 0 and case.v.shape[3] % 8 == 0)


def grade(backend: str, case: Case, truth: Any, name: str) -> dict[str, Any]:
    """How exact a result must be."""
    A, K = truth.A[name], truth.K
    dtype = case.q.dtype
    if stored(backend, case):
        # The float32 part of the bound, in units of the operands' dtype.
        part = oracle.TOLERANCES[oracle.DEFAULT].c_acc * K**0.5 * oracle.unit(torch.float32) / oracle.unit(dtype)
        return {"A": truth.half[name] + part * A, "K": 1, "acc": dtype, "tolerance": "stored operands"}
    return {"A": A, "K": K, "acc": oracle.accumulator(dtype)}


def compare(
    backend: str, case: Case, states: bool = False, upstream: dict[str, Tensor] | None = None, final: bool = True
) -> Any:
    """Results and all gradients of one call against the truth; return the truth. On the CPU also without ``final``."""
    from norm_linear_attention_reference import reference

    upstream = upstream_of(case, states) if upstream is None else upstream
    truth = reference(case, upstream)
    _compare(backend, case, truth, upstream, final)
    if backend == "cpu" and final and set(upstream) == {"o"}:
        _compare(backend, case, truth, upstream, False)
    return truth


def _compare(backend: str, case: Case, truth: Any, upstream: dict[str, Tensor], final: bool) -> None:
    made, leaves = call(backend, case, final=final)
    reached = [n for n in upstream if made[n].requires_grad]  # not those of an empty batch, whose gradients are zero
    torch.autograd.backward([made[n] for n in reached], [upstream[n].to(made[n].device) for n in reached])
    for name, value in made.items():
        told = grade(backend, case, truth, name)
        wanted = case.q.dtype if name == "o" else None
        oracle.check(value, truth.value[name], dtype=wanted, name=f"{backend} {name}", **told)
    for name, leaf in leaves.items():
        if leaf.grad is None and not case.q.numel() * case.k.numel():
            continue  # nothing depends on it
        assert leaf.grad is not None, f"{backend}: no gradient of {name}"
        told = grade(backend, case, truth, f"d{name}")
        want = truth.value[f"d{name}"]
        want = torch.where(want.abs() > torch.finfo(leaf.dtype).max, want.sign() * torch.inf, want)
        oracle.check(leaf.grad, want, dtype=leaf.dtype, name=f"{backend} gradient of {name}", **told)
