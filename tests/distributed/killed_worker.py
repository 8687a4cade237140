"""Rank 1 is killed in the middle of a step; the others wait for it in a collective."""

from __future__ import annotations

import os
import signal

import launched
import torch

from pyelastic.distributed import class_sharded_margin_softmax


def main() -> None:
    rank, _ = launched.begin(timeout=30)
    e, w = torch.randn(4, 6, requires_grad=True), torch.randn(3, 6)
    labels = torch.randint(0, 6, (4,))
    loss = class_sharded_margin_softmax(e, w, labels)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    loss.backward()
    launched.end()


if __name__ == "__main__":
    main()
