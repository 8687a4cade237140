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
    sizes = {"rows": "i32", "D": "i32", "s_residual": "i64", "s_out": "i64", "s_grad": "i64", "s_y": "i64"}
    for arch in compiled.ARCHS:
        for dtype in ("bf16", "fp32"):
            for width in (128, kernels.PROJECTION_WIDEST):
                blocks = {"BLOCK": kernels.PROJECTION_ELEMENTS // width, "BLOCK_D": width}
                for name, options in (("forward", flags), ("backward", {"NORMALIZE": True})):
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
    return found
