"""Triton kernels of pyelastic. Imported only as ``pyelastic.triton_kernels``: the bare name belongs to another package."""
