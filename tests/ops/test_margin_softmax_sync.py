"""On a GPU nothing is read back to the host; seen without one, since every torch call passes the dispatcher.

Runs on CPU tensors (emulator, checked interpreter) as on a GPU; what is looked for is the call that would wait.
"""

from typing import Any

import backends
import pytest
import torch
from margin_softmax_cases import OP, VARIANTS, call, make
from torch.utils._python_dispatch import TorchDispatchMode

from pyelastic import _dispatch, _random
from pyelastic.ops import _margin_softmax_cuda as cuda
from pyelastic.ops import _margin_softmax_triton as triton

# Calls whose result, or its shape, depends on data.
READS = {
    "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "masked_select", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "histc", "_assert_async",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
LAUNCHERS = {"cuda": cuda, "triton": triton}


class NothingIsRead(TorchDispatchMode):
    """Raises AssertionError at such a call, also inside of our raw ops, which it runs as the Python they are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "pyelastic":
            with self:
                if name == "philox":
                    return _random._philox(*args)
                launcher = LAUNCHERS[func._schema.overload_name]
                return (launcher.forward if name.endswith("_fwd") else launcher.backward)(*args)
        assert name not in READS, f"{name} waits for the GPU"
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name in INDEXING else []
        assert not masks, f"{name} with a mask waits for the GPU"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", [b for b in backends.implemented(OP) if b in LAUNCHERS])
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("variant", ("ElasticArcFace", "AdaFace", "MagFace", "Curricular"))
@pytest.mark.parametrize(
    "options",
    ({}, {"return_aux": True, "subcenters": 2}, {"classes": torch.arange(0, 37)}),
    ids=("plain", "all statistics of sub-centres", "sampled"),
)
def test_no_host_synchronisation(
    backend: str, dtype: torch.dtype, variant: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "may_read", lambda device: False)  # as on a GPU
    case = make(dtype=dtype, subcenters=options.get("subcenters", 1))
    case.labels[3] = -1
    with NothingIsRead():
        out, *_ = call(backend, case, VARIANTS[variant], ignore_index=-1, label_smoothing=0.1, **options)
        (out[0] if isinstance(out, tuple) else out).backward()


def test_wide_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's other backward, with a GEMM."""
    if "triton" not in backends.implemented(OP):
        pytest.skip("no GPU and no interpreter")
    table = triton._kernels().MARGIN_SOFTMAX_CONFIGS
    monkeypatch.setattr(triton._kernels(), "MARGIN_SOFTMAX_CONFIGS", {k: v for k, v in table.items() if k[1] == 0})
    test_no_host_synchronisation("triton", torch.float16, "Curricular", {}, monkeypatch)


def test_a_read_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of labels is one, and so are a scalar and a mask anywhere."""
    x = torch.randn(4)
    for read in (lambda: bool((x > 0).any()), lambda: x.sum().item(), lambda: x[x > 0], lambda: x.nonzero()):
        with pytest.raises(AssertionError, match="waits for the GPU"), NothingIsRead():
            read()
    backend = next((b for b in backends.implemented(OP) if b in LAUNCHERS), None)
    if backend is not None:
        with pytest.raises(AssertionError, match="waits for the GPU"), NothingIsRead():
            monkeypatch.setattr(_dispatch, "may_read", lambda device: True)
            call(backend, make(), VARIANTS["ArcFace-none"])
