"""A margin-softmax head whose classes are sharded over ranks, with a checkpoint that loads on any number of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from pyelastic.distributed.margin_softmax import OP, class_sharded_margin_softmax
from pyelastic.margins import Margin


class ClassShardedMarginSoftmax(nn.Module):
    """``pyelastic.nn.MarginSoftmax`` with its weight [out_features * subcenters, in_features] sharded over ``mesh``.

    The weight is a DTensor, ``Shard(0)``, never whole on one rank, and so are its gradient and its optimizer's state:
    ``torch.distributed.checkpoint`` saves and loads them on another number of ranks, or into the plain ``weight`` of
    ``nn.MarginSoftmax`` in one process. Keep it outside of ``DistributedDataParallel``, which is for the backbone, and
    pass ``ddp_world_compensation=True`` where that averages gradients.

    Args:
        margin: one of ``pyelastic.margins``. Heads with running statistics (AdaFace, CurricularFace) take fixed ones.
        s: the scale.
        mesh: one-dimensional; None: all ranks, on CUDA where there is one.
        options: further keyword arguments of ``class_sharded_margin_softmax`` for every call, e.g. ``sample_rate``
            (used in training only), ``gather_dtype``, ``ignore_index``; ``forward`` takes them too, for one call.

    Raises:
        ValueError: the sub-centres of a class would be on two ranks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        margin: Margin,
        s: float = 64.0,
        *,
        subcenters: int = 1,
        mesh: DeviceMesh | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if mesh is None:
            device = "cuda" if torch.cuda.is_available() and dist.get_backend() != "gloo" else "cpu"
            mesh = init_device_mesh(device, (dist.get_world_size(),))
        self.margin, self.s, self.subcenters, self.mesh, self.options = margin, s, subcenters, mesh, options
        rows = out_features * subcenters
        each = -(-rows // mesh.size())  # as DTensor cuts them: the last shards may be short, or empty
        if each % subcenters:
            raise ValueError(
                f"{OP}: {out_features} classes of subcenters={subcenters} on {mesh.size()} ranks are {each} rows each; "
                f"expected a multiple of {subcenters}"
            )
        held = max(0, min(each, rows - mesh.get_local_rank() * each))
        local = torch.empty(held, in_features, device=mesh.device_type)
        shape, stride = torch.Size((rows, in_features)), (in_features, 1)
        sharded = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        self.weight = nn.Parameter(sharded)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.01^2), from each rank's own generator: seed the ranks differently."""
        with torch.no_grad():
            self.weight.to_local().normal_(std=0.01)  # type: ignore[attr-defined]

    def forward(self, embeddings: Tensor, labels: Tensor, **options: Any) -> Any:
        """The loss of all ranks' rows, or ``(loss, MarginSoftmaxAux)`` with ``return_aux``."""
        options = {**self.options, **options}
        if not self.training:
            options["sample_rate"] = 1.0
        return class_sharded_margin_softmax(
            embeddings, self.weight, labels, group=self.mesh.get_group(), margin=self.margin, scale=self.s,
            subcenters=self.subcenters, training=self.training, **options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"weight={list(self.weight.shape)}, ranks={self.mesh.size()}, s={self.s}, margin={self.margin}"
