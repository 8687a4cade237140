"""The error catalogue: each wrong call raises what the design fixes, naming the argument."""

from typing import Any

import backends
import pytest
import torch
from margin_softmax_cases import BACKENDS, make

import pyelastic
from pyelastic import margins as M


def wrong(**changes: Any) -> dict[str, Any]:
    """A right call with some arguments replaced."""
    case = make(4, 5, 3)
    right = {"embeddings": case.embeddings, "weight": case.weight, "labels": case.labels}
    return {**right, **changes}


CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "embeddings rank": ({"embeddings": torch.ones(4)}, ValueError, r"embeddings.*\[4\].*\[B, D\]"),
    "weight rank": ({"weight": torch.ones(5, 3, 1)}, ValueError, r"weight.*\[C, D\]"),
    "labels rank": ({"labels": torch.zeros(4, 1).long()}, ValueError, r"labels.*\[4, 1\].*\[B\]"),
    "D differs": ({"weight": torch.ones(5, 2)}, ValueError, r"\[4, 3\].*\[5, 2\]"),
    "B differs": ({"labels": torch.zeros(3).long()}, ValueError, r"labels.*\[3\].*\[4\]"),
    "no classes": ({"weight": torch.ones(0, 3)}, ValueError, r"weight.*\[0, 3\]"),
    "subcenters": ({"subcenters": 2}, ValueError, r"weight.*\[5, 3\].*2"),
    "subcenters 0": ({"subcenters": 0}, ValueError, r"subcenters"),
    "integer embeddings": ({"embeddings": torch.ones(4, 3).int()}, TypeError, r"embeddings.*int32"),
    "complex weight": ({"weight": torch.ones(5, 3).cfloat()}, TypeError, r"weight.*complex64"),
    "float labels": ({"labels": torch.zeros(4)}, TypeError, r"labels.*float32.*int64"),
    "float classes": ({"classes": torch.arange(5.0)}, TypeError, r"classes.*float32"),
    "half double": ({"weight": torch.ones(5, 3).double()}, TypeError, r"float32.*float64"),
    "sample_weight": ({"sample_weight": torch.ones(5)}, ValueError, r"sample_weight.*\[5\].*\[4\]"),
    "margins": ({"margins": torch.ones(5)}, ValueError, r"margins.*\[5\].*\[4\]"),
    "complex margins": ({"margins": torch.ones(4).cfloat()}, TypeError, r"margins is complex64"),
    "complex sample_weight": ({"sample_weight": torch.ones(4).cfloat()}, TypeError, r"sample_weight is complex64"),
    "empty classes": ({"classes": torch.ones(0).long()}, ValueError, r"classes is \[0\]; expected at least one"),
    "magface margins": (
        {"margins": torch.ones(4), "margin": M.MagFace()}, ValueError, r"MagFace.*margins"
    ),
    "margin type": ({"margin": 0.5}, TypeError, r"margin is float.*pyelastic\.margins"),
    "reduction": ({"reduction": "avg"}, ValueError, r"reduction.*'avg'.*none.*mean.*sum"),
    "scale": ({"scale": 0.0}, ValueError, r"scale is 0\.0"),
    "scale nan": ({"scale": float("nan")}, ValueError, r"scale is nan"),
    "smoothing": ({"label_smoothing": 1.0}, ValueError, r"label_smoothing is 1\.0"),
    "z_loss": ({"z_loss": -1.0}, ValueError, r"z_loss is -1\.0"),
    "aux name": ({"return_aux": ("ranks",)}, ValueError, r"return_aux.*'ranks'"),
    "sparse_grad": ({"sparse_grad": True}, ValueError, r"sparse_grad.*classes"),
    "unsorted classes": ({"classes": torch.tensor([1, 0, 2])}, ValueError, r"classes.*sorted"),
    "repeated classes": ({"classes": torch.tensor([0, 1, 1, 2])}, ValueError, r"classes.*unique"),
    "classes too big": ({"classes": torch.tensor([0, 1, 5])}, ValueError, r"classes.*5"),
    "label = C": ({"labels": torch.tensor([0, 1, 5, 9])}, ValueError, r"labels\[2\] is 5.*5"),
    "label < 0": ({"labels": torch.tensor([0, -1, 2, -7])}, ValueError, r"labels\[1\] is -1"),
    "label 2^40": ({"labels": torch.tensor([0, 1, 2, 2**40])}, ValueError, r"1099511627776"),
    "label int32": ({"labels": torch.tensor([0, 1, 2, 7]).int()}, ValueError, r"labels\[3\] is 7"),
    "label not sampled": (
        {"labels": torch.tensor([0, 1, 2, 4]), "classes": torch.arange(4)},
        ValueError,
        r"labels\[3\] is 4.*not in classes",
    ),
    "mixed devices": (
        {"weight": torch.ones(5, 3, device="meta")}, ValueError, r"weight.*meta"
    ),
    "label device": (
        {"labels": torch.zeros(4, device="meta").long()}, ValueError, r"labels.*meta"
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", CALLS)
def test_wrong_call(backend: str, name: str) -> None:
    changes, kind, message = CALLS[name]
    arguments = wrong(**changes)
    if "device" not in name:
        arguments = backends.to_device(backend, arguments)
    if backends.device_of(backend).type == "cuda" and name.startswith("label "):
        pytest.skip("labels on a GPU are not read back")
    with pytest.raises(kind, match=message) as caught:
        pyelastic.margin_softmax(**arguments, backend=backend)
    assert str(caught.value).startswith("margin_softmax: ")


def test_a_wrong_label_is_found_before_anything_is_computed() -> None:
    """An ignored -1 is fine, another negative is not; the first bad row is named."""
    labels = torch.tensor([-1, 2, -2, 99])
    with pytest.raises(ValueError, match=r"labels\[2\] is -2.*ignore_index=-1"):
        pyelastic.margin_softmax(**wrong(labels=labels), ignore_index=-1)


@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_missing_backends_say_so(backend: str) -> None:
    if backend in BACKENDS:
        pytest.skip("implemented")
    with pytest.raises(pyelastic.BackendError, match=rf"margin_softmax: .*'{backend}'.*not"):
        pyelastic.margin_softmax(**wrong(), backend=backend)


def test_unknown_backend() -> None:
    with pytest.raises(
        (ValueError, pyelastic.BackendError),
        match="margin_softmax: unknown backend 'cud'; choose from auto, cuda, triton, cpu, eager",
    ):
        pyelastic.margin_softmax(**wrong(), backend="cud")


def test_cpu_kernel_refuses_other_devices() -> None:
    """The meta device stands for any device that is not the CPU."""
    meta = {k: v.to("meta") for k, v in wrong().items()}
    with pytest.raises(pyelastic.BackendError, match=r"backend 'cpu' cannot run.*meta"):
        pyelastic.margin_softmax(**meta, backend="cpu")


def test_dtensor_is_refused_with_the_way_out() -> None:
    dtensor = pytest.importorskip("torch.distributed.tensor")
    mesh = pytest.importorskip("torch.distributed.device_mesh")
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        cpu = mesh.init_device_mesh("cpu", (1,))
        weight = dtensor.distribute_tensor(torch.ones(5, 3), cpu, [dtensor.Shard(0)])
        with pytest.raises(TypeError, match=r"weight.*DTensor.*to_local\(\)"):
            pyelastic.margin_softmax(**wrong(weight=weight))
    finally:
        torch.distributed.destroy_process_group()


def test_backends_explain_themselves() -> None:
    said = pyelastic.backends("margin_softmax", *wrong().values())
    assert set(said) == {"cuda", "triton", "cpu", "eager"}
    assert said["eager"] is None
    for name in ("cuda", "triton"):
        assert bool(said[name]) != (name in BACKENDS)
