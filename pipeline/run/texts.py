"""Answers texts as the model's own library does: sentence vectors, or labels with scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertile import loader
from bertile.base.errors import BundleError, InputError, require
from bertile.base.progress import track
from bertile.base.tables import table
from bertile.families import text_settings
from bertile.families.text_settings import TextSettings

BATCH = 32
# What a tokenizer's encoding calls the inputs of a model.
FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
HEADS = ("embedding", "sequence-classification", "token-classification")


def run(
    directory: Path, texts: Sequence[str], *, truncate: bool = False, threads: int | None = None
) -> dict[str, Any]:
    """Run the bundle in `directory` on `texts`.

    Gives "embeddings" and their "cosine" similarities, or per text a label and a score, or per
    token a label and a score. Scores are made as transformers' pipelines make them. Raises
    InputError for a text with more tokens than the model takes (unless `truncate`) and for a bundle
    whose head has no answer to a text.
    """
    with loader.load(directory, threads) as model:
        head = model.manifest["model"]["head"]
        if head not in HEADS:
            raise InputError(
                f"{directory} has the head '{head}', which gives no answer to a text",
                f"compile the model with a --head of {', '.join(HEADS)}, or use bertile.load",
            )
        settings = text_settings.of_bundle(Path(directory), model.manifest)
        if head == "embedding" and settings.kind == "tokens":
            raise InputError(
                f"{directory} gives a vector for each token, which are many numbers and no answer",
                "use bertile.load, and compare texts by their tokens' vectors (MaxSim)",
            )
        limit = max_tokens(model.manifest)
        encodings = encode(Path(directory), texts, limit, truncate, settings)
        outputs = infer(model, encodings)
    result = {
        "head": head,
        "texts": list(texts),
        "tokens": [len(encoding.ids) for encoding in encodings],
    }
    labels = model.manifest["model"]["labels"]
    if head == "embedding":
        return {**result, **_vectors(outputs)}
    if head == "token-classification":
        return {**result, "labels": _by_token(outputs, encodings, labels)}
    answers = [_label(output["logits"], labels, settings.scores) for output in outputs]
    return {**result, "labels": answers}


def encode(
    directory: Path,
    texts: Sequence[str],
    limit: int | None = None,
    truncate: bool = False,
    settings: TextSettings | None = None,
) -> list[Any]:
    """Tokenize with the bundle's own tokenizer.json: no padding, at most `limit` tokens each.

    Case, prompt, and what is left of a text that is cut are those of the model's own library;
    `settings` are by default those of the bundle, or of the files in the directory of a model.
    Raises InputError for a text that is longer and not to be cut.
    """
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
    side = (tokenizer.truncation or {}).get("direction", "right")
    tokenizer.no_truncation()
    settings = settings or _settings(directory)
    _normalize(tokenizers, tokenizer, settings)
    most = min((most for most in (limit, settings.longest) if most), default=None)
    cut_at = min((most for most in (most, settings.cut_at) if most), default=None)
    if truncate and cut_at:
        side = settings.side or side
        tokenizer.enable_truncation(cut_at, strategy="longest_first", direction=side)
    encodings = tokenizer.encode_batch([settings.prompt + text for text in texts])
    for number, encoding in enumerate(encodings, 1):
        if most and len(encoding.ids) > most:
            raise InputError(
                f"text {number} has {len(encoding.ids)} tokens, the model takes at most {most}",
                "shorten it, or cut it with --truncate",
            )
    return encodings


def _normalize(tokenizers: Any, tokenizer: Any, settings: TextSettings) -> None:
    """Set the tokenizer's normalizer as transformers and sentence-transformers do."""
    kinds, normalizer = tokenizers.normalizers, tokenizer.normalizer
    if settings.normalizer is not None and isinstance(normalizer, kinds.BertNormalizer):
        normalizer = kinds.BertNormalizer(normalizer.clean_text, **settings.normalizer)
    if settings.lower:
        lower = kinds.Lowercase()
        normalizer = lower if normalizer is None else kinds.Sequence([lower, normalizer])
    if normalizer is not None:
        tokenizer.normalizer = normalizer


def _settings(directory: Path) -> TextSettings:
    if (directory / loader.MANIFEST).is_file():
        return text_settings.of_bundle(directory, loader.read_manifest(directory))
    return text_settings.read(directory)


def max_tokens(manifest: dict[str, Any]) -> int | None:
    """The most tokens of one sequence, by the model's positions and by a static length."""
    limits = (manifest["model"].get("max_length"), manifest["static"].get("length"))
    return min((limit for limit in limits if limit), default=None)


def infer(model: loader.Model, encodings: Sequence[Any]) -> list[dict[str, np.ndarray]]:
    """Run texts in batches of similar length; one row of each output per text, in their order."""
    outputs: list[dict[str, np.ndarray]] = [{} for _ in encodings]
    order = sorted(range(len(encodings)), key=lambda index: len(encodings[index].ids))
    for first in track(range(0, len(order), BATCH), "run texts"):
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
    for name in [name for name in names if name in FIELDS]:  # the loader fills what no text says
        arrays[name] = np.zeros((len(encodings), length), np.int64)
        for row, encoding in enumerate(encodings):
            arrays[name][row, : len(encoding.ids)] = getattr(encoding, FIELDS[name])
    return arrays


def _vectors(outputs: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    vectors = np.stack([output["sentence_embedding"] for output in outputs])
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return {"embeddings": vectors.tolist(), "cosine": (unit @ unit.T).tolist()}


def _by_token(
    outputs: list[dict[str, np.ndarray]], encodings: list[Any], labels: list[str]
) -> list[list[dict[str, Any]]]:
    rows = []
    for output, encoding in zip(outputs, encodings):
        special, logits = encoding.special_tokens_mask, output["logits"]
        real = [index for index in range(len(encoding.ids)) if not special[index]]
        rows.append(
            [{"token": encoding.tokens[i], **_label(logits[i], labels, "softmax")} for i in real]
        )
    return rows


def _label(logits: np.ndarray, labels: list[str], scores: str) -> dict[str, Any]:
    """The label of the highest score; of several that may be true at once, too."""
    best = int(logits.argmax())
    label = labels[best] if best < len(labels) else f"LABEL_{best}"
    if scores == "none":
        return {"label": label, "score": float(logits[best])}
    if scores == "sigmoid":
        return {"label": label, "score": float(1 / (1 + np.exp(-np.float64(logits[best]))))}
    return {"label": label, "score": float(1 / np.exp(logits - logits[best]).sum())}


def _short(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."
