"""Turns the graph that any exporter wrote into the one canonical form that the importer takes.

May import: `base`, `numerics`, `config`, `families`.
"""
