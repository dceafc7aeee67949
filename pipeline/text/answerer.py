"""Finds the answer to a question in a text of any length, as transformers' question-answering."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bertile.base.errors import UsageError
from bertile.text.batches import Outputs
from bertile.text.engine import Answer
from bertile.text.scores import softmax
from bertile.text.text_model import Call, TextModel
from bertile.text.tokens import SECOND

WINDOW_TOKENS, SHARED_TOKENS = 384, 128  # what transformers' pipeline takes, where nothing is said


class _Span(NamedTuple):
    """A possible answer: its score, and its first and last token."""

    score: float
    first: int
    last: int


class Answerer(TextModel):
    """Answers as spans of a context."""

    def answer(
        self,
        question: str | Sequence[str],
        context: str | Sequence[str],
        top_k: int = 1,
        *,
        doc_stride: int | None = None,
        max_answer_len: int = 15,
        max_seq_len: int | None = None,
        max_question_len: int = 64,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
    ) -> Any:
        """The best answer {"score", "start", "end", "answer"}, or a list of the `top_k` best.

        A context that is too long is read in windows of `max_seq_len` tokens (384, or what the
        model takes) which share `doc_stride` (128, or half of them). An answer has at most
        `max_answer_len` tokens, and whole words, unless `align_to_words` is False. As there, those
        of a window that are the same text, or of several windows, are one answer with the sum of
        their scores. With `handle_impossible_answer`, no answer ("") is one too. A question is cut
        to `max_question_len` tokens.

        Of a list of questions or contexts, or two of one length, a list. Raises UsageError for an
        empty question or context, and for numbers that leave no room.
        """
        if top_k < 1 or max_answer_len < 1:
            raise UsageError("top_k and max_answer_len are at least 1", "give a larger number")
        call = self._begun()
        results = []
        for asked, text in _pairs(question, context):
            answers: dict[str, dict[str, Any]] = {}
            impossible = 1.0
            for encoding, outputs in self._windows(
                self._cut(asked, max_question_len, call), text, max_seq_len, doc_stride
            ):
                starts, ends, nothing = _shares(encoding, outputs)
                impossible = min(impossible, nothing)
                for span in _best_spans(starts, ends, max_answer_len, top_k):
                    start, end = _characters(encoding, span, align_to_words)
                    fresh = {"score": 0.0, "start": start, "end": end, "answer": text[start:end]}
                    answers.setdefault(text[start:end].lower(), fresh)["score"] += span.score
            best = list(answers.values())
            if handle_impossible_answer:
                best.append({"score": impossible, "start": 0, "end": 0, "answer": ""})
            if not best:
                raise UsageError("the context has no token that could be an answer", "give a text")
            best = sorted(best, key=lambda answer: -answer["score"])[:top_k]
            results.append(best[0] if top_k == 1 else best)
        return results[0] if isinstance(question, str) and isinstance(context, str) else results

    def _cut(self, question: str, most: int, call: Call) -> str:
        encoding = self.tokenizer.encode(question, add_special_tokens=False)
        if len(encoding) <= most:
            return question
        call.cut += 1
        return question[: encoding.offsets[most - 1][1]]

    def _windows(
        self, question: str, context: str, most: int | None, stride: int | None
    ) -> Iterator[Answer]:
        """The model's answers to each window of the context."""
        limit = self.max_seq_length or WINDOW_TOKENS
        most = min(limit, most or WINDOW_TOKENS)
        stride = min(most // 2, SHARED_TOKENS) if stride is None else stride
        asked = len(self.tokenizer.encode(question, ""))
        if most - asked <= stride:
            raise UsageError(
                f"windows of {most} tokens have no room for a question of {asked} and a"
                f" doc_stride of {stride}",
                "give a shorter question or a smaller doc_stride",
            )
        encoding = self._tokens.cutting(most, SECOND, stride).encode(question, context)
        return self.engine.stream([encoding, *encoding.overflowing], list)


def _pairs(question: str | Sequence[str], context: str | Sequence[str]) -> list[tuple[str, str]]:
    """Each question with its context; a str goes with all of a list. UsageError for no texts."""
    counts = [len(texts) for texts in (question, context) if not isinstance(texts, str)]
    count = counts[0] if counts else 1
    columns = []
    for name, texts in (("question", question), ("context", context)):
        rows = [texts] * count if isinstance(texts, str) else list(texts)
        for text in rows:
            if not isinstance(text, str) or not text.strip():
                raise UsageError(f"the {name} is empty", "give a text")
        columns.append(rows)
    if len(columns[0]) != len(columns[1]):
        raise UsageError(
            f"there are {len(columns[0])} questions and {len(columns[1])} contexts",
            "give a context to each question, or one to all",
        )
    return list(zip(*columns))


def _shares(encoding: Any, outputs: Outputs) -> tuple[np.ndarray, np.ndarray, float]:
    """Of each token how likely an answer starts and ends there, and how likely there is none.

    Tokens of the question and special ones have no share, except the first, which means none.
    """
    allowed = np.asarray([part == 1 for part in encoding.sequence_ids])
    allowed[0] |= bool(encoding.special_tokens_mask[0])
    starts, ends = (
        softmax(np.where(allowed, outputs[name], -np.inf))
        for name in ("start_logits", "end_logits")
    )
    nothing = float(starts[0] * ends[0])
    starts[0] = ends[0] = 0.0
    return starts, ends, nothing


def _best_spans(starts: np.ndarray, ends: np.ndarray, longest: int, count: int) -> Iterator[_Span]:
    """The `count` likeliest spans of at most `longest` tokens, the best first."""
    likely = np.tril(np.triu(np.outer(starts, ends)), longest - 1)
    flat = likely.ravel()
    count = min(count, flat.size)
    order = np.argpartition(-flat, count - 1)[:count]
    for index in order[np.argsort(-flat[order], kind="stable")]:
        if flat[index] > 0:
            first, last = np.unravel_index(index, likely.shape)
            yield _Span(float(flat[index]), int(first), int(last))


def _characters(encoding: Any, span: _Span, whole_words: bool) -> tuple[int, int]:
    """Where a span, or the words that it touches, starts and ends in the context."""
    words = encoding.token_to_word(span.first), encoding.token_to_word(span.last)
    if whole_words and None not in words:
        start, end = (encoding.word_to_chars(word, sequence_index=1) for word in words)
        return start[0], end[1]
    return encoding.offsets[span.first][0], encoding.offsets[span.last][1]
