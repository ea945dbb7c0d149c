"""Kernels in CUDA C++ for Hopper GPUs. NVRTC compiles them, which PyTorch's CUDA builds install.

Importing needs no GPU.
"""
