"""The maths of the operations in plain numpy (float64), that kernels are checked against."""

from __future__ import annotations

import math

import numpy as np

LEVELS = 255  # steps of 8 bits, between the ends of a range

_erf = np.vectorize(math.erf, otypes=[np.float64])


def apply_activation(name: str, x: np.ndarray) -> np.ndarray:
    """Any name of ``vector_math.ACTIVATIONS``; same shape out."""
    if name == "none":
        return x
    if name == "gelu":
        return 0.5 * x * (1 + _erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "relu":
        return np.maximum(x, 0)
    if name == "tanh":
        return np.tanh(x)
    raise KeyError(f"no activation {name!r}")


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, epsilon: float) -> np.ndarray:
    """Over the last axis, Ba et al. 2016."""
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * gamma + beta


def rotary(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Channel pairs (d, d + D / 2) of x (…, D) turned by the angle of their place, Su et al. 2021;
    cos and sin (…, D).
    """
    first, second = np.split(x, 2, axis=-1)
    return x * cos + np.concatenate([-second, first], axis=-1) * sin


def byte_limits(low: float, high: float) -> np.ndarray:
    """What a kernel that writes bytes of a given range reads: low, and steps per unit."""
    return np.array([low, LEVELS / (high - low)], "float32")
