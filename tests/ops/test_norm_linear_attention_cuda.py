"""The CUDA kernels' own cases: tiles of 16 tokens, columns of 32 values, parts of 128, any order of threads."""

import backends
import pytest
import torch
from norm_linear_attention_cases import OP, call, compare, make, upstream_of

import pyelastic

pytestmark = pytest.mark.skipif("cuda" not in backends.implemented(OP), reason="no GPU and no emulator")


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(("n", "dv"), [(15, 31), (16, 32), (17, 33), (127, 4), (128, 64), (129, 65), (257, 3)])
def test_tiles_columns_and_parts(causal: bool, n: int, dv: int) -> None:
    compare(
        "cuda", make(1, n, heads=1, d=4, dv=dv, causal=causal, state=True, learned=True, gate=n < 20), states=True
    )


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("rope", (None, "num", "both"))
def test_packed_parts(causal: bool, rope: str | None) -> None:
    lengths = (130, 0, 1, 128)
    compare(
        "cuda", make(lengths=lengths, heads=2, kv_heads=1, d=4, causal=causal, rope=rope, state=True), states=True
    )


def test_widest_heads() -> None:
    for causal in (False, True):
        compare("cuda", make(1, 18, heads=1, d=128, dv=128, rope="num", causal=causal))
    with pytest.raises(pyelastic.BackendError, match="heads are 130 wide and values 4; the kernels take up to 128"):
        call("cuda", make(1, 2, d=130, dv=4))


@pytest.mark.skipif(backends.EMULATOR is None, reason="the order of threads is the emulator's to choose")
@pytest.mark.parametrize("causal", (False, True))
def test_order_of_threads_and_blocks_changes_no_bit(causal: bool) -> None:
    emulator = backends.EMULATOR
    assert emulator is not None
    case, found = make(1, 40, heads=2, kv_heads=1, d=4, causal=causal, gate=True, learned=True, rope="num"), []
    for seed in range(3):
        emulator.set_seed(seed)
        made, leaves = call("cuda", case)
        made["o"].backward(upstream_of(case)["o"])
        found.append([made["o"].detach(), *(x.grad for x in leaves.values())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
