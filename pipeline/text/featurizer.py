"""Gives the last hidden states of an encoder's tokens, as transformers' feature-extraction does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from bertile.text.text_model import TextModel, checked, is_single


class Featurizer(TextModel):
    """The vectors of a text's tokens, the special ones among them."""

    def features(
        self, texts: str | Iterable[str], *, truncate: bool = True
    ) -> np.ndarray | list[np.ndarray]:
        """(tokens, hidden) float32 of a text, or a list of those."""
        if isinstance(texts, str):
            return self._hidden(self._answer(texts, truncate=truncate))
        return list(self.features_iter(texts, truncate=truncate))

    def features_iter(self, texts: Iterable[str], *, truncate: bool = True) -> Iterator[np.ndarray]:
        """As `features`, as they come, in the order of the texts."""
        answers = self._answers(checked(texts, is_single, "a str"), truncate=truncate)
        return (self._hidden(answer) for answer in answers)

    def _hidden(self, answer: Any) -> np.ndarray:
        return np.array(answer.outputs[self.model.outputs[0]])
