"""Parses the command line and runs its commands.

May import: `report` and what stands before it.
"""
