"""Loads bundles with what a device has: numpy, ctypes and the standard library, nothing else."""
