"""Knows each family of models: one row of ``table`` holds all that the program knows of it.

Adding a family is adding a row; code of its own, where it needs some, lies in a module beside the
table. torch is imported no sooner than a model is prepared.

May import: `base`.
"""
