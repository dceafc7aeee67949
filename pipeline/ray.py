"""Gives Ray Data's encoder its public name: `bertile.ray.Encoder`."""

from __future__ import annotations

from bertile.integrations.ray import Encoder

__all__ = ["Encoder"]
