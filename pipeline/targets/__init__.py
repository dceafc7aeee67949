"""Knows the machines that Bertile compiles for: their rows, their linkers, and the GPU that is
here.

May import: `loading`, `base`, `schedules`.
"""
