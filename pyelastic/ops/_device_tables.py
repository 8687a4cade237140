"""Tables of numbers that kernels read on the device, addresses among them, kept between calls.

A table is known by its device and its whole content, so one that was kept is never stale: memory that was freed and
given away again at the same address, size and stride is described by the same numbers. Holds no tensor but the tables.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyelastic._dispatch import BackendError

LIMIT = 512  # tables of a process that no graph uses: of fira's, at most 7.5 MB


@dataclass
class _Kept:
    table: Tensor
    stream: int
    copied: torch.cuda.Event | None  # the copy, for other streams
    pinned: bool = False  # used by a CUDA graph, which knows its address: never dropped


_kept: OrderedDict[tuple[torch.device, bytes], _Kept] = OrderedDict()
_lock = threading.Lock()  # optimizers in backward hooks step on autograd's threads


def capturing(device: torch.device) -> bool:
    """Whether the current stream records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(numbers: Sequence[int], device: torch.device) -> Tensor:
    """``numbers`` on ``device``, int64, by one asynchronous copy from pinned memory."""
    on_gpu = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=on_gpu).to(device, non_blocking=on_gpu)


def get(numbers: Sequence[int], device: torch.device, op: str, backend: str) -> Tensor:
    """The table of ``numbers`` (int64) on ``device``, ready for the current stream; nothing is copied if it is kept.

    Raises BackendError while a CUDA graph is being captured, if the table is not kept: the graph would hold a copy from
    host memory that is gone when it is replayed.
    """
    on_gpu, key = device.type == "cuda", (device, array("q", numbers).tobytes())
    stream = torch.cuda.current_stream(device) if on_gpu else None
    number = 0 if stream is None else stream.cuda_stream
    with _lock:
        kept, captured = _kept.get(key), capturing(device)
        if captured:
            if kept is None:
                raise BackendError(
                    f"{op}: backend '{backend}' cannot run this call: the stream is being captured into a CUDA graph "
                    "and the table of these tensors' addresses is not on the device. Run a warm-up step with the same "
                    "tensors first: gradients at the same addresses, everything contiguous, the same seeds."
                )
            kept.pinned = True  # torch.cuda.graph has synchronised: the copy is over
            return kept.table
        if kept is None:
            kept = _Kept(upload(numbers, device), number, None)
            if stream is not None:
                kept.copied = torch.cuda.Event()
                kept.copied.record(stream)
            _kept[key] = kept
            _drop()
        _kept.move_to_end(key)
    if stream is not None and number != kept.stream and kept.copied is not None:
        stream.wait_event(kept.copied)
        kept.table.record_stream(stream)
    return kept.table


def _drop() -> None:
    """The tables that were not used for longest, beyond LIMIT."""
    free = [key for key, kept in _kept.items() if not kept.pinned]
    for key in free[: max(0, len(free) - LIMIT)]:
        del _kept[key]
