"""Reads texts, labelled or not, and says how good a bundle's answers to them are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bertile import backends, loader
from bertile.base.errors import InputError, UsageError
from bertile.evaluation.metrics import accuracy, mean_cosine, similarity_spearman
from bertile.families import text_settings
from bertile.run import opener
from bertile.text import batches
from bertile.text.tokens import TextTokenizer, max_tokens

# head: (the output that answers, whether it needs labels)
ANSWERS = {"sequence-classification": ("logits", True), "embedding": ("sentence_embedding", False)}


@dataclass(frozen=True)
class Dataset:
    """Texts, and the label of each where the file has labels."""

    path: Path
    texts: tuple[str, ...]
    labels: tuple[str, ...] | None = None

    @property
    def metric(self) -> str:
        """The name of what `score` gives."""
        return "cosine or spearman" if self.labels is None else "accuracy"

    def score(self, answers: np.ndarray, reference: np.ndarray, names: Sequence[str]) -> float:
        """One number for how good answers are: accuracy, or the lower of cosine and Spearman."""
        scores = self.metrics(answers, reference, names)
        return scores["accuracy"] if self.labels else min(scores.values())

    def metrics(
        self, answers: np.ndarray, reference: np.ndarray, names: Sequence[str]
    ) -> dict[str, float]:
        """How good answers (N, C) are.

        With labels: "accuracy", and "agreement" with the reference's choices; `names` are those of
        the C labels. Without: "cosine" to the reference, and "spearman" of all pairs' similarities.
        """
        if self.labels is None:
            return {
                "cosine": mean_cosine(answers, reference),
                "spearman": similarity_spearman(answers, reference),
            }
        unknown = sorted(set(self.labels) - set(names))
        if unknown:
            raise InputError(
                f"'{self.path}' has the label '{unknown[0]}', which the model does not know",
                f"known: {', '.join(names)}",
            )
        chosen, theirs = ([names[i] for i in rows.argmax(1)] for rows in (answers, reference))
        return {"accuracy": accuracy(chosen, self.labels), "agreement": accuracy(chosen, theirs)}


def read(path: Path) -> Dataset:
    """Read .tsv (text, tab, label), .jsonl ({"text", "label"}) or .txt (a sentence a line).

    Raises UsageError for another kind of file, and for a line that is not as it should be.
    """
    readers = {".tsv": _tsv, ".jsonl": _jsonl, ".txt": lambda line: (line, None)}
    if path.suffix not in readers:
        raise UsageError(
            f"'{path}' is not a file to evaluate with",
            "give labelled texts as .tsv or .jsonl, or sentences as .txt",
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UsageError(f"there is no file '{path}'") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is not UTF-8 text: {error.reason}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(readers[path.suffix](line))
            except (ValueError, KeyError, TypeError) as error:
                wanted = "text, a tab, a label" if path.suffix == ".tsv" else '{"text", "label"}'
                raise UsageError(f"line {number} of '{path}' is not: {wanted}") from error
    if len(rows) < 3:
        raise UsageError(f"'{path}' has {len(rows)} texts", "give at least three")
    texts, labels = zip(*rows)
    return Dataset(path, texts, None if path.suffix == ".txt" else labels)


def answers(
    directory: Path,
    dataset: Dataset,
    threads: int | None = None,
    parts: opener.Parts | None = None,
) -> np.ndarray:
    """What the bundle in `directory` answers to each text: logits or vectors, (N, C).

    It is run as its backend's `open` says.
    Raises InputError where the bundle's head does not fit the file.
    """
    backend = backends.of_bundle(loader.read_manifest(directory))
    with backend.open(directory, threads, parts, verify=False) as model:
        head = model.manifest["model"]["head"]
        output = output_of(head, dataset)
        if output not in model.outputs:
            raise InputError(
                f"'{dataset.path}' cannot evaluate a model that gives {', '.join(model.outputs)}",
                f"it is evaluated by its {output}, which such a model lacks",
            )
        settings = text_settings.of_bundle(directory, model.manifest)
        tokenizer = TextTokenizer(Path(directory), settings, max_tokens(model.manifest))
        encodings = tokenizer.encode(dataset.texts)
        return np.stack([arrays[output] for arrays in batches.run_all(model, encodings)])


def output_of(head: str, dataset: Dataset) -> str:
    """The model's output that answers a dataset; InputError where the head does not fit it."""
    output, labelled = ANSWERS.get(head, ("", False))
    if not output or labelled != (dataset.labels is not None):
        wanted = {True: "labelled texts (.tsv, .jsonl)", False: "sentences (.txt)"}
        remedy = (
            f"it is evaluated with {wanted[labelled]}"
            if output
            else "compile it with --head embedding"
        )
        raise InputError(f"'{dataset.path}' cannot evaluate a model with the head '{head}'", remedy)
    return output


def _tsv(line: str) -> tuple[str, str]:
    text, tab, label = line.rpartition("\t")
    if not tab or not text.strip() or not label.strip():
        raise ValueError(line)
    return text, label.strip()


def _jsonl(line: str) -> tuple[str, str]:
    fields = json.loads(line)
    if not isinstance(fields["text"], str):
        raise ValueError(line)
    return fields["text"], str(fields["label"])
