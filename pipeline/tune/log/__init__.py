"""Keeps what was measured, and chooses the knobs of a kernel from it."""
