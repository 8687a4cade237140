"""Compile requests of fira's Triton kernels, for kernel_budget.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import compiled

MODULE = "pyelastic.triton_kernels.fira"
NAMES = {16: "bfloat16", 32: "float32"}
SHORT = {16: "bf16", 32: "fp32"}
NUMBERS = (
    "beta1", "rest1", "beta2", "rest2", "eps", "log_beta1", "log_beta2", "weight_decay", "gamma", "a_r", "a_n", "a_s",
    "most",
)  # fmt: skip
# The plain step, with a gradient factor and found_inf as a GradScaler gives them.
PLAIN = {
    "ALIGNED": True, "MOMENT": "float32", "EIGHT": False, "HAS_GRAM": False, "HAS_FACTOR": True, "HAS_INF": True,
    "MAXIMIZE": False, "PAPER": True, "HAS_S": True, "PER_MATRIX": False, "COLLAPSE": False, "BACK": True,
    "HAS_REST": False, "STOCHASTIC": False,
}  # fmt: skip


def requests() -> dict[str, dict[str, Any]]:
    """name -> request: both operand widths, both sides, aligned or not, and the storage of moments and weights."""
    from pyelastic.triton_kernels import fira as kernels

    found: dict[str, dict[str, Any]] = {}
    tables = dict.fromkeys(("p_table", "p_first"), "*i64")
    pointers = {"p_scratch": "*fp32", "p_factor": "*fp32", "p_inf": "*fp32", "p_lr": "*fp64"}
    signature = {**tables, **pointers, **dict.fromkeys(NUMBERS, "fp32")}

    def add(name: str, kernel: str, arch: int, config: Sequence[int], **options: Any) -> None:
        blocks = dict(zip(("BLOCK_L", "BLOCK_N", "BLOCK_K"), config, strict=False))
        known = getattr(kernels, kernel).arg_names
        constants = {k: v for k, v in (PLAIN | blocks | options).items() if k in known}
        found[f"triton fira {name} (sm_{arch})"] = {
            "kernel": f"{MODULE}:{kernel}", "signature": signature, "constants": constants, "arch": arch,
            "warps": options.get("warps", config[-2]), "stages": options.get("stages", config[-1]),
        }  # fmt: skip

    for arch in compiled.ARCHS:
        for (bits, aligned), config in kernels.FIRA_CONFIGS.items():
            for side in ("right", "left"):
                at: dict[str, Any] = {"LEFT": side == "left", "ALIGNED": aligned, "OPERAND": NAMES[bits]}
                name = f"{SHORT[bits]} {side}{'' if aligned else ' unaligned'}"
                add(f"project {name}", "project", arch, config, **at)
                add(f"residual {name}", "residual", arch, kernels.FIRA_CONFIGS[32, aligned], **at)
                wide = {"warps": kernels.WIDE_WARPS}
                add(f"apply {name}", "apply", arch, config, **at)
                eight = {"EIGHT": True, "MOMENT": "int8", **(wide if bits == 16 else {})}
                add(f"apply 8-bit {name}", "apply", arch, config, **at, **eight)
                if bits == 16:
                    add(f"apply compensated {name}", "apply", arch, config, **at, HAS_REST=True)
                    add(f"apply stochastic {name}", "apply", arch, config, **at, STOCHASTIC=True, **wide)
        for (eight_bits, gram), config in kernels.MOMENTS_CONFIGS.items():
            for side in ("right", "left"):
                kind = f"{' 8-bit' if eight_bits else ''}{' gram' if gram else ''}"
                stored = {"EIGHT": eight_bits, "MOMENT": "int8" if eight_bits else "float32", "HAS_GRAM": gram}
                add(f"moments{kind} {side}", "moments", arch, (*config, 3), LEFT=side == "left", **stored)
        limiter = (kernels.LIMITER_BLOCK, kernels.LIMITER_WARPS, 3)
        for kernel in ("limiter", "limiter_exact"):
            for per_matrix in (False, True):
                name = f"{kernel}{' per matrix' if per_matrix else ''}"
                add(name, kernel, arch, limiter, PER_MATRIX=per_matrix, BLOCK_L=limiter[0])
    return found
