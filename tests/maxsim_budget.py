"""Compile requests of maxsim's Triton kernels, for kernel_budget.py."""

from __future__ import annotations

from typing import Any

import compiled

MODULE = "pyelastic.triton_kernels.maxsim"
TYPES = {16: "bfloat16", 32: "float32"}
FACTORS = {"Q_INV": True, "D_INV": True}
LAYOUT: dict[str, Any] = {"LIST": False, "HAS_MASK": True}
GRADIENT = {"LIST": False, "PER_TOKEN": False, "HAS_WEIGHTS": True, "ADD": False}


def _signature(bits: int, stored: int) -> dict[str, str]:
    floats = ("inv", "q_inv", "d_inv", "centroids", "buckets", "maxima", "weights", "grad", "scores", "parts")
    ints = ("q_first", "d_first", "pair_q", "pair_d", "order", "order_first", "query_of")
    pointers = {f"p_{n}": "*fp32" for n in floats} | {f"p_{n}": "*i64" for n in ints}
    pointers |= dict.fromkeys(("p_q", "p_d", "p_x", "p_out"), {16: "*bf16", 32: "*fp32"}[bits])
    pointers |= {"p_d": {8: "*i8", 2: "*u8"}[stored]} if stored else {}
    pointers |= {"p_codes": "*i32", "p_mask": "*u8", "p_floor": "*u8", "p_winners": "*i16"}
    sizes = ("tokens", "rows", "width", "tiles", "splits", "parts", "count", "blocks", "longest", "n")
    strides = ("s_q", "s_d", "s_x", "s_out", "s_centroid", "s_g0", "s_g1", "s_q_inv", "s_d_inv", "planes")
    pointers |= {"ends_0": "i64", "ends_4": "i64"}
    return pointers | dict.fromkeys((*sizes, *strides), "i32") | {"temperature": "fp32", "scale": "fp32"}


