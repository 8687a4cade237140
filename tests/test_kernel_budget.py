"""Every kernel for sm_80, sm_90 and sm_100: no spills, shared memory that fits, matrix instructions where meant.

The figures are held against tests/data/kernel_budget.json: more registers or shared memory than it says is a
regression to be looked at (and then, if meant, written with ``python tests/kernel_budget.py --write``).
"""

import functools
import importlib.util
import json

import compiled
import kernel_budget
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton and the tools in its wheel"),
]
BUDGET = json.loads(kernel_budget.BUDGET.read_text())
# Kernels that are GEMMs; the others must not be forced to contain any.
MATRIX = ("accumulate_tile", "gradient_tile", "gemm", "triton forward", "triton grad", "triton gradient_tile")
MATRIX += ("project_mma", "apply_mma")
FIRA = ("project", "apply", "moments gram", "moments 8-bit gram", "residual")
MATRIX += tuple(f"triton fira {stem}" for stem in FIRA)
MATRIX += ("maxsim forward", "maxsim smooth_", "maxsim grad_documents")
MATRIX += ("cuda sweep<Mma", "projection_linear_mma", "triton projection linear")
MATRIX += tuple(f"norm_linear_attention {stem}" for stem in ("state", "forward", "grad_"))
PASSES = ("state", "forward", "queries", "grad_state", "keys", "whole_forward", "whole_backward")
MATRIX += tuple(f"cuda nla_{stem}_mma<" for stem in PASSES)


@functools.cache
def figures():
    return kernel_budget.measure()


def of(backend):
    found = {name: f for name, f in figures().items() if name.startswith(backend)}
    if backend == "cuda" and not found:
        pytest.skip("the CUDA kernels were not built here")
    return found


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_all_kernels_are_compiled_for_all_architectures(backend):
    found = of(backend)
    failed = {name: f["error"] for name, f in found.items() if "error" in f}
    assert not failed
    if backend == "cuda":
        kernels = {name.rpartition(" (")[0] for name in found}
        assert all(f"{kernel} (sm_{arch})" in found for kernel in kernels for arch in ("80", "90a", "100"))
    assert set(found) == {name for name in BUDGET if name.startswith(backend)}


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_no_kernel_spills(backend):
    assert {name: f for name, f in of(backend).items() if f["stack"] + f["local"]} == {}


def test_triton_kernels_fit_their_architecture():
    assert {name: compiled.refusal(f) for name, f in of("triton").items() if compiled.refusal(f)} == {}


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_tensor_cores_are_used_where_meant(backend):
    for name, f in of(backend).items():
        meant = any(stem in name for stem in MATRIX)
        assert (f["matrix"] > 0) == meant, (name, f)


def test_no_triton_address_is_multiplied_in_32_bits():
    for name, f in of("triton").items():
        assert f["int32_multiplications"] == 0, name


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_within_the_committed_budget(backend):
    over = {}
    for name, f in of(backend).items():
        allowed = BUDGET[name]
        if f["registers"] > allowed["registers"] or f["shared"] > allowed["shared"]:
            over[name] = (f, allowed)
    assert over == {}


def test_a_planted_glutton_is_refused():
    """The largest fused tile at twice its size: it must spill or exceed shared memory, and the check must say so."""
    name = "triton grad_e float16 D512 (sm_80)"
    request = json.loads(json.dumps(kernel_budget.triton_requests()[name]))
    request["constants"] |= {"BLOCK_B": 128, "BLOCK_C": 64}
    (f,) = compiled.triton_figures([request], processes=1)
    assert "error" in f or compiled.refusal(f) is not None, f
