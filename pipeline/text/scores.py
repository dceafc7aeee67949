"""Makes scores of logits."""

from __future__ import annotations

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Shares of 1 along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Each by itself, between 0 and 1; without overflow at either end."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small)).astype(logits.dtype)


def identity(logits: np.ndarray) -> np.ndarray:
    """The logits as they are."""
    return logits


FUNCTIONS = {"softmax": softmax, "sigmoid": sigmoid, "none": identity}
