"""Turns fused operators into kernel calls: layouts, packed weights, which precision and which kernel.

May import: `tune` and what stands before it.
"""
