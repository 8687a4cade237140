"""Compile requests of norm_linear_attention's Triton kernels, for kernel_budget.py."""

from __future__ import annotations

import inspect
from typing import Any

import compiled

MODULE = "pyelastic.triton_kernels.norm_linear_attention"
STRIDES = [f"s_{x}{y}" for x in (*"qkvgo", "dq", "dk", "dv", "dg") for y in "bnh"]
LIMITED = ("forward", "grad_queries")


def _signature(dtype: str) -> dict[str, str]:
    pointers = {f"p_{n}": f"*{dtype}" for n in ("q", "k", "v", "gate", "o", "grad", "dq", "dk", "dv", "dgate")}
    floats = ("params", "sin", "cos", "s", "z", "x", "initial", "final", "d", "dd", "ds", "dz", "dparams", "last")
    pointers |= {f"p_{n}": "*fp32" for n in floats}
    pointers |= {f"p_{n}": "*i64" for n in ("start", "count", "offsets", "sequence", "part")}
    sizes = ("N", "keys", "queries", "tiles", "parts", "heads", "group", "width")
    scalars = dict.fromkeys(("key_power", "alpha", "eps", "norm_eps"), "fp32")
    return pointers | dict.fromkeys((*sizes, *STRIDES), "i32") | scalars


def requests() -> dict[str, dict[str, Any]]:
    """name -> request: each width of head, bidirectional and causal with every option that costs registers."""
    from pyelastic.triton_kernels import norm_linear_attention as forward
    from pyelastic.triton_kernels import norm_linear_attention_backward as backward

    found: dict[str, dict[str, Any]] = {}

    def add(name: str, module: Any, kernel: str, dtype: str, constants: dict[str, Any]) -> None:
        known = inspect.signature(getattr(module, kernel).fn).parameters
        for arch in compiled.ARCHS:
            found[f"triton norm_linear_attention {name} (sm_{arch})"] = {
                "kernel": f"{module.__name__}:{kernel}", "signature": _signature(dtype),
                "constants": {k: v for k, v in constants.items() if k in known}, "arch": arch,
                "multiples_of_16": STRIDES, "warps": forward.WARPS, "stages": 1,
            }  # fmt: skip
            # as the launcher does
            if constants.get("CAUSAL") if kernel == "grad_keys" else dtype == "fp32" and kernel in LIMITED:
                found[f"triton norm_linear_attention {name} (sm_{arch})"]["maxnreg"] = forward.REGISTERS

    for dtype in ("bf16", "fp32"):
        precision = "bf16" if dtype == "bf16" else "tf32x3"
        bits = {"bf16": 16, "fp32": 32}[dtype]
        for (of, width), (read, back) in forward.NORM_LINEAR_ATTENTION_CONFIGS.items():
            if of != bits:
                continue
            for causal in (False, True):
                constants = {
                    "D": width, "DV": width, "HD": max(16, width // 2), "BV": min(read[1], width), "BT": read[0],
                    "PART": 128, "MAP": 0, "CUBE": True, "ROPE": 1, "PACKED": causal, "HAS_START": causal,
                    "HAS_COUNT": True, "HAS_GATE": True, "CAUSAL": causal, "ALONE": False, "MEAN": True,
                    "PRECISION": precision,
                }  # fmt: skip
                later = constants | {"BV": min(back[1], width), "BT": back[0]}
                name = f"{'causal ' if causal else ''}{dtype} D{width}"
                add(f"forward {name}", forward, "forward", dtype, constants)
                add(f"grad_queries {name}", backward, "grad_queries", dtype, later)
                add(f"grad_keys {name}", backward, "grad_keys", dtype, later)
                if width == 64:
                    alone = {"ALONE": True, "PACKED": False}
                    add(f"forward alone {name}", forward, "forward", dtype, constants | alone)
                    add(f"grad_queries alone {name}", backward, "grad_queries", dtype, later | alone)
                    add(f"grad_keys alone {name}", backward, "grad_keys", dtype, later | alone)
                if not causal:
                    add(f"state {name}", forward, "state", dtype, constants)
                    add(f"grad_state {name}", backward, "grad_state", dtype, later)
                    if width == 64:
                        cosine = {"MAP": 1, "CUBE": False}
                        add(f"forward cosine {name}", forward, "forward", dtype, constants | cosine)
                        add(f"grad_queries cosine {name}", backward, "grad_queries", dtype, later | cosine)
                        add(f"grad_keys cosine {name}", backward, "grad_keys", dtype, later | cosine)
                        mala = {"MAP": 4, "HAS_GATE": False}
                        add(f"forward mala {name}", forward, "forward", dtype, constants | mala)
                        add(f"grad_queries mala {name}", backward, "grad_queries", dtype, later | mala)
                        add(f"grad_keys mala {name}", backward, "grad_keys", dtype, later | mala)
                        add(f"state mala {name}", forward, "state", dtype, constants | mala)
                        add(f"grad_state mala {name}", backward, "grad_state", dtype, later | mala)
    scan = {"PART": 128, "EXCLUSIVE": True, "REVERSE": True, "HAS_INITIAL": True, "PACKED": True}
    add("scan", forward, "scan", "fp32", scan | {"BLOCK": forward.SCAN_BLOCK})
    return found
