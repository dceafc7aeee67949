"""Compiles TIR with LLVM and links it.

May import: `graph` and what stands before it.
"""
