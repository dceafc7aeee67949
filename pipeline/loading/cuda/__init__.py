"""Loads bundles for NVIDIA GPUs, through the driver's own library."""
