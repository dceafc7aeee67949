"""What differs between kinds of machine, behind one protocol.

May import: `run` and what stands before it; `cpu` and `cuda` nothing of each other.
"""
