"""Holds the passes over the graph, one a module; `bertile.graph.order` says in which order they
run.
"""
