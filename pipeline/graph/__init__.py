"""Holds the Relax graph with Bertile's operators: its import, its passes and their one order.

May import: `export` and what stands before it.
"""
