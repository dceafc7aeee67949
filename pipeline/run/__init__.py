"""Runs a bundle of any target on this machine: by the loader, under QEMU, or emulated.

May import: `bundle` and what stands before it.
"""
