"""Holds what passes share: walking and rewriting a dataflow, folding, resizing, linear layers."""
