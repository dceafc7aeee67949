"""Provides errors, progress, tables, content hashes, the stage cache and the facts of this machine.

May import: `loading`.
"""
