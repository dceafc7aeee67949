"""Runs a bundle for a GPU on the GPU that is here, else emulates its kernels."""
