"""The command line, one command a module.

May import: `report` and what stands before it.
"""
