"""Which parameters of a model are projected: parameter groups in the published package's form, with a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Coverage:
    """What ``divide_params`` chose: names and element counts."""

    projected: tuple[str, ...]
    dense: tuple[str, ...]
    projected_elements: int
    dense_elements: int

    @property
    def share(self) -> float:
        """Elements that are projected, of all trainable ones."""
        return self.projected_elements / max(self.projected_elements + self.dense_elements, 1)

    def __str__(self) -> str:
        return (
            f"{len(self.projected)} parameters projected, {len(self.dense)} dense: "
            f"{self.projected_elements} of {self.projected_elements + self.dense_elements} elements ({self.share:.1%})"
        )


def divide_params(
    model: nn.Module,
    target_modules: Sequence[str] | Callable[[str, nn.Module], bool] | None = None,
    *,
    rank: int = 128,
    update_proj_gap: int = 200,
    alpha: float = 1.0,
    proj_type: str = "std",
    return_coverage: bool = False,
    **options: Any,
) -> Any:
    """Two parameter groups for ``Fira``: weights of the chosen modules with ``rank`` and the rest without.

    Args:
        target_modules: substrings of module names, e.g. ``["attn", "mlp"]``; or ``f(name, module) -> bool``; or None
            for every Linear and convolution. Of a chosen module (and of its submodules, by name) the ``weight`` of at
            least two dimensions is projected; embeddings only where they are named or chosen.
        rank, update_proj_gap, alpha, proj_type: the group's keys. ``options``: further keys of the projected group.
        return_coverage: also return a ``Coverage``.

    A weight that several modules share is listed once, projected if any of them is chosen.

    Raises:
        ValueError: no parameter matched, with the modules there are: the group would silently be plain Adam.
    """
    chosen: set[int] = set()
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    candidates = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim < 2 or not weight.requires_grad:
            continue
        candidates.append(name)
        if target_modules is None:
            hit = isinstance(module, kinds)
        elif callable(target_modules):
            hit = target_modules(name, module)
        else:
            hit = any(target in name for target in target_modules)
        if hit:
            chosen.add(id(weight))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]  # shared ones once
    projected = [(name, p) for name, p in trainable if id(p) in chosen]
    dense = [(name, p) for name, p in trainable if id(p) not in chosen]
    if not projected:
        raise ValueError(
            f"divide_params: target_modules {target_modules!r} matches no weight of two or more dimensions; the model "
            f"has {', '.join(candidates) or 'none'}"
        )
    keys = {"rank": rank, "update_proj_gap": update_proj_gap, "alpha": alpha, "proj_type": proj_type, **options}
    groups: list[dict[str, Any]] = [{"params": [p for _, p in projected], **keys}]
    if dense:
        groups.append({"params": [p for _, p in dense]})
    if not return_coverage:
        return groups
    sizes = [sum(p.numel() for _, p in part) for part in (projected, dense)]
    return groups, Coverage(tuple(name for name, _ in projected), tuple(name for name, _ in dense), *sizes)
