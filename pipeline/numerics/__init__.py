"""Arithmetic on numbers of 8 bits, zeros in weights, histograms, and what a precision is.

May import: `base`, `schedules`.
"""
