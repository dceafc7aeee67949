"""Writes the directory that a compile gives: manifest, weights, runtime libraries, the C loader.

May import: `lower` and what stands before it.
"""
