"""Texts and a bundle come in; sentence vectors, or labels with scores, go out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertile import loader
from bertile.base.errors import BundleError, InputError, require
from bertile.base.tables import table

BATCH = 32
HEADS = ("embedding", "sequence-classification", "token-classification")


def run(
    directory: Path, texts: Sequence[str], *, truncate: bool = False, threads: int | None = None
) -> dict[str, Any]:
    """Run the bundle in `directory` on `texts`.

    Gives "embeddings" and their "cosine" similarities, or per text a label and a score, or per
    token a label and a score. Raises InputError for a text with more tokens than the model takes
    (unless `truncate`) and for a bundle whose head has no answer to a text.
    """
    with loader.load(directory, threads) as model:
        head = model.manifest["model"]["head"]
        if head not in HEADS:
            raise InputError(
                f"{directory} has the head '{head}', which gives no answer to a text",
                f"compile the model with a --head of {', '.join(HEADS)}, or use bertile.load",
            )
        encodings = encode(Path(directory), texts, max_tokens(model.manifest), truncate)
        outputs = infer(model, encodings)
    result = {
        "head": head,
        "texts": list(texts),
        "tokens": [len(encoding.ids) for encoding in encodings],
    }
    return {**result, **_answers(head, outputs, encodings, model.manifest["model"]["labels"])}


def encode(
    directory: Path, texts: Sequence[str], limit: int | None = None, truncate: bool = False
) -> list[Any]:
    """Tokenize with the bundle's own tokenizer.json: no padding, at most `limit` tokens each."""
    (tokenizers,) = require("run", "tokenizers")
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise BundleError(f"{directory} has no tokenizer.json", "call bertile.load with token ids")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception for a file it cannot read
        raise BundleError(f"{path} cannot be read: {error}", "compile the model again") from error
    # What the file says is how the model was trained, often padding and cutting at 128 tokens.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if truncate and limit:
        tokenizer.enable_truncation(limit)
    encodings = tokenizer.encode_batch(list(texts))
    for number, encoding in enumerate(encodings, 1):
        if limit and len(encoding.ids) > limit:
            raise InputError(
                f"text {number} has {len(encoding.ids)} tokens, the model takes at most {limit}",
                "shorten it, or cut it with --truncate",
            )
    return encodings


def max_tokens(manifest: dict[str, Any]) -> int | None:
    """The most tokens of one sequence, by the model's positions and by a static length."""
    limits = (manifest["model"].get("max_length"), manifest["static"].get("length"))
    return min((limit for limit in limits if limit), default=None)


def infer(model: loader.Model, encodings: Sequence[Any]) -> list[dict[str, np.ndarray]]:
    """Run texts in batches of similar length; one row of each output per text, in their order."""
    outputs: list[dict[str, np.ndarray]] = [{} for _ in encodings]
    order = sorted(range(len(encodings)), key=lambda index: len(encodings[index].ids))
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        results = model(**_batch([encodings[index] for index in chosen], model.inputs))
        for row, index in enumerate(chosen):
            outputs[index] = {name: array[row] for name, array in results.items()}
    return outputs


def as_text(result: dict[str, Any]) -> str:
    """What `bertile run` prints: a table of similarities or of labels."""
    texts = [_short(text) for text in result["texts"]]
    if result["head"] == "embedding":
        numbers = [f"[{index}]" for index in range(1, len(texts) + 1)]
        rows = [(n, *row, text) for n, row, text in zip(numbers, result["cosine"], texts)]
        return table(("", *numbers, "text"), rows)
    if result["head"] == "sequence-classification":
        labels = [
            (text, answer["label"], answer["score"])
            for text, answer in zip(texts, result["labels"])
        ]
        return table(("text", "label", "score"), labels)
    tokens = [
        (number, answer["token"], answer["label"], answer["score"])
        for number, row in enumerate(result["labels"], 1)
        for answer in row
    ]
    return table(("text", "token", "label", "score"), tokens)


def _batch(encodings: Sequence[Any], names: Sequence[str]) -> dict[str, np.ndarray]:
    arrays = {}
    length = max(len(encoding.ids) for encoding in encodings)
    fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    for name in names:
        arrays[name] = np.zeros((len(encodings), length), np.int64)
        for row, encoding in enumerate(encodings):
            arrays[name][row, : len(encoding.ids)] = getattr(encoding, fields[name])
    return arrays


def _answers(
    head: str, outputs: list[dict[str, np.ndarray]], encodings: list[Any], labels: list[str]
) -> dict[str, Any]:
    if head == "embedding":
        vectors = np.stack([output["sentence_embedding"] for output in outputs])
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
        return {"embeddings": vectors.tolist(), "cosine": (unit @ unit.T).tolist()}
    if head == "sequence-classification":
        return {"labels": [_label(output["logits"], labels) for output in outputs]}
    rows = []
    for output, encoding in zip(outputs, encodings):
        special = encoding.special_tokens_mask
        real = [index for index in range(len(encoding.ids)) if not special[index]]
        rows.append(
            [{"token": encoding.tokens[i], **_label(output["logits"][i], labels)} for i in real]
        )
    return {"labels": rows}


def _label(logits: np.ndarray, labels: list[str]) -> dict[str, Any]:
    if logits.size == 1:  # a regression: the one number is the answer
        return {"label": labels[0] if labels else "score", "score": float(logits[0])}
    scores = np.exp(logits - logits.max())
    best = int(scores.argmax())
    label = labels[best] if best < len(labels) else f"LABEL_{best}"
    return {"label": label, "score": float(scores[best] / scores.sum())}


def _short(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."
