"""Answers for processors."""
