"""Experiments behind the figures of the pages: each is run by hand, or by make.

May import: everything.
"""
