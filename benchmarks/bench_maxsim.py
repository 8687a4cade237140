"""maxsim: rerank (one query, many documents, scores only) and a training step (in-batch negatives, both gradients).

A corpus is stored as float32, bfloat16 or int8, and a variant is judged on the values it is given. ``einsum`` is how
PyLate does it, one product and a maximum over all similarities; ``flat`` one GEMM of all documents' tokens; ``chunked``
the same over four documents at a time, so that the similarities stay in cache. The floor is that GEMM alone, in float32
and chunked.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyelastic
from benchmarks.harness import Variant, compiled

OP = "maxsim"
OURS = ("pyelastic cuda", "pyelastic triton", "pyelastic cpu", "pyelastic eager")
CHUNK = 4
# Relative RMS error admitted. float32: measured 1e-7; one wrong winner of the 32 x 32 x 32 of train-32 is 7e-4 or more
# in dq. bfloat16 with float32 sums: scores as float32; gradients are rounded to bfloat16, 1.7e-3. Similarities rounded
# to bfloat16 (HALF): scores 3.1e-4; gradients go to wrong winners, 0.1, and are refused.
FLOAT32, GRADIENT16, HALF = 1e-6, 4e-3, 2e-3
# maxsim-cpu 0.1.0 returns wrong scores beyond this product of 64, query tokens and d (64 x 64 x 64).
MAXSIM_CPU_LIMIT = 1 << 18


@dataclass(frozen=True)
class Case:
    """``rerank``: one query of ``lq`` tokens; ``train``: as many queries as documents, document i for query i."""

    kind: str
    count: int
    lq: int
    ld: int
    dim: int

    @property
    def leaves(self) -> int:
        return 2 if self.kind == "train" else 0

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.count}-{self.lq}x{self.ld}-d{self.dim}"

    @property
    def pairs(self) -> int:
        return self.count * (self.count if self.kind == "train" else 1)

    def flops(self) -> float:
        """Similarities once; backward, one row to add to dq and one to dd for each query token and document."""
        backward = 4.0 * self.pairs * self.lq * self.dim if self.leaves else 0.0
        return 2.0 * self.pairs * self.lq * self.ld * self.dim + backward

    def bytes(self) -> float:
        """float32 tokens read once; training: twice, and their gradients written. Scores are small."""
        queries = self.lq * (self.count if self.kind == "train" else 1)
        return 4.0 * self.dim * (queries + self.count * self.ld) * (3 if self.leaves else 1)

    def tiny(self) -> Case:
        return Case(self.kind, 4, self.lq, 8, self.dim)

    def inputs(self, seed: int, device: str) -> tuple[Tensor, Tensor]:
        """Unit vectors; in training query tokens lie a little towards tokens of their document."""
        generator = torch.Generator(device).manual_seed(seed)
        make = partial(torch.randn, generator=generator, device=device)
        documents = F.normalize(make(self.count, self.ld, self.dim), dim=-1)
        if self.kind == "rerank":
            return F.normalize(make(self.lq, self.dim), dim=-1), documents
        towards = documents[:, torch.arange(self.lq, device=device) % self.ld]
        noise = make(self.count, self.lq, self.dim) / self.dim**0.5
        return F.normalize(0.05 * towards + noise, dim=-1), documents


def case(case_id: str) -> Case:
    """The case of an id such as ``rerank-1000-32x300-d128``."""
    kind, *numbers = re.findall(r"[a-z]{2,}|\d+", case_id)
    return Case(kind, *map(int, numbers))


def cases(full: bool, device: str) -> list[Case]:
    if device == "cuda":
        some = [Case("rerank", 1000, 32, 300, 128), Case("train", 128, 32, 180, 128)]
        sizes = ((10_000, 32, 300), (1000, 32, 1024), (1000, 1024, 1024))
        more = [*(Case("rerank", *size, 128) for size in sizes), Case("train", 512, 32, 180, 128)]
        return [*some, *more, Case("train", 64, 1024, 1024, 128)] if full else some
    if full:
        rerank = [Case("rerank", 1000, 32, 300, 128), Case("rerank", 200, 32, 1024, 128)]
        return [*rerank, Case("train", 32, 32, 180, 128), Case("train", 64, 32, 180, 128)]
    return [Case("rerank", 200, 32, 300, 128), Case("train", 16, 32, 180, 128)]


def memory_only(full: bool) -> list[Case]:
    """Training steps whose similarities differ sixteenfold and fourfold in size: 0.4 GB, 1.5 GB and 6.0 GB."""
    sizes = ((128, 180), (128, 720), (512, 180)) if full else ()
    return [Case("train", count, 32, ld, 128) for count, ld in sizes]


# --- formulations ----------------------------------------------------------------------------------------------

Scores = Callable[[Tensor, Any], Tensor]


def einsum(queries: Tensor, documents: Tensor) -> Tensor:
    """Scores [Nq, Nd], or [Nd] for one query [Lq, d]."""
    if queries.ndim == 2:
        return einsum(queries[None], documents)[0]
    return torch.einsum("ash,bth->abst", queries, documents).max(-1).values.float().sum(-1)


def flat(queries: Tensor, documents: Tensor) -> Tensor:
    s = documents.flatten(0, 1) @ queries.reshape(-1, queries.shape[-1]).T
    m = s.view(*documents.shape[:2], -1).amax(1)  # [Nd, Nq Lq]
    return m.view(len(m), *queries.shape[:-1]).float().sum(-1).movedim(0, -1)


def chunked(queries: Tensor, documents: Tensor) -> Tensor:
    return torch.cat([flat(queries, part) for part in documents.split(CHUNK)], -1)


def decoded(queries: Tensor, documents: pyelastic.Int8Tokens) -> Tensor:
    """int8 documents, each chunk decoded before its GEMM."""
    parts = zip(documents.values.split(CHUNK), documents.scale.split(CHUNK), strict=True)
    return torch.cat([flat(queries, pyelastic.Int8Tokens(*part).decode()) for part in parts], -1)


def _maxsim_cpu(queries: Tensor, documents: Tensor) -> Tensor:
    import maxsim_cpu

    return torch.as_tensor(maxsim_cpu.maxsim_scores(queries.numpy(), documents.numpy()))


def _late_interaction_kernels(queries: Tensor, documents: Tensor) -> Tensor:
    from late_interaction_kernels import maxsim

    return maxsim(queries, documents)


def _flash_maxsim(queries: Tensor, documents: Tensor) -> Tensor:
    from flash_maxsim import flash_maxsim, flash_maxsim_batched_train

    return flash_maxsim(queries, documents) if queries.ndim == 2 else flash_maxsim_batched_train(queries, documents)


def contrastive(scores: Scores, queries: Tensor, documents: Tensor) -> Tensor:
    """Mean cross-entropy of the scores' diagonal."""
    return F.cross_entropy(scores(queries, documents), torch.arange(len(queries), device=queries.device))


