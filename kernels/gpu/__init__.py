"""Lockstep's ops as Triton kernels for CUDA tensors (docs/numerics.md, "GPU profile").

A module here has the name and the functions of its CPU twin in `kernels/`; weights are plain row-major [N, K].
Importing this package costs nothing; its modules import triton.
"""