def requests() -> dict[str, dict[str, Any]]:
    """name -> request, for every configuration and architecture, normalised and with a mask."""
    from pyelastic.ops import _maxsim_triton as launcher

    pieces = launcher.pieces
    maxsim, maxsim_backward, maxsim_smooth, several = launcher._kernels()
    found: dict[str, dict[str, Any]] = {}

    def add(
        name: str, kernel: str, bits: int, constants: dict[str, Any], warps: int, stages: int,
        archs: tuple[int, ...] = compiled.ARCHS,
    ) -> None:  # fmt: skip
        for arch in archs:
            found[f"triton maxsim {name} (sm_{arch})"] = {
                "kernel": f"{MODULE}{kernel}", "signature": _signature(bits, constants.get("BITS", 0)),
                "constants": constants, "arch": arch,
                "multiples_of_16": ["s_q", "s_d", "s_x", "s_out", "s_centroid"], "warps": warps, "stages": stages,
            }  # fmt: skip

    tables = (((80,), maxsim.MAXSIM_CONFIGS), ((90, 100), maxsim.MAXSIM_CONFIGS_SM90))
    configs = [(archs, *item) for archs, table in tables for item in table.items()]
    for archs, (bits, width), (block_q, block_d, block_k, warps, stages) in configs:
        dim = width or 768
        common = {
            **LAYOUT, **FACTORS, **pieces(dim, block_k), "D": dim, "OPERAND": TYPES[bits], "BITS": 0,
            "BLOCK_Q": block_q, "BLOCK_D": block_d,
        }  # fmt: skip
        options = {"HAS_FLOOR": True, "MAXIMA": True, "WINNERS": True}
        name = f"{TYPES[bits]} D{width or ' any'}"
        add(f"forward {name}", ":forward", bits, common | options, warps, stages, archs)
        if width == 128:
            listed = common | options | {"LIST": True, "BLOCK_Q": 32, "HAS_FLOOR": False}
            add(f"forward list {name}", ":forward", bits, listed, 4, stages, archs)
            quantised = common | options | {"WINNERS": False, "HAS_FLOOR": False, "BITS": 8}
            add(f"forward int8 {name}", ":forward", bits, quantised, warps, stages, archs)
        if bits == 32:
            quantised = options | {"WINNERS": False, "HAS_FLOOR": False, "BITS": 2}
            add(f"forward 2-bit {name}", ":forward", bits, common | quantised, warps, stages, archs)
        if width == 128 or bits == 32:
            for topk, (most_q, most_d) in several.MAXSIM_TOPK_TILES.items():
                tile = {"BLOCK_Q": min(block_q, most_q), "BLOCK_D": min(block_d, most_d)}
                some = {"MAXIMA": True, "WINNERS": True, "TOPK": topk, "SLOTS": topk, **tile}
                add(f"forward top-{topk} {name}", "_several:forward_topk", bits, common | some, warps, stages, archs)
            add(f"smooth_forward {name}", "_smooth:forward_smooth", bits, common, warps, stages, archs)
            narrow = common | options | pieces(96, block_k) | {"D": 96}
            add(f"forward D96 {TYPES[bits]}", ":forward", bits, narrow, warps, stages, archs)
    for bits in several.MAXSIM_PREFIX_CONFIGS:
        for prefixes in ((64, 128), (64, 128, 256, 512, 768), tuple(range(96, 769, 96))):
            constants = launcher.prefix_constants(several, prefixes, bits)
            warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
            options = {"HAS_FLOOR": True, "MAXIMA": True, "WINNERS": True, "OPERAND": TYPES[bits], "BITS": 0}
            name = f"forward {len(prefixes)} prefixes of {prefixes[-1]} {TYPES[bits]}"
            add(name, "_several:forward_prefixes", bits, LAYOUT | FACTORS | options | constants, warps, stages)
    for (bits, width), (own, other, warps, stages) in maxsim_backward.MAXSIM_BACKWARD_CONFIGS.items():
        common = {**GRADIENT, "Q_INV": True, "JACOBIAN": True, "TOPK": 1, "D": width, "WIDTH": width}
        blocks = {"BLOCK_D": own, "BLOCK_Q": other}
        name = f"{TYPES[bits]} D{width}"
        add(f"grad_documents {name}", "_backward:grad_documents", bits, common | blocks, warps, stages)
        if width == 128:
            listed = {"LIST": True, "PER_TOKEN": True, "HAS_WEIGHTS": False, "TOPK": 2}
            pairs = common | blocks | listed
            add(f"grad_documents list {name}", "_backward:grad_documents", bits, pairs, warps, stages)
        common = {**common, "D_INV": True, "BITS": 0, "UNROLL": maxsim_backward.GATHER_UNROLL}
        del common["Q_INV"]
        common["BLOCK_Q"] = maxsim_backward.GATHER_ELEMENTS // width
        add(f"grad_queries {name}", "_backward:grad_queries", bits, common, 4, 3)
        if width == 128:
            add(f"grad_queries list {name}", "_backward:grad_queries", bits, common | listed, 4, 3)
    for (bits, width), (own, other, block_k, warps, stages) in maxsim_smooth.MAXSIM_SMOOTH_CONFIGS.items():
        common = {
            **GRADIENT, **FACTORS, **pieces(width, block_k), "HAS_MASK": True, "JACOBIAN": True, "D": width,
            "WIDTH": width, "OPERAND": TYPES[bits],
        }  # fmt: skip
        name = f"{TYPES[bits]} D{width}"
        blocks = {"BLOCK_D": own, "BLOCK_Q": other}
        add(f"smooth_grad_documents {name}", "_smooth:grad_documents_smooth", bits, common | blocks, warps, stages)
        if width == 128:
            listed = common | blocks | {"LIST": True, "BLOCK_Q": 32}
            add(f"smooth_grad_documents list {name}", "_smooth:grad_documents_smooth", bits, listed, warps, stages)
        blocks = {"BLOCK_Q": own, "BLOCK_D": other, "BITS": 0}
        add(f"smooth_grad_queries {name}", "_smooth:grad_queries_smooth", bits, common | blocks, warps, stages)
    norms = {"D": 128, "BITS": 0, "BLOCK": 16, "BLOCK_K": 128}
    add("inverse_norms", ":inverse_norms", 16, norms, 4, 3)
    add("inverse_norms of 2-bit residuals", ":inverse_norms", 16, norms | {"BITS": 2}, 4, 3)
    sums = {"LIST": False, "HAS_WEIGHTS": True, "BLOCK_N": 16, "BLOCK": 32}
    add("sum_tokens", ":sum_tokens", 16, sums, 4, 3)
    finish = {"D": 768, "INV": True, "ADD": False, "BLOCK": maxsim_backward.GATHER_ELEMENTS // 1024, "WIDTH": 1024}
    add("finish_rows", "_backward:finish_rows", 16, finish, 4, 3)
    return found
