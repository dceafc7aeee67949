"""Gives bundles the form that other libraries ask for: a class for each, with their names.

May import: `loading`, `base`, `families`, `text`. Nothing here is imported by another room; a
module needs the library that it is called after, which `pip install 'bertile[NAME]'` brings.
"""
