"""Searches the knobs of the kernels that a model calls."""
