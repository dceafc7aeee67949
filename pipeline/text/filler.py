"""Says what stands in the place of a mask, as transformers' fill-mask does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from bertile.base.errors import InputError, ModelError
from bertile.text.engine import Answer
from bertile.text.scores import softmax
from bertile.text.text_model import LOG, TextModel, checked, is_single


class Filler(TextModel):
    """What masked tokens of texts could be."""

    @property
    def mask_token(self) -> str:
        """What stands for a hidden word in a text."""
        return self.tokenizer.id_to_token(self._mask())

    def fill(
        self,
        texts: str | Iterable[str],
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
    ) -> list[Any]:
        """The `top_k` likeliest tokens for the mask of a text, or a list of those of each text.

        Each is {"score", "token", "token_str", "sequence"}. A text of several masks has a list for
        each. `targets` are the only tokens to choose from; of a word that is several tokens, the
        first, as there, which is logged. Raises InputError for a text without a mask, for no
        targets and for an empty one.
        """
        single = isinstance(texts, str)
        results = list(self.fill_iter([texts] if single else list(texts), top_k, targets))
        return results[0] if single else results

    def fill_iter(
        self,
        texts: Iterable[str],
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        *,
        truncate: bool = True,
    ) -> Iterator[list[Any]]:
        """As `fill` of several texts, as they come."""
        chosen = self._targets(targets)
        prepare = self.preparer(prompted=False, truncate=truncate)
        answers = self._answers(checked(texts, is_single, "a str"), prepare)
        return (
            self._filled(number, answer, top_k, chosen) for number, answer in enumerate(answers, 1)
        )

    def _filled(
        self, number: int, answer: Answer, top_k: int, chosen: np.ndarray | None
    ) -> list[Any]:
        ids = np.asarray(answer.encoding.ids)
        places = np.flatnonzero(ids == self._mask())
        if not len(places):
            where = (
                f" among the {len(ids)} tokens that are kept of it"
                if answer.encoding.overflowing
                else ""
            )
            raise InputError(
                f"text {number} has no {self.mask_token}{where}", "put it for a hidden word"
            )
        rows = []
        for place in places:
            shares = softmax(answer.outputs["logits"][place])
            known = np.arange(len(shares)) if chosen is None else chosen
            order = known[np.argsort(-shares[known], kind="stable")[:top_k]]
            rows.append(
                [
                    {
                        "score": float(shares[token]),
                        "token": int(token),
                        "token_str": self.tokenizer.decode([int(token)], skip_special_tokens=False),
                        "sequence": self._with(ids, place, token, alone=len(places) == 1),
                    }
                    for token in order
                ]
            )
        return rows[0] if len(rows) == 1 else rows

    def _with(self, ids: np.ndarray, place: int, token: int, alone: bool) -> str:
        """The text with the token in its place; other masks stay to be seen."""
        filled = ids.copy()
        filled[place] = token
        return self.tokenizer.decode(filled.tolist(), skip_special_tokens=alone)

    def _mask(self) -> int:
        number = self._tokens.special_id("mask")
        if number is None:
            raise ModelError("the tokenizer has no mask token", "compile a masked language model")
        return number

    def _targets(self, targets: str | Sequence[str] | None) -> np.ndarray | None:
        if targets is None:
            return None
        words = [targets] if isinstance(targets, str) else list(targets)
        ids = [self._token(word) for word in words]
        if not ids:
            raise InputError("targets is empty", "name a word, or leave it out")
        return np.asarray(sorted(set(ids)))

    def _token(self, word: str) -> int:
        """The id of a word, or of its first token."""
        number = self.tokenizer.token_to_id(word)
        if number is not None:
            return number
        encoding = self.tokenizer.encode(word, add_special_tokens=False)
        if not encoding.ids:
            raise InputError(f"the target '{word}' has no token", "name a word")
        LOG.warning("the target '%s' is no token: '%s' is taken", word, encoding.tokens[0])
        return encoding.ids[0]
