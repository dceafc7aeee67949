"""Holds datasets of texts with what a model should answer, and the metrics that say how well it
does.

May import: `backends` and what stands before it.
"""
