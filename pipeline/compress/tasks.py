"""Says what each task is: its head, its tensors, its loss, and what its answers are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bertile.compress.data import Example
from bertile.evaluation import metrics

IGNORED = -100  # the label of what is not labelled, by which torch's losses leave it out

Batch = dict[str, Tensor]
Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A row of TASKS.

    name       as --task takes it
    head       Bertile's name of the head
    outputs    what a teacher's answers are compared in, by the names of the model's outputs
    encode     makes tensors of examples, given a tokenizer, the labels and the longest length
    loss       of outputs and a batch: the sum over labelled examples, and their number
    correct    one number an example from outputs and a batch, whose mean is the `metric`
    metric     what that mean is called
    """

    name: str
    head: str
    outputs: tuple[str, ...]
    encode: Callable[[Any, Sequence[Example], Mapping[str, int], int], Batch]
    loss: Callable[[Outputs, Batch], tuple[Tensor, Tensor]]
    correct: Callable[[Outputs, Batch], np.ndarray]
    metric: str


def inputs_of(batch: Batch) -> Batch:
    """What a model is called with; the rest is what its answers are compared with."""
    return {name: batch[name] for name in batch if not name.startswith("wanted_")}


def _tokenized(tokenizer: Any, longest: int, *texts: Any, **choices: Any) -> Any:
    return tokenizer(
        *texts, padding=True, truncation=True, max_length=longest, return_tensors="pt", **choices
    )


def _encode_texts(
    tokenizer: Any, examples: Sequence[Example], labels: Mapping[str, int], longest: int
) -> Batch:
    columns = [list(column) for column in zip(*(example.texts for example in examples))]
    batch = dict(_tokenized(tokenizer, longest, *columns))
    wanted = [IGNORED if e.label is None else labels[e.label] for e in examples]
    return {**batch, "wanted_labels": torch.tensor(wanted)}


def _encode_unlabelled(
    tokenizer: Any, examples: Sequence[Example], labels: Mapping[str, int], longest: int
) -> Batch:
    return dict(_tokenized(tokenizer, longest, [example.texts[0] for example in examples]))


def _encode_words(
    tokenizer: Any, examples: Sequence[Example], labels: Mapping[str, int], longest: int
) -> Batch:
    """The first piece of a word has its label, all others none."""
    words = [list(example.texts) for example in examples]
    batch = _tokenized(tokenizer, longest, words, is_split_into_words=True)
    wanted = torch.full(batch["input_ids"].shape, IGNORED)
    for row, example in enumerate(examples):
        before = None
        for place, word in enumerate(batch.word_ids(row)):
            if word is not None and word != before and example.label is not None:
                wanted[row, place] = labels[example.label[word]]
            before = word
    return {**dict(batch), "wanted_labels": wanted}


def _encode_questions(
    tokenizer: Any, examples: Sequence[Example], labels: Mapping[str, int], longest: int
) -> Batch:
    """The first answer's tokens; what is cut off, or has no answer, is at the first token."""
    questions, contexts = ([e.texts[place] for e in examples] for place in range(2))
    batch = tokenizer(
        questions,
        contexts,
        padding=True,
        truncation="only_second",
        max_length=longest,
        return_tensors="pt",
    )
    spans = []
    for row, example in enumerate(examples):
        if example.label is None:
            spans.append((IGNORED, IGNORED))
            continue
        start = end = 0
        if example.label:
            text, first = example.label[0]
            first_token = batch.char_to_token(row, first, sequence_index=1)
            last_token = batch.char_to_token(row, first + len(text) - 1, sequence_index=1)
            if first_token is not None and last_token is not None:
                start, end = first_token, last_token
        spans.append((start, end))
    starts, ends = (torch.tensor(column) for column in zip(*spans))
    return {**dict(batch), "wanted_starts": starts, "wanted_ends": ends}


def _label_loss(outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
    logits, wanted = outputs["logits"].float(), batch["wanted_labels"]
    flat = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        wanted.reshape(-1),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return flat, (wanted != IGNORED).sum()


def _span_loss(outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
    total = sum(
        F.cross_entropy(outputs[name].float(), batch[wanted], ignore_index=IGNORED, reduction="sum")
        for name, wanted in (("start_logits", "wanted_starts"), ("end_logits", "wanted_ends"))
    )
    return total, 2 * (batch["wanted_starts"] != IGNORED).sum()


def _no_loss(outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
    zero = batch["input_ids"].new_zeros(())
    return zero.float(), zero


def _right_labels(outputs: Outputs, batch: Batch) -> np.ndarray:
    """1 or 0 for a text; for words the share of a text's that are right."""
    wanted = batch["wanted_labels"]
    right = (outputs["logits"].argmax(-1) == wanted).float()
    if wanted.dim() == 1:
        return right.numpy()
    counts = (wanted != IGNORED).float()
    return ((right * counts).sum(1) / counts.sum(1).clamp(min=1)).numpy()


def _right_spans(outputs: Outputs, batch: Batch) -> np.ndarray:
    """Whether both ends are the wanted ones, taken as the best span that does not run backward."""
    starts, ends = outputs["start_logits"].float(), outputs["end_logits"].float()
    mask = batch["attention_mask"][:, None, :] * batch["attention_mask"][:, :, None]
    scores = starts[:, :, None] + ends[:, None, :]
    scores = scores.masked_fill(torch.triu(mask) == 0, float("-inf"))
    best = scores.flatten(1).argmax(1)
    length = starts.shape[1]
    right = (best // length == batch["wanted_starts"]) & (best % length == batch["wanted_ends"])
    return right.float().numpy()


def _nothing(outputs: Outputs, batch: Batch) -> np.ndarray:
    return np.zeros(len(batch["input_ids"]))


TASKS = {
    task.name: task
    for task in (
        Task(
            "text",
            "sequence-classification",
            ("logits",),
            _encode_texts,
            _label_loss,
            _right_labels,
            "accuracy",
        ),
        Task(
            "pair",
            "sequence-classification",
            ("logits",),
            _encode_texts,
            _label_loss,
            _right_labels,
            "accuracy",
        ),
        Task(
            "tokens",
            "token-classification",
            ("logits",),
            _encode_words,
            _label_loss,
            _right_labels,
            "accuracy of words",
        ),
        Task(
            "answers",
            "question-answering",
            ("start_logits", "end_logits"),
            _encode_questions,
            _span_loss,
            _right_spans,
            "exact spans",
        ),
        Task(
            "embedding",
            "embedding",
            ("sentence_embedding",),
            _encode_unlabelled,
            _no_loss,
            _nothing,
            "spearman",
        ),
    )
}


def similarity(vectors: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """How like a teacher's an embedding is: of all pairs' similarities Spearman, and the cosine."""
    return {
        "spearman": metrics.similarity_spearman(vectors, wanted),
        "cosine": metrics.mean_cosine(vectors, wanted),
    }