def _ours(kind: str, backend: str, queries: Tensor, documents: Any) -> Tensor:
    if kind == "train":
        return pyelastic.maxsim_info_nce(queries, documents, backend=backend)
    return pyelastic.maxsim(queries, documents, backend=backend)


# --- storage ---------------------------------------------------------------------------------------------------


def bfloat16(queries: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    return queries.bfloat16(), documents.bfloat16()


def int8(queries: Tensor, documents: Tensor) -> tuple[Tensor, pyelastic.Int8Tokens]:
    return queries.bfloat16(), pyelastic.quantize_int8(documents)


def int8_for_torch(queries: Tensor, documents: Tensor) -> tuple[Tensor, pyelastic.Int8Tokens]:
    """The same values; torch multiplies operands of one type only."""
    return queries.bfloat16().float(), pyelastic.quantize_int8(documents)


def variants(case: Case, device: str) -> dict[str, Variant]:
    """Ours first; peers only where they are installed."""
    training = case.kind == "train"
    half = GRADIENT16 if training else FLOAT32
    found = {}
    for backend in ("cuda", "triton", "eager") if device == "cuda" else ("cpu", "eager"):
        run = partial(_ours, case.kind, backend)
        found[f"pyelastic {backend}"] = Variant(run, FLOAT32)
        if backend != "eager":
            found[f"pyelastic {backend}, bf16"] = Variant(run, half, bfloat16)
        if backend != "eager" and not training:
            found[f"pyelastic {backend}, int8"] = Variant(run, FLOAT32, int8)

    def torch_variant(name: str, scores: Scores, limit: float = FLOAT32, prepare: Any = None) -> None:
        found[name] = Variant(partial(contrastive, scores) if training else scores, limit, prepare)

    for name, scores in (("einsum", einsum), ("flat", flat), ("chunked", chunked)):
        torch_variant(f"torch {name}", scores)
        if name != "einsum":
            torch_variant(f"torch {name}, bf16", scores, HALF, bfloat16)
    torch_variant("torch einsum, compiled", compiled(einsum))
    if not training:
        torch_variant("torch chunked, int8 decoded", decoded, FLOAT32, int8_for_torch)
    right = 64 * case.lq * case.dim <= MAXSIM_CPU_LIMIT
    if device == "cpu" and not training and right and importlib.util.find_spec("maxsim_cpu"):
        torch_variant("maxsim-cpu", _maxsim_cpu)
    if device == "cuda":
        peers = {"late_interaction_kernels": _late_interaction_kernels, "flash_maxsim": _flash_maxsim}
        for name, scores in peers.items():
            if importlib.util.find_spec(name):
                torch_variant(f"{name}, bf16", scores, GRADIENT16, bfloat16)
    return found


def floor(queries: Tensor, documents: Tensor) -> None:
    """The GEMM of the similarities, chunked, into a tile that is written over."""
    right = queries.reshape(-1, queries.shape[-1]).T
    rows = documents.flatten(0, 1)
    size = CHUNK * documents.shape[1]
    tile = torch.empty(size, right.shape[1], dtype=rows.dtype, device=rows.device)
    for part in rows.split(size):
        torch.mm(part, right, out=tile[: len(part)])


def truth(queries: Tensor, documents: Tensor | pyelastic.Int8Tokens) -> tuple[Tensor, ...]:
    """Scores, or the loss and both gradients, by the formula with autograd in float64, over chunks of documents."""
    training = queries.ndim == 3
    q = (queries if training else queries[None]).double()
    d = (documents if isinstance(documents, Tensor) else documents.decode()).double()
    parts = d.split(max(1, (1 << 26) // (q.shape[0] * q.shape[1] * d.shape[1])))

    def scores(q: Tensor, part: Tensor) -> Tensor:
        return torch.einsum("isd,jtd->ijst", q, part).max(-1).values.sum(-1)

    z = torch.cat([scores(q, part) for part in parts], 1)
    if not training:
        return (z[0],)
    labels = torch.arange(len(q), device=q.device)
    g = (torch.softmax(z, 1) - F.one_hot(labels, len(d))) / len(q)
    d_q, d_d = torch.zeros_like(q), []
    leaf = q.requires_grad_()
    for part, upstream in zip(parts, g.split([len(part) for part in parts], 1), strict=True):
        rows = part.detach().requires_grad_()
        part_q, part_d = torch.autograd.grad(scores(leaf, rows), (leaf, rows), upstream)
        d_q += part_q
        d_d.append(part_d)
    return F.cross_entropy(z, labels), d_q, torch.cat(d_d)
