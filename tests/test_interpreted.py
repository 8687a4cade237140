"""The checked Triton interpreter catches each planted bug and leaves clean kernels right, to the bit where meant."""

import backends
import pytest
import torch

pytestmark = pytest.mark.skipif(not backends.INTERPRETED, reason="kernels run on a GPU, or Triton is missing")
if backends.INTERPRETED:
    import interpreted as checked
    from planted import interpreted_bugs as kernels
    from triton.runtime.errors import InterpreterError

N, BLOCK = 100, 32


def raises(kind, message):
    """Triton wraps what a kernel raises; the text names the check."""
    return pytest.raises(InterpreterError, match=f"{kind.__name__}.*{message}")


def carrier(n):
    """n floats at the front of a longer allocation: what lies behind is foreign."""
    return torch.full((n + 64,), torch.nan)[:n]


def test_no_patch_point_has_moved():
    """Fails with the names when Triton's internals change, instead of checking nothing."""
    assert checked.moved() == []
    for owner, names in checked.PATCHED.items():
        for name in names:
            assert getattr(owner, name) is checked.replacement(owner, name), (owner, name)


@pytest.mark.parametrize("past", ["load", "store"])
def test_mask_off_by_one(past):
    x, y = carrier(N).copy_(torch.randn(N)), carrier(N)
    grid = (4,)
    kernels.copy[grid](x, y, N, 0, 0, BLOCK=BLOCK)
    assert torch.equal(x, y)
    with raises(checked.OutOfBounds, f"{past} out of bounds: 1 lanes, .0 bytes past"):
        kernels.copy[grid](x, y, N, int(past == "load"), int(past == "store"), BLOCK=BLOCK)


@pytest.mark.parametrize("label", [10**6, -1, N])
def test_gather_out_of_range(label):
    x, index, y = torch.randn(N), torch.arange(8), torch.empty(8)
    kernels.gather[(1,)](x, index, y, 8, BLOCK=8)
    assert torch.equal(y, x[:8])
    index[3] = label
    with raises(checked.OutOfBounds, "load"):
        kernels.gather[(1,)](x, index, y, 8, BLOCK=8)


def test_addresses_from_a_table():
    """A table names what its addresses lie in; all else is foreign, and alignment that is vouched for is checked."""
    x, y = torch.randn(N), torch.zeros(N)
    table = torch.tensor([x.data_ptr(), y.data_ptr()])
    with raises(checked.OutOfBounds, "load out of bounds: 100 lanes"):
        kernels.through_table[(1,)](table, N, 4, BLOCK=128)
    table.points_to = [x, y]
    kernels.through_table[(1,)](table, N, 4, BLOCK=128)
    assert torch.equal(x, y)
    with raises(checked.OutOfBounds, "store out of bounds: 4 lanes"):
        table[1] += 16
        kernels.through_table[(1,)](table, N, 4, BLOCK=128)
    with raises(checked.Misaligned, "multiple_of: .* is no multiple of 64"):
        table[0] += 4
        kernels.through_table[(1,)](table, N, 64, BLOCK=128)


def test_overlapping_stores():
    x, y = torch.randn(6, N), torch.empty(6)
    kernels.row_sums[(6,)](x, y, N, 0, BLOCK=128)
    torch.testing.assert_close(y, x.sum(1))
    with raises(checked.Race, "store of what another program stored"):
        kernels.row_sums[(6,)](x, y, N, 1, BLOCK=128)


def test_sum_without_atomics():
    x, y = torch.randn(N), torch.zeros(1)
    kernels.total[(4,)](x, y, N, 1, BLOCK=BLOCK)
    torch.testing.assert_close(y, x.sum().view(1))
    with raises(checked.Race, "of what another program"):
        kernels.total[(4,)](x, y, N, 0, BLOCK=BLOCK)


