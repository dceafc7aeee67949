"""Gives the last hidden states of an encoder's tokens, as transformers' feature-extraction does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from bertile.text.text_model import Steps, TextModel, checked, is_single


class Featurizer(TextModel):
    """The vectors of a text's tokens, the special ones among them."""

    def features(
        self, texts: str | Iterable[str], *, truncate: bool = True
    ) -> np.ndarray | list[np.ndarray]:
        """(tokens, hidden) float32 of a text, or a list of those."""
        if isinstance(texts, str):
            steps = self.steps(truncate=truncate)
            return steps.finish(self._answer(texts, steps.prepare))
        return list(self.features_iter(texts, truncate=truncate))

    def features_iter(self, texts: Iterable[str], *, truncate: bool = True) -> Iterator[np.ndarray]:
        """As `features`, as they come, in the order of the texts."""
        steps = self.steps(truncate=truncate)
        answers = self._answers(checked(texts, is_single, "a str"), steps.prepare)
        return (steps.finish(answer) for answer in answers)

    def steps(
        self,
        prompt_name: str | None = None,
        prompt: str | None = "",
        *,
        truncate: bool = True,
        side: str | None = None,
    ) -> Steps:
        """What `features` does before the model and behind it; arguments as of `preparer`."""
        prepare = self.preparer(prompt_name, prompt, truncate=truncate, side=side)
        name = self.model.outputs[0]
        return Steps(prepare, lambda answer: np.array(answer.outputs[name]))
