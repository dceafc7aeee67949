"""Holds what rows of families that look like BERT have in common: the layers' names, and sizes."""

from __future__ import annotations

from typing import Any

BERT_LAYERS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
# 512 tokens behind padding id 1
BEHIND_PADDING = {"max_position_embeddings": 514}


def sizes_of(layers: int, hidden: int, heads: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    """A config of so many layers, channels and heads, by transformers' names, and what else."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": vocabulary,
        **more,
    }


def tiny(**more: Any) -> dict[str, Any]:
    """The sizes of a model for tests, of up to 512 tokens.

    A wide initialisation makes attention sharp: with 0.02 a two-layer model hardly looks at its
    input, and a wrong mask or position would drown in rounding.
    """
    sizes = sizes_of(2, 128, 2, 1000, max_position_embeddings=512, initializer_range=0.1)
    return {**sizes, **more}
