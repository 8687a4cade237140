"""Compile requests of fira's Triton kernels, for kernel_budget.py."""

from __future__ import annotations

from typing import Any

import compiled

MODULE = "pyelastic.triton_kernels.fira"


def requests() -> dict[str, dict[str, Any]]:
    """name -> request: both operand widths, the right side (unit strides along coordinates) and the left."""
    from pyelastic.triton_kernels import fira as kernels

    found: dict[str, dict[str, Any]] = {}
    sizes = dict.fromkeys(("L", "D", "R"), "i32")
    strides = [f"s_{a}{b}" for a, b in ("xl", "xd", "wl", "wd", "el", "ed", "pd", "pr", "rl", "rr")]
    numbers = ("beta1", "rest1", "beta2", "rest2", "eps", "a_n", "a_r", "a_s", "gamma", "most")
    floats = dict.fromkeys(numbers, "fp32")
    state = dict.fromkeys(("p_r", "p_m", "p_v", "p_gram", "p_stats", "p_scalars", "p_f", "p_norm"), "*fp32")
    state |= {"p_m_scale": "*fp32", "p_v_scale": "*fp32"}
    codes = {"p_m": "*i8", "p_v": "*u8"}
    for arch in compiled.ARCHS:
        for bits, (block_l, block_n, block_k, warps, stages) in kernels.FIRA_CONFIGS.items():
            operand = {16: "*bf16", 32: "*fp32"}[bits]
            moved = dict.fromkeys(("p_x", "p_p", "p_w", "p_rest"), operand)
            blocks = {"BLOCK_L": block_l, "BLOCK_N": block_n, "BLOCK_K": block_k}
            for side, units in (("right", ("s_xd", "s_wd", "s_ed", "s_pd", "s_rr")),
                                ("left", ("s_xl", "s_wl", "s_el", "s_pr", "s_rl"))):  # fmt: skip
                common = {
                    "signature": {**sizes, **dict.fromkeys(strides, "i64"), **floats, **state, **moved,
                                  "seed_low": "i64", "seed_high": "i64"},
                    "multiples_of_16": ["L", "D", "R", *(s for s in strides if s not in units)],
                    "arch": arch,
                }  # fmt: skip
                name = f"{operand[1:]} {side} (sm_{arch})"
                constants = dict.fromkeys(units, 1)
                tile = {"warps": warps, "stages": stages}
                found[f"triton fira project {name}"] = {
                    **common, **tile, "kernel": f"{MODULE}:project",
                    "constants": {k: v for k, v in constants.items() if k[2] not in "we"} | blocks,
                }  # fmt: skip
                exact = kernels.FIRA_CONFIGS[32]
                found[f"triton fira residual {name}"] = {
                    **common, "warps": exact[3], "stages": exact[4], "kernel": f"{MODULE}:residual",
                    "constants": {k: v for k, v in constants.items() if k[2] not in "we"}
                    | dict(zip(("BLOCK_L", "BLOCK_N", "BLOCK_K"), exact[:3], strict=True)),
                }  # fmt: skip
                for extra, options in (
                    ("", {"HAS_REST": False, "STOCHASTIC": False}),
                    ("8-bit ", {"HAS_REST": False, "STOCHASTIC": False}),
                    ("compensated ", {"HAS_REST": True, "STOCHASTIC": False}),
                    ("stochastic ", {"HAS_REST": False, "STOCHASTIC": True}),
                ):
                    if bits == 32 and extra not in ("", "8-bit "):
                        continue
                    eight = extra == "8-bit "
                    wide = {"warps": kernels.WIDE_WARPS} if options["STOCHASTIC"] or (eight and bits == 16) else {}
                    found[f"triton fira apply {extra}{name}"] = {
                        **common, **tile, **wide, "kernel": f"{MODULE}:apply",
                        "signature": common["signature"] | (codes if eight else {}),
                        "constants": {**constants, **blocks, **options, "BACK": True, "EIGHT": eight},
                    }  # fmt: skip
        for exact_norm, per_matrix in ((False, False), (True, False), (False, True)):
            kind = f"{' exact' if exact_norm else ''}{' per matrix' if per_matrix else ''}"
            found[f"triton fira limiter{kind} (sm_{arch})"] = {
                "kernel": f"{MODULE}:limiter",
                "signature": {**sizes, **floats, **state},
                "constants": {"EXACT": exact_norm, "PER_MATRIX": per_matrix, "COLLAPSE": False,
                              "BLOCK": kernels.LIMITER_BLOCK},
                "multiples_of_16": ["L"],
                "arch": arch, "warps": kernels.LIMITER_WARPS, "stages": 3,
            }  # fmt: skip
        for (eight, gram), (block_l, block_n, block_k, warps) in kernels.MOMENTS_CONFIGS.items():
            kind = f"{' 8-bit' if eight else ''}{' gram' if gram else ''}"
            found[f"triton fira moments{kind} (sm_{arch})"] = {
                "kernel": f"{MODULE}:moments",
                "signature": {**sizes, "s_rl": "i64", "s_rr": "i64", **floats, **state, **(codes if eight else {})},
                "constants": {"s_rr": 1, "HAS_GRAM": gram, "EIGHT": eight, "BLOCK_L": block_l, "BLOCK_N": block_n,
                              "BLOCK_K": block_k},
                "multiples_of_16": ["L", "R", "s_rl"],
                "arch": arch, "warps": warps, "stages": 3,
            }  # fmt: skip
    return found
