"""Observes ranges, and chooses the layers that stay in higher precision.

May import: `evaluation` and what stands before it.
"""
