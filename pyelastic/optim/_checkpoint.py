"""Optimizer state on disk: plain tensors out, ours or the published package's in, and the published package's out."""

from __future__ import annotations

import copy
import importlib
import math
from typing import Any

import torch
from torch import Tensor

from pyelastic.optim import projectors

OFFICIAL_KEYS = (
    "lr", "betas", "eps", "weight_decay", "correct_bias", "rank", "update_proj_gap", "alpha", "proj_type",
)  # fmt: skip


def pack(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What ``Optimizer.state_dict`` made, without seeded bases and without callables."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    seeded = {i for g in groups if g.get("projector") == "random" and "rank" in g for i in g["params"]}
    for group in groups:
        if callable(group.get("projector")):
            group["projector"] = None
    state = {
        i: {key: value for key, value in entry.items() if key != "projector" or i not in seeded}
        for i, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state, "param_groups": groups}


def _parameters(optimizer: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    return [(p, group) for group in optimizer.param_groups for p in group["params"]]


def unpack(state_dict: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """A checkpoint in our form, checked against the optimizer's parameters."""
    state_dict = {**state_dict, "state": {i: dict(entry) for i, entry in state_dict["state"].items()}}
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    places = optimizer._places()
    for i, (p, group) in zip(ids, _parameters(optimizer), strict=False):
        entry = state_dict["state"].get(i)
        if not entry:
            continue
        # What torch's flattened optimizer states give for a tensor that was not saved: a seeded basis.
        if isinstance(entry.get("projector"), dict):
            del entry["projector"]
        if hasattr(entry.get("projector"), "ortho_matrix"):
            _from_official(entry, p)
        if not isinstance(entry.get("step"), Tensor):
            entry["step"] = torch.tensor(float(entry.get("step", 0)))
        low = "schedule" in entry
        if low != ("rank" in group and p.ndim >= 2):
            kind, other = ("projected", "dense") if low else ("dense", "projected")
            raise ValueError(f"fira: the checkpoint has parameter {i} {kind}, the optimizer has it {other}")
        if low:
            _check_low(i, entry, p, places)
        elif entry["exp_avg"].shape != p.shape:
            got = list(entry["exp_avg"].shape)
            raise ValueError(f"fira: the checkpoint's parameter {i} is {got}, the optimizer's {list(p.shape)}")
    return state_dict


def _check_low(i: int, entry: dict[str, Any], p: Tensor, places: Any) -> None:
    m, n = p.shape[0], math.prod(p.shape[1:])
    left = bool(entry["left"])
    moment = tuple(entry["exp_avg"].shape)
    rank = moment[0] if left else moment[1]
    if moment != ((rank, n) if left else (m, rank)) or rank > min(m, n):
        raise ValueError(
            f"fira: the checkpoint's parameter {i} has moments {list(moment)}, which do not belong to a matrix "
            f"[{m}, {n}] with the projector on the {'left' if left else 'right'}"
        )
    wanted = (m, rank) if left else (rank, n)
    if "projector" in entry and tuple(entry["projector"].shape) != wanted:
        got = list(entry["projector"].shape)
        raise ValueError(f"fira: the checkpoint's parameter {i} has a projector {got}; expected {list(wanted)}")


def restore(state_dict: dict[str, Any], optimizer: Any) -> None:
    """Give every state tensor the dtype it was saved with: ``Optimizer.load_state_dict`` casts to the parameter's.

    Also makes seeded bases anew. Schedules stay on the CPU.
    """
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    places = optimizer._places()
    for i, (p, _) in zip(ids, _parameters(optimizer), strict=True):
        entry = state_dict["state"].get(i, {})
        left = bool(entry["left"]) if "left" in entry else None
        for key, value in entry.items():
            if isinstance(value, Tensor):
                device = torch.device("cpu") if key in ("schedule", "left") else p.device
                optimizer.state[p][key] = _placed(p, key, value.detach().clone().to(device), left)
        state = optimizer.state.get(p)
        if state and "schedule" in state and "projector" not in state:
            left = bool(state["left"])
            moment = state["exp_avg"]
            seed = optimizer._seed_of(places[p][0], int(state["schedule"][1]) - 1)
            like = torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape[0], math.prod(p.shape[1:]))
            basis = projectors.random(like, None, moment.shape[0] if left else moment.shape[1], left, seed)
            state["projector"] = _placed(p, "projector", (basis if left else basis.mT).to(p.dtype).contiguous(), left)


def _placed(p: Tensor, key: str, value: Tensor, left: bool | None) -> Tensor:
    """Whole for a plain parameter, cut for a DTensor."""
    if hasattr(p, "_local_tensor") or hasattr(value, "_local_tensor"):
        from pyelastic.distributed._fira_shards import restored

        return restored(p, key, value, left)
    return value


def _whole(x: Tensor) -> Tensor:
    """Of a DTensor all of it, for which all its ranks must ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _from_official(entry: dict[str, Any], p: Tensor) -> None:
    """A state entry of fira 1.0.2 in our form: its projector object as a tensor, its int step as a tensor."""
    projector = entry.pop("projector")
    entry["projector"] = projector.ortho_matrix.detach().clone().contiguous()
    left = projectors.side_is_left((p.shape[0], math.prod(p.shape[1:])), projector.proj_type)
    steps, gap = int(entry["step"]), int(projector.update_proj_gap)
    # It refreshes at the calls 0, gap, 2 gap, ...
    done = -(-steps // gap)
    entry["schedule"] = torch.tensor([steps, done, done * gap, 1])
    entry["left"] = torch.tensor(left)
    norm = entry.get("scaling_grad")
    norm = torch.tensor(math.nan) if norm is None else norm.detach().clone()
    entry["scaling_grad"] = norm.to(torch.float64 if norm.dtype == torch.float64 else torch.float32)


def to_official_state_dict(optimizer: Any, projector_class: Any = None) -> dict[str, Any]:
    """The optimizer's state as ``fira.FiraAdamW.state_dict()`` has it, for its ``load_state_dict``.

    ``projector_class``: fira's GradientProjector; None imports the package (ImportError without it). Moments in the
    parameter's dtype, as there. ValueError for 8-bit moments or a schedule that the package cannot express.
    """
    if projector_class is None:
        projector_class = importlib.import_module("fira.gradient_projection").GradientProjector
    plain = torch.optim.Optimizer.state_dict(optimizer)
    groups, state = [], {}
    for group, saved in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        if "rank" in group and (group["mode"] != "official" or optimizer._stagger or optimizer._adaptive_gap):
            raise ValueError("fira: the published package has only mode 'official', with a fixed gap and no stagger")
        groups.append({key: saved[key] for key in (*OFFICIAL_KEYS, "params") if key in saved})
        for i, p in zip(saved["params"], group["params"], strict=True):
            entry = optimizer.state.get(p)
            if not entry:
                continue
            if "exp_avg_scale" in entry:
                raise ValueError("fira: the published package has no 8-bit moments")
            out: dict[str, Any] = {"step": int(entry["step"])}
            for key in ("exp_avg", "exp_avg_sq"):
                out[key] = _whole(entry[key].detach()).to(p.dtype).clone()
            if "schedule" in entry:
                projector = projector_class(
                    group["rank"], update_proj_gap=group["update_proj_gap"], alpha=group["alpha"],
                    proj_type=group["proj_type"],
                )  # fmt: skip
                projector.ortho_matrix = _whole(entry["projector"].detach()).clone()
                out["projector"] = projector
                if not bool(entry["scaling_grad"].isnan()):
                    out["scaling_grad"] = entry["scaling_grad"].detach().to(p.dtype).clone()
            state[i] = out
    return copy.deepcopy({"state": state, "param_groups": groups})
