"""Carries candidates to a machine that no network reaches, and their times back."""