def test_order_of_programs():
    """The stock interpreter runs them in order and returns what no GPU promises."""
    for seed in range(5):
        checked.seed(seed)
        with raises(checked.Race, "of what another program"):
            kernels.chain[(4,)](torch.zeros(5))


def test_lanes_of_one_store():
    with raises(checked.Race, "two lanes of one store"):
        kernels.one_place[(1,)](torch.zeros(1), BLOCK=8)


@pytest.mark.parametrize("grid", [(1, 65_536), (1, 1, 65_536), (1 << 31,)])
def test_grid_beyond_the_limits(grid):
    with pytest.raises((checked.GridTooLarge, InterpreterError), match="CUDA has no grid of"):
        kernels.chain[grid](torch.zeros(5))


def test_int32_overflow_of_an_address():
    """Found on sixteen elements: no two gigabytes are needed."""
    x, y = torch.zeros(16), torch.zeros(16)
    kernels.strided[(1,)](x, y, 1, 1 << 28, 1, BLOCK=16)
    with raises(checked.DeviceAssert, "int32 overflow detected for operation mul"):
        kernels.strided[(1,)](x, y, 1, 1 << 28, 0, BLOCK=16)


def test_device_assert():
    x = torch.rand(16) + 0.1
    kernels.positive[(1,)](x, 16, BLOCK=16)
    x[5] = -1
    with raises(checked.DeviceAssert, "x is not positive"):
        kernels.positive[(1,)](x, 16, BLOCK=16)


def test_bfloat16_arithmetic_to_the_bit():
    x, y = torch.randn(2, 64).bfloat16()
    out = torch.empty(6, 64, dtype=torch.bfloat16)
    kernels.arithmetic[(1,)](x, y, out, 64, BLOCK=64)
    want = (x + y, x * y, torch.maximum(x, y), -x, torch.maximum(x, y), x.max().expand(64))
    assert torch.equal(out, torch.stack(want))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_round_as_torch_does(dtype):
    random = torch.randint(0, 1 << 32, (20_000,)).to(torch.int64).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 65504.0, 65520.0, 3.3e38, 1 + 2**-8])
    x = torch.cat((random, special, torch.randn(1000)))
    y = torch.empty(len(x), dtype=dtype)
    kernels.cast[(len(x) // 1024 + 1,)](x, y, len(x), BLOCK=1024)
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(len(x))
    kernels.cast[(len(x) // 1024 + 1,)](y, back, len(x), BLOCK=1024)
    torch.testing.assert_close(back, y.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot(dtype):
    a, b, c = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype), torch.empty(32, 32)
    kernels.dot[(1,)](a, b, c, "ieee", N=32)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_tf32_loses_what_a_gpu_loses():
    a, b, c = torch.randn(32, 32), torch.randn(32, 32), torch.empty(32, 32)
    kernels.dot[(1,)](a, b, c, "tf32", N=32)
    error = (c.double() - a.double() @ b.double()).abs().max()
    assert 1e-4 < error < 5e-2
    rounded = [torch.from_numpy(checked.to_tf32(x.numpy())).double() for x in (a, b)]
    exact = rounded[0] @ rounded[1]
    torch.testing.assert_close(c.double(), exact, rtol=1e-5, atol=1e-5)


def test_tf32x3_is_close_to_float32():
    a, b, c = torch.randn(32, 32), torch.randn(32, 32), torch.empty(32, 32)
    kernels.dot[(1,)](a, b, c, "tf32x3", N=32)
    error = (c.double() - a.double() @ b.double()).abs().max()
    assert 0 < error < 2e-5


@pytest.mark.parametrize("first", (0.5, 2.0))
def test_a_comparison_of_scalars_masks(first):
    """The stock interpreter takes it for an integer, and refuses the mask."""
    x, y = torch.full((20,), first), torch.full((20,), torch.nan)
    kernels.scalar_comparison[(1,)](x, y, 20, BLOCK=32)
    assert torch.equal(y, x if first < 1.0 else torch.zeros(20))
