"""Inputs for the maxsim tests, and the comparison of one call with the truth."""

from dataclasses import dataclass, field, replace
from typing import Any

import backends
import oracle
import pytest
import torch
from maxsim_reference import Sequences, Truth, reference
from torch import Tensor

import pyelastic

OP = "maxsim"
BACKENDS = backends.implemented(OP)
KERNELS = [b for b in BACKENDS if b != "eager"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_kernels = pytest.mark.parametrize("backend", KERNELS)

# Sizes of packed sequences: one token, none, several tiles of lanes.
RAGGED_Q, RAGGED_D = (3, 1, 0, 9), (5, 0, 17, 1, 8)


@dataclass
class Case:
    """Arguments of a call."""

    queries: Tensor
    documents: Any
    options: dict[str, Any] = field(default_factory=dict)

    def having(self, **options: Any) -> "Case":
        return replace(self, options={**self.options, **options})


def make(
    layout: str = "cross",
    *,
    nq: int = 3,
    nd: int = 4,
    lq: int = 7,
    ld: int = 19,
    dim: int = 20,
    dtype: torch.dtype = torch.float32,
    d_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Case:
    """Random tokens in a layout: those of maxsim, and "packed" (cross), "packed pairs"."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    d_dtype = dtype if d_dtype is None else d_dtype
    if layout.startswith("packed"):
        lengths_q, lengths_d = RAGGED_Q, RAGGED_D
        options: dict[str, Any] = {}
        if layout == "packed pairs":
            lengths_d, options = lengths_d[: len(lengths_q)], {"layout": "pairs"}
        cu_q, cu_d = (torch.tensor([0, *x]).cumsum(0) for x in (lengths_q, lengths_d))
        options |= {"cu_seqlens_q": cu_q.int(), "cu_seqlens_d": cu_d}
        return Case(draw(sum(lengths_q), dim), draw(sum(lengths_d), dim, dtype=d_dtype), options)
    options = {"layout": layout} if layout == "pairs" else {}
    if layout == "list":
        options["pairs"] = torch.tensor([[0, nd - 1], [nq - 1, 0], [0, nd - 1], [0, 0]])
    queries = draw(lq, dim) if layout == "single" else draw(nq, lq, dim)
    shape = {"grouped": (nq, 2, ld, dim), "pairs": (nq, ld, dim)}.get(layout, (nd, ld, dim))
    return Case(queries, draw(*shape, dtype=d_dtype), options)


LAYOUTS = ("single", "cross", "grouped", "pairs", "list", "packed", "packed pairs")


def masks(case: Case, seed: int = 1) -> Case:
    """The case with random masks on both sides, one document wholly masked."""
    random = torch.Generator().manual_seed(seed)
    q = torch.rand(case.queries.shape[:-1], generator=random) > 0.3
    d = torch.rand(case.documents.shape[:-1], generator=random) > 0.4
    if d.ndim > 1:
        d.view(-1, d.shape[-1])[0] = False
    return case.having(query_mask=q, document_mask=d)


def sequences(x: Tensor, cu: Tensor | None, mask: Tensor | None, weights: Tensor | None) -> Sequences:
    tokens = x.detach().reshape(-1, x.shape[-1])
    if cu is not None:
        offsets = cu.tolist()
    else:
        length = x.shape[-2]
        count = tokens.shape[0] // length if length else x.shape[:-2].numel()
        offsets = [i * length for i in range(count + 1)]
    there = torch.ones(len(tokens), dtype=torch.bool) if mask is None else mask.reshape(-1)
    w = torch.ones(len(tokens), dtype=torch.float64) if weights is None else weights.detach().double().reshape(-1)
    return Sequences(tokens, offsets, there, torch.where(there, w, 0.0))


def sides(case: Case) -> tuple[Sequences, Sequences, list[tuple[int, int]]]:
    """The case as sequences, and which query meets which document."""
    o = case.options
    q = sequences(case.queries, o.get("cu_seqlens_q"), o.get("query_mask"), o.get("token_weights"))
    d = sequences(case.documents, o.get("cu_seqlens_d"), o.get("document_mask"), None)
    if o.get("reduction") == "mean":
        for i in range(len(q)):
            q.weights[q.span(i)] /= max(1, int(q.mask[q.span(i)].sum()))
    if "pairs" in o:
        pairs = [tuple(p) for p in o["pairs"].tolist()]
    elif case.documents.ndim == 4:
        pairs = [(j // case.documents.shape[1], j) for j in range(len(d))]
    elif o.get("layout") == "pairs":
        pairs = [(j, j) for j in range(len(d))]
    else:
        pairs = [(i, j) for i in range(len(q)) for j in range(len(d))]
    return q, d, pairs


def truth_of(case: Case, upstream: Tensor | None = None) -> tuple[Truth, int]:
    """The truth for upstream gradients [n, P] (default 1), and the longest sum K."""
    q, d, pairs = sides(case)
    o = case.options
    prefixes = tuple(o.get("dims") or (case.queries.shape[-1],))
    upstream = torch.ones(len(prefixes), len(pairs)) if upstream is None else upstream.reshape(len(prefixes), -1)
    truth = reference(
        q, d, pairs, upstream, prefixes=prefixes, normalize=o.get("normalize", False), topk=o.get("topk", 1),
        temperature=o.get("temperature", 0.0), zero_mode=o.get("mask_mode") == "zero",
    )  # fmt: skip
    tokens = max(len(q.tokens), len(d.tokens), 1)
    return truth, case.queries.shape[-1] + tokens


def call(backend: str, case: Case, grad: tuple[bool, bool] = (True, True)) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, queries, documents), the last two as leaves of that call."""
    backends.skip_unsupported(OP, backend, case.queries.dtype)
    backends.skip_unsupported(OP, backend, case.documents.dtype)
    device = backends.device_of(backend)
    q = case.queries.detach().to(device).requires_grad_(grad[0])
    d = case.documents.detach().to(device).requires_grad_(grad[1])
    reason = pyelastic.backends(OP, q, d, **case.options)[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return pyelastic.maxsim(q, d, backend=backend, **backends.to_device(backend, case.options)), q, d


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def upstream_of(case: Case) -> Tensor:
    """A gradient of the scores that no two pairs share, one of them 0."""
    _, _, pairs = sides(case)
    n = len(case.options.get("dims") or (1,))
    return torch.linspace(-1.0, 2.0, 3 * n * len(pairs))[:: 3].reshape(n, -1).to(score_dtype(case.queries.dtype))


def compare(backend: str, case: Case, upstream: Tensor | None = None) -> Truth:
    """Scores and both gradients of one call against the truth; return the truth."""
    upstream = upstream_of(case) if upstream is None else upstream
    truth, K = truth_of(case, upstream)
    out, q, d = call(backend, case)
    out.backward(upstream.reshape(out.shape).to(out.device))
    dtype = case.queries.dtype
    check = {"K": K, "acc": oracle.accumulator(dtype)}
    oracle.check(out.reshape(truth.scores.shape), truth.scores, A=truth.A_scores, dtype=score_dtype(dtype),
                 name=f"{backend} scores", **check)  # fmt: skip
    for name, x, want, A in (("dq", q, truth.grad_q, truth.A_q), ("dd", d, truth.grad_d, truth.A_d)):
        oracle.check(x.grad.reshape(want.shape), want, A=A, dtype=x.dtype, name=f"{backend} {name}", **check)
    return truth
