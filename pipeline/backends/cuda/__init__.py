"""Answers for NVIDIA GPUs."""
