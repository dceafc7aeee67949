"""Turns a model (a directory, a hub id, an object) into a canonical ONNX file, and checks it.

May import: `onnx` and what stands before it.
"""
