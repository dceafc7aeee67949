"""Bundles in the place of other libraries' models, one module for each library.

May import: `loading`, `base`, `families`, `text`, and the library that a module is for. Nothing
imports this room, so that each library is needed only by who uses it.
"""
