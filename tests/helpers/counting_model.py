"""A bundle for texts that only counts words: it stands in for what `loader.load` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c")
A, B = WORDS.index("a"), WORDS.index("b")
# Of each head: the outputs, and the axes of each.
OUTPUTS: dict[str, dict[str, list[Any]]] = {
    "embedding": {"sentence_embedding": ["batch", 2]},
    "encoder": {"last_hidden_state": ["batch", "length", 3]},
    "sequence-classification": {"logits": ["batch", 2]},
    "token-classification": {"logits": ["batch", "length", 2]},
    "question-answering": {
        "start_logits": ["batch", "length"],
        "end_logits": ["batch", "length"],
    },
    "masked-lm": {"logits": ["batch", "length", len(WORDS)]},
    "multiple-choice": {"logits": ["batch", 2]},
}


def save_tokenizer(directory: Path) -> None:
    """Write a tokenizer.json of WORDS."""
    import tokenizers

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    words = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", WORDS.index("[SEP]")), ("[CLS]", WORDS.index("[CLS]"))
    )
    tokenizer.save(str(directory / "tokenizer.json"))


class CountingModel:
    """Vectors and logits are how often a text has "a" and "b"; a token is a label of itself.

    `texts` are the settings in its manifest, `labels` those of a classifier, of which each logit is
    the count of a word.
    """

    inputs = ("input_ids", "attention_mask")

    def __init__(
        self,
        head: str,
        labels: tuple[str, ...] = ("good", "bad"),
        max_length: int = 8,
        **texts: Any,
    ) -> None:
        axes = {name: list(axes) for name, axes in OUTPUTS[head].items()}
        if head == "sequence-classification":
            axes["logits"] = ["batch", len(labels)]
        self.labels, self.threads = labels, 1
        self.outputs = tuple(axes)
        self.manifest = {
            "model": {"head": head, "labels": list(labels), "max_length": max_length},
            "static": {"batch": None, "length": None},
            "outputs": [{"name": name, "axes": shape} for name, shape in axes.items()],
            "text": texts,
        }
        self.calls, self.closed = 0, False

    def close(self) -> None:
        self.closed = True

    def __call__(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> dict[str, np.ndarray]:
        assert not self.closed
        self.calls += 1
        is_a, is_b = input_ids == A, input_ids == B
        counts = np.stack([is_a.sum(1), is_b.sum(1)], 1).astype(np.float32)
        tokens = np.stack([is_a, is_b, input_ids > B], 2).astype(np.float32)
        head = self.manifest["model"]["head"]
        if head == "embedding":
            return {"sentence_embedding": counts}
        if head == "encoder":
            return {"last_hidden_state": tokens}
        if head == "question-answering":  # an answer is what follows from "a" to "b"
            return {"start_logits": 9 * tokens[..., 0], "end_logits": 9 * tokens[..., 1]}
        if head == "masked-lm":
            likely = np.arange(len(WORDS), dtype=np.float32)
            return {"logits": np.broadcast_to(likely, (*input_ids.shape, len(WORDS)))}
        return {"logits": (9 * tokens if head[0] == "t" else counts)[..., : len(self.labels)]}
