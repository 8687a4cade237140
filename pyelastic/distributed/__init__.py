"""Sharded forms of the ops on torch.distributed: process groups, DTensor and FSDP2; nothing home-made."""

from pyelastic.distributed.heads import ClassShardedMarginSoftmax
from pyelastic.distributed.margin_softmax import class_sharded_margin_softmax
from pyelastic.distributed.maxsim import in_batch_maxsim_info_nce
from pyelastic.distributed.norm_linear_attention import sequence_parallel_norm_linear_attention

__all__ = [
    "ClassShardedMarginSoftmax",
    "class_sharded_margin_softmax",
    "in_batch_maxsim_info_nce",
    "sequence_parallel_norm_linear_attention",
]
