"""Times bundles beside other engines, in turns.

May import: `compress` and what stands before it.
"""
