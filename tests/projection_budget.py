"""Compile requests of projection's Triton kernels, for kernel_budget.py."""

from __future__ import annotations

from typing import Any

import compiled

MODULE = "pyelastic.triton_kernels.projection"


def requests() -> dict[str, dict[str, Any]]:
    """name -> request: every option in use, a narrow and the widest tile, a dtype of 16 bits and float32."""
    from pyelastic.triton_kernels import projection as kernels

    found: dict[str, dict[str, Any]] = {}
    flags = {"HAS_BIAS": True, "HAS_RESIDUAL": True, "NORMALIZE": True}
    floats = dict.fromkeys(("p_z", "p_bias", "p_inverse", "p_dz"), "*fp32")
    sizes = {"rows": "i32", "D": "i32"}
    sizes |= dict.fromkeys(("s_residual", "s_out", "s_grad", "s_y", "s_part"), "i64")
    for arch in compiled.ARCHS:
        for dtype in ("bf16", "fp32"):
            for width in (128, kernels.PROJECTION_WIDEST):
                blocks = {"BLOCK": kernels.PROJECTION_ELEMENTS // width, "BLOCK_D": width}
                for name, options in (("forward", flags), ("backward", {"NORMALIZE": True, "PARTS": False})):
                    found[f"triton projection {name} {dtype} D{width} (sm_{arch})"] = {
                        "kernel": f"{MODULE}:{name}",
                        "signature": {
                            **floats,
                            **sizes,
                            **dict.fromkeys(("p_residual", "p_out", "p_grad", "p_y"), f"*{dtype}"),
                        },
                        "constants": {**options, **blocks},
                        "multiples_of_16": ["D", "s_residual", "s_out", "s_grad", "s_y"],
                        "arch": arch,
                        "warps": kernels.PROJECTION_WARPS,
                        "stages": 3,
                    }
    types = {16: "bfloat16", 32: "float32"}
    for arch in compiled.ARCHS:
        for (bits, width), (block, block_k, warps, stages) in kernels.PROJECTION_LINEAR_CONFIGS.items():
            names = ("p_x", "p_w", "p_residual", "p_residual_w", "p_out")
            strides = dict.fromkeys(("s_x", "s_w", "s_residual", "s_residual_w", "s_out"), "i64")
            for name, options in (("", {"PROJECTED": False}), (" of two", {"PROJECTED": True, "HAS_RESIDUAL": False})):
                found[f"triton projection linear{name} {types[bits]} D{width} (sm_{arch})"] = {
                    "kernel": f"{MODULE}:linear",
                    "signature": {
                        **floats, **strides, **dict.fromkeys(names, {16: "*bf16", 32: "*fp32"}[bits]),
                        "rows": "i32", "D": "i32", "K": "i32", "KR": "i32",
                    },
                    "constants": {
                        **flags, **options, "OPERAND": types[bits], "BLOCK": block, "WIDTH": width, "BLOCK_K": block_k,
                    },
                    "multiples_of_16": ["D", "K", "KR", *strides], "arch": arch, "warps": warps, "stages": stages,
                }  # fmt: skip
    return found
