"""Compiles CUDA text to cubin and PTX, and reads what a cubin takes of a GPU."""
