"""Computes the operations in plain numpy (float64), which kernels are checked against."""

from __future__ import annotations

import math

import numpy as np

LEVELS = 255  # steps of 8 bits, between the ends of a range
# Weights in signed bytes are bounded where no four that share a sum of 16 bits add up to more, of
# one sign: 255 times that is less than 32768.
BOUND = 128
RUN = 8  # inputs of two such sums: (0, 1, 4, 5) and (2, 3, 6, 7)

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
    if name == "silu":
        return x / (1 + np.exp(-x))
    raise KeyError(f"no activation {name!r}")


def gated(name: str, x: np.ndarray) -> np.ndarray:
    """The first half of the last axis, activated, times the second: a gated linear unit, Shazeer
    2020 (GEGLU with gelu, SwiGLU with silu).
    """
    first, second = np.split(x, 2, axis=-1)
    return apply_activation(name, first) * second


def largest_sums(w: np.ndarray) -> np.ndarray:
    """The largest magnitude (N,) that sums of positive or of negative weights w (K, N) have, of
    those that a BOUND is for.
    """
    padded = np.pad(w, ((0, -len(w) % RUN), (0, 0)))
    runs = padded.reshape(-1, 2, 2, 2, w.shape[1])
    sums = [np.maximum(part, 0).sum((1, 3)).max((0, 1)) for part in (runs, -runs)]
    return np.maximum(*sums)


def bounding_scale(w: np.ndarray) -> np.ndarray:
    """The least scale (N,) by which weights w (K, N), rounded to nearest, are bounded."""
    return largest_sums(w) / w.dtype.type(BOUND - 2)  # rounding adds half a step to each of four


def with_bounds(precision: str) -> str:
    """What a task calls int8, or int8_static, of weights that BOUND holds for."""
    return precision.replace("int8", "int8_bounded")


def without_bounds(precision: str) -> str:
    """What a task calls the same precision of any weights."""
    return precision.replace("_bounded", "")


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(
    x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, epsilon: float, rms: bool = False
) -> np.ndarray:
    """Over the last axis, Ba et al. 2016; ``rms``: RMSNorm, Zhang & Sennrich 2019."""
    mean = 0.0 if rms else x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * gamma + beta


def angles(places: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (tokens, size) of places, for heads of ``size`` channels, Su et al. 2021."""
    half = size // 2
    turns = places[:, None] * 10000.0 ** (-np.arange(half) / half)
    turns = np.concatenate([turns, turns], axis=1)
    return np.cos(turns).astype("float32"), np.sin(turns).astype("float32")


def rotary(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Channel pairs (d, d + D / 2) of x (…, D) turned by the angle of their place, Su et al. 2021;
    cos and sin (…, D).
    """
    first, second = np.split(x, 2, axis=-1)
    return x * cos + np.concatenate([-second, first], axis=-1) * sin


def rotary_heads(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, heads: int) -> np.ndarray:
    """x (…, C) whose first ``heads`` heads are turned, by cos and sin (…, D); the rest as it is."""
    channels = heads * cos.shape[-1]
    of_heads = x[..., :channels].reshape(*x.shape[:-1], heads, -1)
    both = rotary(of_heads, cos[..., None, :], sin[..., None, :])
    return np.concatenate([both.reshape(*x.shape[:-1], channels), x[..., channels:]], axis=-1)


def rms_heads(x: np.ndarray, gamma: np.ndarray, epsilon: float) -> np.ndarray:
    """x (…, C) whose first heads are RMSNorm's, each of its own channels, by gamma (heads, D)."""
    of_heads = x[..., : gamma.size].reshape(*x.shape[:-1], *gamma.shape)
    normed = layer_norm(of_heads, gamma, 0.0, epsilon, rms=True)
    return np.concatenate([normed.reshape(*x.shape[:-1], -1), x[..., gamma.size :]], axis=-1)


def byte_limits(low: float, high: float) -> np.ndarray:
    """What a kernel that writes bytes of a given range reads: low, and steps per unit."""
    return np.array([low, LEVELS / (high - low)], "float32")
