"""Fira, GaLore and an APOLLO-like optimizer: ``torch.optim`` optimizers around the op ``pyelastic.fira``.

Groups with the key ``rank`` hold matrices whose moments live in a subspace of that rank; other groups are Adam. State
of a projected [m, n]: one basis of d r, two moments of L r and a few numbers, where Adam keeps 2 m n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pyelastic import _errors
from pyelastic.ops.fira import MODES, FiraState, fira
from pyelastic.optim import _checkpoint, _dense, _refresh, projectors
from pyelastic.optim._refresh import STATE_DTYPES

TRANSFERS = ("keep", "rotate", "reset")
ROUNDINGS = ("nearest", "stochastic", "compensated")


_Entry = tuple[Tensor, Tensor, Tensor, dict[str, Any]]  # a parameter, it and its gradient as matrices, its state


class Fira(torch.optim.Optimizer):
    """Fira (Chen et al. 2024, arXiv 2410.01623): low-rank Adam plus the scaled rest of the gradient.

    ``mode="official"`` with ``projector="svd"`` is the published package, step by step; ``mode="paper"`` Algorithm 1.

    Args:
        params: parameters or groups. A group with ``rank`` is projected: keys ``rank``, ``update_proj_gap`` (default
            200), ``alpha`` (1.0), ``proj_type`` (``std``, ``reverse_std``, ``left``, ``right``). In it, a weight
            of more than two dimensions is a matrix [first, rest], one of fewer is dense. ``divide_params`` makes them.
        lr, betas, eps, weight_decay, correct_bias: as in the published package: eps is beside sqrt(v), decay is
            decoupled and acts on the stepped weight. lr may be a 0-d tensor.
        mode, gamma, collapse: see ``pyelastic.fira``.
        projector: ``subspace``, ``svd``, ``eigh``, ``randomized``, ``random`` or a callable: see
            pyelastic.optim.projectors.
        moment_transfer: at a refresh ``keep`` the moments as the published package, ``rotate`` them into the new basis,
            or ``reset`` them.
        stagger: spread the refreshes of the matrices over the gap, by their cost.
        adaptive_gap: double a matrix's gap while its basis hardly turns (the idea of Q-GaLore).
        state_dtype: moments in ``float32``, ``bfloat16`` or ``8bit`` (block-wise).
        weight_rounding: of 16-bit weights ``nearest``, ``stochastic`` (bfloat16) or ``compensated``: the remainder is
            kept, in the same dtype, so a step too small for the weight's dtype is not lost.
        max_grad_norm: clip the norm of all gradients, without a pass that writes them.
        fused: unprojected groups by torch's fused AdamW, with its place for eps and decay.
        maximize: ascend. differentiable: refused. seed: of ``random``, cold starts and stochastic rounding.
        backend: of ``pyelastic.fira``.

    A refresh reads the gradient's largest element on the host, other steps read nothing. A refresh whose gradient is
    zero or not finite keeps the basis and is tried again at the next step. Changing a group's ``alpha``, ``gamma`` and
    so on acts at once, ``rank``, ``proj_type`` and ``update_proj_gap`` at the next refresh of a matrix.

    Parameters that ``fully_shard`` cut (DTensors) are stepped with collectives: all ranks call, with gradients for the
    same parameters; see docs/distributed_fira.md. A projected one that is cut otherwise: ValueError.

    Raises:
        ValueError, TypeError: an argument or group key is wrong. RuntimeError: a sparse gradient.
    """

    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf, and leaves both to the step
    _mode = "official"
    # What the places were made for, and they; the parameters too, so that an id stands for one tensor.
    _known_places: tuple[list[Any], dict[Tensor, tuple[int, float]], list[list[Tensor]]] | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        mode: str | None = None,
        gamma: float | None = 1.01,
        collapse: bool = False,
        projector: str | projectors.Projector = "subspace",
        moment_transfer: str = "keep",
        stagger: bool = False,
        adaptive_gap: bool = False,
        state_dtype: str = "float32",
        weight_rounding: str = "nearest",
        max_grad_norm: float | None = None,
        fused: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        if differentiable:
            raise ValueError("fira: differentiable=True is not supported: the step is in place and has no gradient")
        self._stagger, self._max_grad_norm, self._seed = stagger, max_grad_norm, seed
        self._backend, self._adaptive_gap = backend, adaptive_gap
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias,
            "mode": self._mode if mode is None else mode, "gamma": gamma, "collapse": collapse,
            "projector": projector, "moment_transfer": moment_transfer, "state_dtype": state_dtype,
            "weight_rounding": weight_rounding, "fused": fused, "maximize": maximize, "per_matrix": False,
        }  # fmt: skip
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_stagger", "_max_grad_norm", "_seed", "_backend", "_adaptive_gap")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    # --- groups ---------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        lr, betas = group["lr"], group["betas"]
        if not isinstance(lr, Tensor) and not lr >= 0:
            raise ValueError(f"fira: lr is {lr}; expected a non-negative number")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"fira: betas are {betas}; expected 0 <= beta < 1")
        for key in ("eps", "weight_decay"):
            if not group[key] >= 0:
                raise ValueError(f"fira: {key} is {group[key]}; expected a non-negative number")
        _errors.check_choice("fira", "mode", group["mode"], tuple(MODES))
        _errors.check_choice("fira", "moment_transfer", group["moment_transfer"], TRANSFERS)
        _errors.check_choice("fira", "weight_rounding", group["weight_rounding"], ROUNDINGS)
        _errors.check_choice("fira", "state_dtype", group["state_dtype"], tuple(STATE_DTYPES))
        if not callable(group["projector"]):
            _errors.check_choice("fira", "projector", group["projector"], tuple(projectors.PROJECTORS))
        if "rank" not in group:
            return
        for key, default in (("update_proj_gap", 200), ("alpha", 1.0), ("proj_type", "std")):
            group.setdefault(key, default)
        for key in ("rank", "update_proj_gap"):
            if not isinstance(group[key], int) or group[key] < 1:
                raise ValueError(f"fira: {key} is {group[key]!r}; expected an integer of at least 1")
        projectors.side_is_left((2, 1), group["proj_type"])
        complex_ones = [p for p in group["params"] if p.is_complex()]
        if complex_ones:
            raise TypeError(f"fira: a parameter is {complex_ones[0].dtype}; expected a real floating dtype")

    def _places(self) -> dict[Tensor, tuple[int, float]]:
        """Per projected parameter its number and its place in the refresh cycle, in [0, 1), by the work before it."""
        key = [(group.get("rank"), [(id(p), p.numel()) for p in group["params"]]) for group in self.param_groups]
        if self._known_places is not None and self._known_places[0] == key:
            return self._known_places[1]
        found: dict[Tensor, tuple[int, float]] = {}
        work = [
            (p, p.numel() * min(group["rank"], p.shape[0], math.prod(p.shape[1:])))
            for group in self.param_groups
            if "rank" in group
            for p in group["params"]
            if p.ndim >= 2 and p.numel()
        ]
        total = max(sum(cost for _, cost in work), 1)
        before = 0
        for number, (p, cost) in enumerate(work):
            found[p] = (number, before / total)
            before += cost
        self._known_places = (key, found, [list(group["params"]) for group in self.param_groups])
        return found

    # --- the step -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` reevaluates the model, with gradients enabled, and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        places = self._places()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise RuntimeError("fira: sparse gradients are not supported; use a dense embedding gradient")
        factors: dict[torch.device, Tensor | None] = {}
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and self._sharded():
            found_inf = _distributed().agree(found_inf, self._sharded())
        sharded: list[tuple[Tensor, dict[str, Any]]] = []
        for group in self.param_groups:
            low: dict[Any, list[_Entry]] = {}
            dense: dict[Any, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is None or p.numel() == 0:
                    continue
                if p.device not in factors:
                    factors[p.device] = self._factor(p.device)
                if "rank" in group and p.ndim >= 2:
                    if _is_dtensor(p):
                        sharded.append((p, group))
                        continue
                    w = _matrix(p)
                    g = p.grad if p.grad.dtype == p.dtype else p.grad.to(p.dtype)
                    g = _matrix(g, like=p)
                    state = self.state[p]
                    self._prepare(state, w, g, group, places[p])
                    kind = (p.device, p.dtype, state["exp_avg"].dtype, "remainder" in state)
                    low.setdefault(kind, []).append((p, w, g, state))
                else:
                    dense.setdefault((p.device, p.dtype), []).append(p)
            for (device, *_), entries in low.items():
                self._step_low(entries, group, places, factors[device], self._on(found_inf, device))
            for (device, _), tensors in dense.items():
                self._step_dense(tensors, group, factors[device], self._on(found_inf, device))
        if sharded:
            found = {device: self._on(found_inf, device) for device in factors}
            _distributed().step(self, sharded, places, factors, found)
        return loss

    def _sharded(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if _is_dtensor(p)]

    def _step_low(
        self, entries: list[_Entry], group: dict[str, Any], places: dict[Tensor, tuple[int, float]],
        factor: Tensor | None, found_inf: Tensor | None,
    ) -> None:  # fmt: skip
        params, targets, grads, states = zip(*entries, strict=True)
        stochastic = group["weight_rounding"] == "stochastic" and targets[0].dtype == torch.bfloat16
        fira(
            targets, grads, [_as_state(s) for s in states],
            left=[bool(s["left"]) for s in states], lr=group["lr"], betas=group["betas"], eps=group["eps"],
            weight_decay=group["weight_decay"], alpha=self._alpha(group), mode=group["mode"], gamma=group["gamma"],
            correct_bias=group["correct_bias"], maximize=group["maximize"], per_matrix=group["per_matrix"],
            collapse=group["collapse"], stochastic=stochastic,
            seeds=[self._seed_of(places[p][0], 0) for p in params] if stochastic else None, grad_factor=factor,
            found_inf=found_inf, backend=self._backend,
        )  # fmt: skip
        for p, target in zip(params, targets, strict=True):
            # A layout without a matrix view: the step ran on a copy.
            if target is not p and target.data_ptr() != p.data_ptr():
                p.copy_(target.view(p.shape))

    def _alpha(self, group: dict[str, Any]) -> float:
        return float(group["alpha"])

    def _step_dense(
        self, params: list[Tensor], group: dict[str, Any], factor: Tensor | None, found_inf: Tensor | None
    ) -> None:
        fused = group["fused"] and params[0].is_floating_point()
        for p in params:
            state = self.state[p]
            if not state:
                exact = p.dtype if fused or p.dtype == torch.float64 else torch.float32
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = torch.zeros_like(p, dtype=exact, memory_format=torch.preserve_format)
        states = [self.state[p] for p in params]
        grads = [p.grad for p in params if p.grad is not None]
        if any(_is_dtensor(p) for p in params):  # Adam is elementwise: each rank steps what it has
            params, grads, states = _distributed().local_parts(params, grads, states)
        if fused:
            _dense.fused_step(params, grads, states, group, None if factor is None else 1.0 / factor, found_inf)
        else:
            _dense.step(params, grads, states, group, factor, found_inf)

    @staticmethod
    def _on(x: Tensor | None, device: torch.device) -> Tensor | None:
        return None if x is None else x.to(device).view(())

    def _factor(self, device: torch.device) -> Tensor | None:
        """What gradients on ``device`` are multiplied by: the clip coefficient over the loss scale; None for 1."""
        scale = self._on(getattr(self, "grad_scale", None), device)
        if self._max_grad_norm is None:
            return None if scale is None else scale.to(torch.float32).reciprocal()
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        sharded = [g for g in grads if _is_dtensor(g)]
        grads = [g for g in grads if not _is_dtensor(g)]
        norms = [_distributed().norm(sharded).to(device)] if sharded else []
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for g in grads:
            kinds.setdefault((g.device, g.dtype), []).append(g)
        for tensors in kinds.values():
            each = torch._foreach_norm(tensors, 2, dtype=_exact(tensors[0]))
            norms.append(torch.linalg.vector_norm(torch.stack(each), dtype=torch.float64).to(device))
        total = torch.linalg.vector_norm(torch.stack(norms))
        inverse = torch.ones_like(total) if scale is None else scale.to(torch.float64).reciprocal()
        return torch.clamp(self._max_grad_norm / (total * inverse + 1e-6), max=1.0) * inverse

    # --- the basis ------------------------------------------------------------------------------------------

    def _seed_of(self, number: int, refreshes: int) -> int:
        return (self._seed * 0x9E3779B9 + number * 0x85EBCA6B + refreshes * 0xC2B2AE35) & 0x7FFFFFFFFFFFFFFF

    def _prepare(
        self, state: dict[str, Any], w: Tensor, g: Tensor, group: dict[str, Any], place: tuple[int, float]
    ) -> None:
        """Count the call, and refresh the basis where one is due."""
        due = _refresh.plan(self, state, (w.shape[0], w.shape[1]), group, place[0])
        if due is None:
            return
        previous = _basis(state) if due.warm else None
        basis = projectors.refresh(group["projector"], g, previous, due.rank, due.left, due.seed)
        good = basis is not None
        if basis is None and previous is None:
            basis = projectors.random(g, None, due.rank, due.left, due.seed)  # until there is a gradient to follow
        turn = None
        if basis is not None and previous is not None:
            turn = _refresh.turn(self, group, basis, previous, w.dtype)
        _refresh.settle(self, w, state, group, due, _refresh.Found(basis, good, turn), place[1])

    # --- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers: loads under ``weights_only=True``. A seeded basis is left out and made anew."""
        return _checkpoint.pack(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of this class or of the published package's; tensors keep their dtypes. Raises ValueError on a mismatch."""
        state_dict = _checkpoint.unpack(state_dict, self)
        kept = [group["projector"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, projector in zip(self.param_groups, kept, strict=True):
            if group.get("projector") is None:  # a callable does not travel
                group["projector"] = projector
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            self._check_group(group)
        _checkpoint.restore(state_dict, self)


class GaLore(Fira):
    """GaLore (Zhao et al. 2024, arXiv 2403.03507): Adam in the subspace, nothing outside of it.

    Group keys of the published package: ``rank``, ``update_proj_gap``, ``scale`` (default 0.25), ``proj_type``.
    """

    _mode = "galore"

    def _alpha(self, group: dict[str, Any]) -> float:
        return float(group.get("scale", group["alpha"]))

    def _check_group(self, group: dict[str, Any]) -> None:
        if "rank" in group:
            group["alpha"] = group.get("scale", group.get("alpha", 0.25))
        super()._check_group(group)


class Apollo(GaLore):
    """APOLLO-like (Zhu et al. 2024, arXiv 2412.05270): the raw gradient, scaled by what Adam does to a random sketch.

    ``W <- W - lr sqrt(scale) phi G``, phi one factor a vector, or with ``scale_type="tensor"`` one for the matrix.
    The sketch is orthonormal, where the paper's is Gaussian: phi does not depend on its length. Group keys: ``rank``,
    ``update_proj_gap``, ``scale`` (default 1), ``scale_type`` (``channel``, ``tensor``), ``proj_type``.
    """

    _mode = "apollo"

    def __init__(self, params: Iterable[Any], lr: float | Tensor = 1e-3, **options: Any) -> None:
        options.setdefault("projector", "random")
        super().__init__(params, lr, **options)

    def _check_group(self, group: dict[str, Any]) -> None:
        if "rank" in group:
            group["scale"] = group.get("scale", 1.0)
            kind = group.setdefault("scale_type", "channel")
            _errors.check_choice("apollo", "scale_type", kind, ("channel", "tensor"))
            group["per_matrix"] = kind == "tensor"
        super()._check_group(group)


# --- helpers ------------------------------------------------------------------------------------------------------


def _is_dtensor(x: Tensor) -> bool:
    return hasattr(x, "_local_tensor")


def _distributed() -> Any:
    """The sharded step, of pyelastic.distributed.fira, for which a torch without torch.distributed has no use."""
    from pyelastic.distributed import fira as sharded

    return sharded


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _matrix(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x [a, ...] as [a, rest], a view where its layout allows. ``like``: whose order of the rest to take."""
    like = x if like is None else like
    if x.ndim == 2:
        return x
    if not like.is_contiguous() and like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _basis(state: dict[str, Any]) -> Tensor:
    p: Tensor = state["projector"]
    return p if bool(state["left"]) else p.mT


def _as_state(state: dict[str, Any]) -> FiraState:
    scales = (state["exp_avg_scale"], state["exp_avg_sq_scale"]) if "exp_avg_scale" in state else None
    return FiraState(
        state["exp_avg"], state["exp_avg_sq"], state["projector"], state["scaling_grad"], state["step"], scales,
        state.get("gram"), state.get("remainder"),
    )  # fmt: skip
