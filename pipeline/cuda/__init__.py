"""Compiling for NVIDIA GPUs: kernels as CUDA C++, the plan of launches, and how both are tried."""
