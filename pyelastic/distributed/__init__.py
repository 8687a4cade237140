"""Sharded forms of the ops on torch.distributed: process groups, DTensor and FSDP2; nothing home-made."""
