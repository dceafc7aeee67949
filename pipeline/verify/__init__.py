"""Compares a bundle with ONNX Runtime, and says what a compile has reached.

May import: `quantize` and what stands before it.
"""
