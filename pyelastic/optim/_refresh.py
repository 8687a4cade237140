"""When a matrix's basis is found anew, and what a new one does to its state; one process or many do the same.

``plan`` says what is due, the caller finds the basis (from the gradient, which may lie on several ranks), and
``settle`` adopts it. A state is a dict of tensors; its ``schedule`` is [calls, refreshes, next refresh, times the gap].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyelastic.eager import fira as eager
from pyelastic.ops.fira import MODES, fira_state
from pyelastic.optim import projectors

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": torch.int8}
# The overlap of two successive bases above which `adaptive_gap` doubles a matrix's gap.
STEADY = 0.9
_ONE_CALL = torch.tensor([1, 0, 0, 0])


class Due(NamedTuple):
    """A refresh: its place in the schedule, what ``projectors.refresh`` wants, and whether there is a basis before."""

    calls: int
    refreshes: int
    times: int
    left: bool
    rank: int
    seed: int
    warm: bool


class Found(NamedTuple):
    """A refresh's outcome: P [d, r] or None, whether the gradient gave it, and P^T P_before [r, r_before] if warm."""

    basis: Tensor | None
    good: bool
    turn: Tensor | None


def plan(
    optimizer: Any, state: dict[str, Any], shape: tuple[int, int], group: dict[str, Any], number: int
) -> Due | None:
    """What this call of matrix ``number`` [m, n] has to refresh, or None, and then the call is counted."""
    schedule = state.get("schedule")
    calls, refreshes, due, times = (0, 0, 0, 1) if schedule is None else schedule.tolist()
    if calls < due:
        state["schedule"].add_(_ONE_CALL)
        return None
    left = projectors.side_is_left(shape, group["proj_type"])
    warm = schedule is not None and bool(state["left"]) == left
    return Due(
        calls, refreshes, times, left, min(group["rank"], *shape), optimizer._seed_of(number, refreshes), warm
    )


def turn(optimizer: Any, group: dict[str, Any], basis: Tensor, previous: Tensor, dtype: torch.dtype) -> Tensor | None:
    """P^T P_before for those who ask: moments that rotate, and gaps that adapt. ``dtype``: P is stored as."""
    if group["moment_transfer"] != "rotate" and not optimizer._adaptive_gap and previous.shape[1] == basis.shape[1]:
        return None
    stored = basis.to(dtype).to(basis.dtype)
    return stored.mT @ previous.to(stored.dtype)


def settle(
    optimizer: Any, w: Tensor, state: dict[str, Any], group: dict[str, Any], due: Due, found: Found, place: float,
    vectors: int | None = None, rows: slice | None = None,
) -> None:  # fmt: skip
    """Adopt what was found, and count the call. ``w`` [m, n], or the rows ``rows`` of it that this rank has.

    ``vectors``: how many of the L vectors this rank's moments are of; None: all. ``place``: in the refresh cycle.
    """
    times, refreshes, next_call = due.times, due.refreshes, due.calls
    if found.basis is not None:
        _adopt(w, state, group, due, found.basis, found.turn, vectors, rows)
    if found.good:
        gap = group["update_proj_gap"]
        if optimizer._adaptive_gap and found.turn is not None:
            overlap = float(found.turn.square().sum()) / max(due.rank, 1)
            times = times * 2 if overlap > STEADY else 1
        offset = int(place * gap) if optimizer._stagger else 0
        next_call = due.calls + gap * times - (due.calls + offset) % gap
        refreshes += 1
    state["schedule"] = torch.tensor([due.calls + 1, refreshes, next_call, times])


def _adopt(
    w: Tensor, state: dict[str, Any], group: dict[str, Any], due: Due, basis: Tensor, turn: Tensor | None,
    vectors: int | None, rows: slice | None,
) -> None:  # fmt: skip
    left = due.left
    stored = (basis if left else basis.mT).to(w.dtype).contiguous()
    rounded = (stored if left else stored.mT).to(eager.compute_dtype(w))
    a_r = MODES[group["mode"]](group["alpha"])[0]
    # The identity without M needs orthonormal columns, and keeps its digits for a_r away from 1.
    exact = callable(group["projector"]) or 0.5 < a_r < 1.5
    state.pop("gram", None)
    if a_r != 0 and exact:
        state["gram"] = (rounded.mT @ rounded).contiguous()
    if left and rows is not None:
        stored = stored[rows].clone()
    transfer = group["moment_transfer"]
    if due.warm and _rank(state) != basis.shape[1] and transfer == "keep":
        transfer = "rotate"
    if due.warm and transfer == "keep":
        state["projector"] = stored
        return
    old = dict(state)
    count = vectors if vectors is not None else w.shape[1] if left else w.shape[0]
    like = w.new_empty(()).expand((w.shape[0], count) if left else (count, w.shape[1]))  # of no memory
    kind = STATE_DTYPES[group["state_dtype"]]
    fresh = fira_state(like, stored, left=left, state_dtype=kind)
    for key in ("exp_avg", "exp_avg_sq", "projector", "step"):
        state[key] = getattr(fresh, key)
    state["scaling_grad"] = fresh.limiter_norm
    state["left"] = torch.tensor(left)
    if fresh.moment_scales is not None:
        state["exp_avg_scale"], state["exp_avg_sq_scale"] = fresh.moment_scales
    if group["weight_rounding"] == "compensated" and w.dtype in (torch.bfloat16, torch.float16):
        state["remainder"] = old["remainder"] if "remainder" in old else torch.zeros_like(w)
    if "step" in old:
        state["step"] = old["step"]
        if due.warm:
            state["scaling_grad"] = old["scaling_grad"]
    if due.warm and transfer == "rotate" and turn is not None:
        _rotate(old, state, turn, left)


def _rank(state: dict[str, Any]) -> int:
    return int(state["exp_avg"].shape[0 if bool(state["left"]) else 1])


def _rotate(old: dict[str, Any], new: dict[str, Any], turn: Tensor, left: bool) -> None:
    """Moments in the old basis expressed in the new: ``turn`` = P_new^T P_old [r_new, r_old]."""
    for key, matrix, signed in (("exp_avg", turn, True), ("exp_avg_sq", turn.square(), False)):
        moment = old[key].mT if left else old[key]
        scale = f"{key}_scale"
        moment = eager.dequantize(moment, old[scale]) if scale in old else moment.to(turn.dtype)
        moment = moment @ matrix.mT
        if scale in new:
            moment, new_scale = eager.quantize(moment, signed=signed)
            new[scale].copy_(new_scale)
        new[key].copy_(moment.mT if left else moment)
