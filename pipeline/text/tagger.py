"""Labels the tokens of texts and joins them to entities, as transformers' token-classification."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import tee
from typing import Any, NamedTuple

import numpy as np

from bertile.base.allowed import AGGREGATIONS
from bertile.base.errors import UsageError, nearest
from bertile.text.engine import Answer
from bertile.text.scores import softmax
from bertile.text.text_model import TextModel, checked, is_single


class _Token(NamedTuple):
    """A token: its text, the scores (labels,) float32, and the characters that it stands for."""

    word: str
    scores: np.ndarray
    start: int
    end: int
    index: int
    continues: bool  # the word that began before it


class Tagger(TextModel):
    """The entities of texts."""

    def entities(
        self,
        texts: str | Iterable[str],
        aggregation_strategy: str = "simple",
        ignore_labels: Sequence[str] = ("O",),
        *,
        show_progress_bar: bool | None = None,
        truncate: bool = True,
    ) -> list[Any]:
        """The entities of a text, or a list of those of each text.

        An entity is {"entity_group", "score", "word", "start", "end"}: neighbours of one label are
        joined ("simple"), after all tokens of a word have got the label of its first, of the
        average or of the surest token ("first", "average", "max"). "none" gives the tokens,
        {"entity", "score", "index", "word", "start", "end"}. Raises UsageError for an unknown
        strategy.
        """
        if isinstance(texts, str):
            strategy = _known_strategy(aggregation_strategy)
            prepare = self.preparer(prompted=False, truncate=truncate, offsets=True)
            answer = self._answer(texts, prepare)
            return self._of(texts, answer, strategy, ignore_labels)
        return list(
            self.entities_iter(
                texts,
                aggregation_strategy,
                ignore_labels,
                show_progress_bar=show_progress_bar,
                truncate=truncate,
            )
        )

    def entities_iter(
        self,
        texts: Iterable[str],
        aggregation_strategy: str = "simple",
        ignore_labels: Sequence[str] = ("O",),
        *,
        show_progress_bar: bool | None = None,
        truncate: bool = True,
    ) -> Iterator[list[dict[str, Any]]]:
        """As `entities` of several texts, as they come."""
        strategy = _known_strategy(aggregation_strategy)
        texts = checked(texts, is_single, "a str")
        # of an iterator, what is not yet answered is kept
        texts, again = (texts, iter(texts)) if isinstance(texts, Sequence) else tee(texts)
        prepare = self.preparer(prompted=False, truncate=truncate, offsets=True)
        answers = self._answers(
            texts, prepare, show_progress_bar=show_progress_bar, what="entities"
        )
        return (self._of(next(again), answer, strategy, ignore_labels) for answer in answers)

    def _of(
        self, text: str, answer: Answer, strategy: str, ignored: Sequence[str]
    ) -> list[dict[str, Any]]:
        tokens = self._known(text, answer)
        if strategy in ("none", "simple"):
            entities = [self._labelled(token) for token in tokens]
        else:
            entities = [self._word(word, strategy) for word in _words(tokens)]
        if strategy != "none":
            entities = [self._joined(group) for group in _groups(entities)]
        return [e for e in entities if e.get("entity", e.get("entity_group")) not in ignored]

    def _known(self, text: str, answer: Answer) -> list[_Token]:
        """The tokens that are not special."""
        encoding, rows = answer.encoding, softmax(answer.outputs["logits"])
        prefixed = bool(getattr(self.tokenizer.model, "continuing_subword_prefix", None))
        unknown, special = self._tokens.special_id("unk"), encoding.special_tokens_mask
        tokens = []
        for index, (start, end) in enumerate(encoding.offsets):
            if special[index]:
                continue
            word = encoding.tokens[index]
            if prefixed:
                continues = len(word) != end - start
            else:  # no word is known, but where a blank stands before it
                continues = start > 0 and " " not in text[start - 1 : start + 1]
            if encoding.ids[index] == unknown:
                word, continues = text[start:end], False
            tokens.append(_Token(word, rows[index], start, end, index, continues))
        return tokens

    def _labelled(self, token: _Token) -> dict[str, Any]:
        best = int(token.scores.argmax())
        return {
            "entity": self.label(best),
            "score": token.scores[best],
            "index": token.index,
            "word": token.word,
            "start": token.start,
            "end": token.end,
        }

    def _word(self, tokens: Sequence[_Token], strategy: str) -> dict[str, Any]:
        """The entity of all tokens of a word."""
        if strategy == "first":
            scores = tokens[0].scores
        elif strategy == "max":
            scores = max(tokens, key=lambda token: token.scores.max()).scores
        else:
            scores = np.mean([token.scores for token in tokens], axis=0)
        best = int(scores.argmax())
        return {
            "entity": self.label(best),
            "score": scores[best],
            "word": self._tokens.words([token.word for token in tokens]),
            "start": tokens[0].start,
            "end": tokens[-1].end,
        }

    def _joined(self, entities: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "entity_group": entities[0]["entity"].split("-", 1)[-1],
            "score": np.mean([entity["score"] for entity in entities]),
            "word": self._tokens.words([entity["word"] for entity in entities]),
            "start": entities[0]["start"],
            "end": entities[-1]["end"],
        }


def _known_strategy(name: str) -> str:
    strategy = name.lower()
    if strategy not in AGGREGATIONS:
        raise UsageError(f"aggregation_strategy '{name}' is unknown{nearest(name, AGGREGATIONS)}")
    return strategy


def _words(tokens: Iterable[_Token]) -> list[list[_Token]]:
    """The tokens of each word."""
    words: list[list[_Token]] = []
    for token in tokens:
        if words and token.continues:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _groups(entities: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Neighbours of the same label, of which none but the first begins (B-) an entity."""
    groups: list[list[dict[str, Any]]] = []
    before = None
    for entity in entities:
        begins, label = _parts(entity["entity"])
        if groups and label == before and not begins:
            groups[-1].append(entity)
        else:
            groups.append([entity])
        before = label
    return groups


def _parts(label: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and the label without B- and I-."""
    return label.startswith("B-"), label[2:] if label[:2] in ("B-", "I-") else label
