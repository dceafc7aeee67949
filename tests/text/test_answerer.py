"""Answers are those of transformers 4's question-answering, which is written out here by hand.

transformers 5 has no such pipeline; what is written out tries every span.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import text_models
from helpers.text_models import TEXTS, assert_same

from bertile.errors import BertileError
from bertile.text.answerer import Answerer

QUESTION = "Who lives in New York?"
CONTEXT = "Zoë lives in New York, not in Berlin! The old cat sat on the unbelievable mat. 東京 🙂"
LONG_CONTEXT = " ".join([*TEXTS, CONTEXT, "it runs 3 long books -", *TEXTS])


@pytest.fixture(scope="module")
def directory(saved) -> Path:
    return saved("answerer")


@pytest.fixture(scope="module")
def answerer(directory: Path) -> Answerer:
    return text_models.stand_in(directory, "question-answering")


@pytest.fixture(scope="module")
def by_hand(directory: Path):
    """The answers, by every span of every window."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(directory).eval()

    def answers(
        question: str,
        context: str,
        count: int = 1,
        length: int = text_models.LENGTH,
        stride: int | None = None,
        longest: int = 15,
        impossible: bool = False,
        words: bool = True,
    ) -> Any:
        windows = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=length,
            stride=length // 2 if stride is None else stride,
            return_overflowing_tokens=True,
        )
        summed: dict[str, dict[str, Any]] = {}
        nothing = []
        for number, encoding in enumerate(windows.encodings):
            ids = {n: torch.tensor([windows[n][number]]) for n in tokenizer.model_input_names}
            with torch.inference_mode():
                output = model(**ids)
            places = [0] + [i for i, part in enumerate(encoding.sequence_ids) if part == 1]
            starts, ends = (
                torch.softmax(logits[0, places].double(), 0)
                for logits in (output.start_logits, output.end_logits)
            )
            nothing.append(float(starts[0] * ends[0]))
            spans = [
                (float(starts[i] * ends[j]), places[i], places[j])
                for i in range(1, len(places))
                for j in range(i, min(len(places), i + longest))
            ]
            for score, first, last in sorted(spans, reverse=True)[:count]:
                start, end = encoding.offsets[first][0], encoding.offsets[last][1]
                if words:  # back to where a word begins, on to where it ends
                    ids_of = encoding.word_ids
                    while (
                        encoding.sequence_ids[first - 1] == 1 and ids_of[first - 1] == ids_of[first]
                    ):
                        first -= 1
                    while encoding.sequence_ids[last + 1] == 1 and ids_of[last + 1] == ids_of[last]:
                        last += 1
                    start, end = encoding.offsets[first][0], encoding.offsets[last][1]
                text = context[start:end]
                answer = {"score": 0.0, "start": start, "end": end, "answer": text}
                summed.setdefault(text.lower(), answer)["score"] += score
        best = list(summed.values())
        if impossible:
            best.append({"score": min(nothing), "start": 0, "end": 0, "answer": ""})
        best = sorted(best, key=lambda answer: -answer["score"])[:count]
        return best[0] if count == 1 else best

    return answers


@pytest.mark.parametrize("context", [CONTEXT, LONG_CONTEXT, "a", "  old \t mat  "])
@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("top_k", [1, 5])
def test_answers_are_those_of_every_span(answerer, by_hand, context, words, top_k) -> None:
    want = by_hand(QUESTION, context, top_k, words=words)
    got = answerer.answer(QUESTION, context, top_k, align_to_words=words)
    assert_same(got, want, 2e-5)
    for answer in got if top_k > 1 else [got]:
        assert context[answer["start"] : answer["end"]] == answer["answer"] != ""


@pytest.mark.parametrize("length", [20, 33, 48])
@pytest.mark.parametrize("stride", [0, 5, None])
def test_long_contexts_are_read_in_windows(answerer, by_hand, length, stride) -> None:
    answerer.model.calls.clear()
    got = answerer.answer(QUESTION, LONG_CONTEXT, 3, max_seq_len=length, doc_stride=stride)
    assert_same(got, by_hand(QUESTION, LONG_CONTEXT, 3, length, stride), 2e-5)
    assert sum(rows for rows, _ in answerer.model.calls) > 1
    assert max(tokens for _, tokens in answerer.model.calls) <= length


