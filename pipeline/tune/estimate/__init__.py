"""Estimates a kernel's time from its assembly, by llvm-mca."""
