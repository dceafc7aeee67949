"""Finds knobs for kernels and keeps them: `estimate`, `measure`, `log`, `search` and `archive`.

May import: `codegen` and what stands before it; of its own folders each those before it in this list.
"""
