"""Makes models smaller by training: pruned checkpoints, small datasets.

May import: `driver` and what stands before it.
"""
