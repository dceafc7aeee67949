"""Turns fused operators into kernel calls: layouts, packed weights, precisions, kinds of kernel.

May import: `tune` and what stands before it.
"""
