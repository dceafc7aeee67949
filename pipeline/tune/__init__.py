"""Finds knobs for kernels and keeps them: `estimate`, `measure`, `log`, `search` and `archive`.

May import: `codegen` and what stands before it; each of its folders those before it in the list.
"""