@pytest.mark.parametrize("longest", [1, 3, 100])
def test_answers_have_at_most_so_many_tokens(answerer, by_hand, longest) -> None:
    got = answerer.answer(QUESTION, CONTEXT, 4, max_answer_len=longest)
    assert_same(got, by_hand(QUESTION, CONTEXT, 4, longest=longest), 2e-5)


@pytest.mark.parametrize("context", [CONTEXT, LONG_CONTEXT])
def test_no_answer_is_an_answer_where_it_is_asked_for(answerer, by_hand, context) -> None:
    got = answerer.answer(QUESTION, context, 10**6, handle_impossible_answer=True)
    (nothing,) = [answer for answer in got if answer["answer"] == ""]
    want = by_hand(QUESTION, context, 10**6, impossible=True)
    assert_same(nothing, next(answer for answer in want if answer["answer"] == ""), 2e-5)
    assert [answer["score"] for answer in got] == sorted((a["score"] for a in got), reverse=True)
    assert_same(got[:5], want[:5], 2e-5)
    alone = answerer.answer(QUESTION, context, handle_impossible_answer=True)
    assert_same(alone, by_hand(QUESTION, context, impossible=True), 2e-5)


def test_lists_of_questions_and_contexts_give_lists(answerer) -> None:
    single = answerer.answer(QUESTION, CONTEXT)
    other = answerer.answer("What?", CONTEXT)
    assert_same(answerer.answer(["What?", QUESTION], CONTEXT), [other, single])
    assert_same(answerer.answer(QUESTION, [CONTEXT]), [single])
    assert_same(answerer.answer(["What?", QUESTION], [CONTEXT] * 2), [other, single])
    assert answerer.answer([], CONTEXT) == []


def test_long_question_is_cut_and_counted(answerer) -> None:
    words = "who " * 40
    got = answerer.answer(words, CONTEXT, max_question_len=10)
    assert answerer.truncated == 1
    assert_same(got, answerer.answer("who " * 10, CONTEXT))
    assert answerer.truncated == 0


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((" ", CONTEXT), {}, "the question is empty"),
        ((QUESTION, ""), {}, "the context is empty"),
        ((QUESTION, [CONTEXT, 3]), {}, "the context is empty"),
        (([QUESTION] * 2, [CONTEXT] * 3), {}, "there are 2 questions and 3 contexts"),
        ((QUESTION, CONTEXT), {"top_k": 0}, "top_k and max_answer_len are at least 1"),
        ((QUESTION, CONTEXT), {"max_answer_len": 0}, "top_k and max_answer_len are at least 1"),
        (
            (QUESTION, CONTEXT),
            {"max_seq_len": 9},
            "windows of 9 tokens have no room for a question",
        ),
        (
            (QUESTION, CONTEXT),
            {"doc_stride": 47},
            "have no room for a question of 9 and a doc_stri",
        ),
        ((QUESTION, "\u200b"), {}, "the context has no token that could be an answer"),
    ],
)
def test_what_leaves_no_answer_is_named(answerer, arguments, options, message) -> None:
    with pytest.raises(BertileError) as caught:
        answerer.answer(*arguments, **options)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_shares_of_a_window_are_of_its_context_alone(answerer) -> None:
    """However sure the model is of a token of the question."""
    module = answerer.model.module

    class Sure:
        config = module.config

        def __call__(self, **tensors: Any) -> Any:
            outputs = module(**tensors)
            outputs.start_logits[:, 2] += 100
            return outputs

    answerer.model.module = Sure()
    try:
        want = np.nan_to_num(answerer.answer(QUESTION, CONTEXT)["score"])
    finally:
        answerer.model.module = module
    assert_same(want, answerer.answer(QUESTION, CONTEXT)["score"])
