"""Triton kernels of pyelastic, imported only as ``pyelastic.triton_kernels``: the bare name is another package's."""
