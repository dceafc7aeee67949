"""Writes the page that shows what a bundle does with a machine.

May import: `bench` and what stands before it.
"""
