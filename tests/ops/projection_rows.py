"""projection's row-wise kernels alone, against the formulas in float64: what each GPU backend's own tests call."""

from typing import Any

import backends
import oracle
import torch
from layouts import lay
from torch import Tensor

from pyelastic.ops import projection as door
from pyelastic.ops._projection import Kernels
from pyelastic.ops._projection_cuda import CudaKernels
from pyelastic.ops._projection_triton import TritonKernels

KERNELS: dict[str, type[Kernels]] = {"cuda": CudaKernels, "triton": TritonKernels}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Around a warp, a tile, and the width from which CUDA gives a row a block and Triton a second tile.
WIDTHS = (1, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 2500)
EPS = 1e-12


def kernels(backend: str) -> Kernels:
    return KERNELS[backend](torch.empty(0, device=backends.device_of(backend)))


def room(rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows to write to, one element into a wider NaN-filled buffer, and that buffer."""
    buffer = torch.full((rows, dim + 3), torch.nan, dtype=dtype, device=device)
    return buffer[:, 1 : dim + 1], buffer


def forward_case(
    backend: str,
    rows: int,
    dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    residual: torch.dtype | None = torch.float32,
    normalize: bool = True,
    layout: str = "sliced",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Check `forward` on random rows. Returns y, its truth and A, and the inverse norms, on the CPU."""
    device = backends.device_of(backend)
    z = torch.randn(rows, dim)
    b = torch.randn(dim) if bias else None
    r = None if residual is None else lay(torch.randn(rows, dim).to(residual), layout)
    out, buffer = room(rows, dim, dtype, device)
    inverse = torch.full((rows,), torch.nan, device=device) if normalize else None
    on = [None if t is None else t.to(device) for t in (z, b)]
    there = r if r is None or device.type == "cpu" else lay(r.to(device), layout)
    kernels(backend).forward(on[0], on[1], there, out, inverse)  # type: ignore[arg-type]
    terms = [z.double(), *([] if b is None else [b.double().expand_as(z)]), *([] if r is None else [r.double()])]
    truth, absolute = torch.stack(terms).sum(0), torch.stack(terms).abs().sum(0)
    norm = torch.linalg.vector_norm(truth, dim=1, keepdim=True).clamp(min=EPS)
    if inverse is not None:
        slope = 1 + (truth.abs() * absolute).sum(1) / norm[:, 0] ** 2
        oracle.check(inverse, 1 / norm[:, 0], A=slope / norm[:, 0], K=1, dtype=torch.float32, name="inverse")
        truth, absolute = truth / norm, absolute / norm + slope[:, None] * (truth / norm).abs()
    oracle.check(out, truth, A=absolute, K=1, dtype=dtype, name="y")
    assert buffer[:, 0].isnan().all() and buffer[:, dim + 1 :].isnan().all()
    made = torch.empty(0) if inverse is None else inverse.cpu()
    return out.cpu(), truth, absolute, made


def backward_case(
    backend: str,
    rows: int,
    dim: int,
    *,
    grad: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    normalize: bool = True,
    layout: str = "sliced",
) -> tuple[Tensor, Tensor, Tensor]:
    """Check `backward` on random rows of which every third has a clamped norm. Returns dz, its truth and A."""
    device = backends.device_of(backend)
    g = lay(torch.randn(rows, dim).to(grad), layout)
    y = lay(torch.nn.functional.normalize(torch.randn(rows, dim)).to(dtype), layout)
    inverse = torch.rand(rows) + 0.5
    inverse[::3] = torch.tensor(1 / EPS).float()
    dz = torch.full((1, rows, dim), torch.nan, device=device)
    inputs = [lay(t.to(device), layout) for t in (g, y)]
    kernels(backend).backward(inputs[0], inputs[1], inverse.to(device) if normalize else None, dz)
    parts = torch.full((2, rows + 1, dim), torch.nan, device=device).bfloat16()[:, :rows]
    kernels(backend).backward(inputs[0], inputs[1], inverse.to(device) if normalize else None, parts)
    dz = dz[0]
    # The second part is what the first one leaves, so together they miss dz by 2^-9 of 2^-9 of it.
    assert torch.equal(parts[0], dz.bfloat16())
    assert ((parts.double().sum(0) - dz.double()).abs() <= dz.double().abs() * 2.0**-17).all()
    truth, absolute = g.double(), g.double().abs()
    if normalize:
        product = g.double() * y.double()
        clamped = (inverse > 1e11)[:, None]
        along, most = (torch.where(clamped, 0.0, p.sum(1, keepdim=True)) for p in (product, product.abs()))
        truth = (truth - along * y.double()) * inverse.double()[:, None]
        absolute = (absolute + most * y.double().abs()) * inverse.double()[:, None]
    oracle.check(dz, truth, A=absolute, K=1, dtype=torch.float32, name="dz")
    return dz.cpu(), truth, absolute


def special_rows(backend: str, dim: int) -> None:
    """A zero row, one below the clamp, one whose squares overflow float32, an infinite row and a NaN row."""
    device = backends.device_of(backend)
    z = torch.randn(5, dim)
    z[0] = 0
    z[1] = 1e-20
    z[2] *= 1e25
    z[3, dim // 2] = torch.inf
    z[4, dim // 2] = torch.nan
    out, inverse = torch.empty(5, dim, device=device), torch.empty(5, device=device)
    k = kernels(backend)
    k.forward(z.to(device), None, None, out, inverse)
    want = torch.nn.functional.normalize(z.double(), dim=1)
    assert torch.equal(out.isnan().cpu(), want.isnan())
    oracle.check(out[:3], want[:3], A=2 * want[:3].abs(), K=1)
    clamped = torch.full((2,), 1 / EPS, dtype=torch.float64)
    oracle.check(inverse[:2], clamped, A=clamped, K=1)
    room = torch.empty(1, 5, dim, device=device)
    g = torch.randn(5, dim)
    k.backward(g.to(device), out, inverse, room)
    dz = room[0]
    assert torch.equal(dz[:2].cpu(), g[:2] * inverse[:2, None].cpu())  # the norm is constant there
    assert dz[2].isfinite().all() and dz[4].isnan().all()


def distant_rows(backend: str) -> None:
    """Row strides of 2^29 elements: the last of five rows begins at 2^31. Memory is committed lazily."""
    device = backends.device_of(backend)

    def far(x: Tensor) -> Tensor:
        storage = torch.empty(0, dtype=x.dtype, device=device)
        storage.untyped_storage().resize_(x.element_size() * ((1 << 29) * 4 + 16))
        return storage.set_(storage.untyped_storage(), 0, x.shape, (1 << 29, 1)).copy_(x)

    near = [torch.randn(5, 16).half().to(device) for _ in range(4)]  # residual, y, grad, and a place for the result
    z = torch.randn(5, 16, device=device)
    k = kernels(backend)
    results: dict[str, list[Tensor]] = {}
    for name, place in (("near", lambda x: x), ("far", far)):
        inverse, dz = torch.empty(5, device=device), torch.empty(1, 5, 16, device=device)
        out = place(near[3].clone())
        k.forward(z, None, place(near[0]), out, inverse)
        k.backward(place(near[2]), out, inverse, dz)
        results[name] = [out.contiguous(), inverse, dz]
    assert all(torch.equal(a, b) for a, b in zip(results["near"], results["far"], strict=True))


def everything(
    backend: str, *, dtype: torch.dtype = torch.float32, skip: bool = True, whole: bool = False, **options: Any
) -> list[Tensor]:
    """y and all gradients of a call with a projected skip or a plain residual; whole numbers have exact sums."""
    torch.manual_seed(0)
    device = backends.device_of(backend)
    shapes = {"x": (23, 20), "weight": (37, 20), "bias": (37,), "residual": (23, 11), "residual_weight": (37, 11)}
    if not skip:
        shapes = {**shapes, "residual": (23, 37)}
        del shapes["residual_weight"]

    def make(*shape: int) -> Tensor:
        values = torch.randint(-3, 4, shape) if whole else torch.randn(shape)
        return values.to(dtype).to(device)

    tensors = {name: make(*shape).requires_grad_() for name, shape in shapes.items()}
    y = door.projection(**tensors, **options, backend=backend)
    y.backward(make(*y.shape))
    return [y.detach(), *(t.grad for t in tensors.values())]
