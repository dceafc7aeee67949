"""Finds the answer to a question in a text of any length, as transformers' question-answering."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bertile.base.errors import UsageError
from bertile.text.scores import softmax
from bertile.text.text_model import TextModel


class _Span(NamedTuple):
    """A possible answer: its score, and the characters of the context that it is."""

    score: float
    start: int
    end: int


class Answerer(TextModel):
    """Answers as spans of a context."""

    def answer(
        self,
        question: str,
        context: str,
        top_k: int = 1,
        *,
        doc_stride: int = 128,
        max_answer_len: int = 15,
        max_seq_len: int = 384,
        max_question_len: int = 64,
        handle_impossible_answer: bool = False,
    ) -> Any:
        """The best answer {"score", "start", "end", "answer"}, or a list of the `top_k` best.

        A context that is too long is read in windows of `max_seq_len` tokens which share
        `doc_stride`. An answer has at most `max_answer_len` tokens; a question is cut to
        `max_question_len`. With `handle_impossible_answer`, no answer ("") is one too. Raises
        UsageError for an empty question or context, and for numbers that leave no room.
        """
        for name, text in (("question", question), ("context", context)):
            if not isinstance(text, str) or not text.strip():
                raise UsageError(f"the {name} is empty", "give a text")
        if top_k < 1 or max_answer_len < 1:
            raise UsageError("top_k and max_answer_len are at least 1", "give a larger number")
        question = self._cut_question(question, max_question_len)
        windows = list(self._windows(question, context, max_seq_len, doc_stride))
        spans: dict[tuple[int, int], _Span] = {}
        impossible = 1.0
        for encoding, outputs in windows:
            starts, ends, nothing = _shares(encoding, outputs)
            impossible = min(impossible, nothing)
            for span in _best_spans(encoding, starts, ends, max_answer_len, top_k):
                known = spans.get(span[1:])  # windows overlap
                if known is None or known.score < span.score:
                    spans[span[1:]] = span
        best = list(spans.values())
        if handle_impossible_answer:
            best.append(_Span(impossible, 0, 0))
        best = sorted(best, key=lambda span: -span.score)[:top_k]
        answers = [{**span._asdict(), "answer": context[span.start : span.end]} for span in best]
        if not answers:
            raise UsageError("the context has no token that could be an answer", "give a text")
        return answers[0] if top_k == 1 else answers

    def _cut_question(self, question: str, most: int) -> str:
        encoding = self.tokenizer.encode(question, add_special_tokens=False)
        if len(encoding) <= most:
            return question
        return question[: encoding.offsets[most - 1][1]]

    def _windows(
        self, question: str, context: str, most: int, stride: int
    ) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
        """The model's outputs for each window of the context."""
        most = min(most, self.max_seq_length or most)
        asked = len(self.tokenizer.encode(question, ""))
        if most - asked <= stride:
            raise UsageError(
                f"windows of {most} tokens have no room for a question of {asked} and a"
                f" doc_stride of {stride}",
                "give a shorter question or a smaller doc_stride",
            )
        encoding = self._tokens.cutting(most, "only_second", stride).encode(question, context)
        windows = [encoding, *encoding.overflowing]
        # all at once, since they run together
        texts = [(question, str(number)) for number in range(len(windows))]
        answers = self._engine.stream(texts, lambda chunk: [windows[int(n)] for _, n in chunk])
        return ((answer.encoding, answer.outputs) for answer in answers)


def _shares(encoding: Any, outputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, float]:
    """Of each token how likely an answer starts and ends there, and how likely there is none.

    Tokens of the question and special ones have no share, except the first, which means none.
    """
    allowed = np.asarray([part == 1 for part in encoding.sequence_ids])
    allowed[0] = True
    starts, ends = (
        softmax(np.where(allowed, outputs[name], -np.inf))
        for name in ("start_logits", "end_logits")
    )
    nothing = float(starts[0] * ends[0])
    starts[0] = ends[0] = 0.0
    return starts, ends, nothing


def _best_spans(
    encoding: Any, starts: np.ndarray, ends: np.ndarray, longest: int, count: int
) -> Sequence[_Span]:
    """The likeliest spans of at most so many tokens, by their characters."""
    likely = np.triu(np.outer(starts, ends))
    likely = np.tril(likely, longest - 1)
    flat = likely.ravel()
    some = min(4 * count, flat.size)  # of which several may be the same characters
    order = np.argpartition(-flat, some - 1)[:some]
    spans = []
    for index in order[np.argsort(-flat[order], kind="stable")]:
        start, end = np.unravel_index(index, likely.shape)
        if flat[index] <= 0:
            break
        offsets = encoding.offsets
        spans.append(_Span(float(flat[index]), offsets[start][0], offsets[end][1]))
    return spans
