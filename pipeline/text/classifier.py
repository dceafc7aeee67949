"""Scores texts and pairs: labels of a classifier, a reranker's scores, labels without training.

`predict` and `rank` are those of sentence-transformers' CrossEncoder; `classify` and `zero_shot`
are transformers' pipelines "text-classification" and "zero-shot-classification".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from bertile.base.errors import UsageError, nearest
from bertile.text import scores
from bertile.text.text_model import Steps, TextModel, also_named, checked, is_pair, is_single
from bertile.text.tokens import FIRST

TEXTS = "a str or a pair of them"
TEMPLATE = "This example is {}."
Activation = str | Callable[[np.ndarray], np.ndarray] | None


class Classifier(TextModel):
    """Labels with scores for texts and for pairs of texts."""

    @also_named(sentences="inputs")
    def predict(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Activation = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        *,
        truncate: bool = True,
    ) -> Any:
        """The scores of texts or pairs: (n,) float32 of a model with a single label, else (n, k).

        A text or a pair by itself gives its score; two texts in a list are a pair, as there. A
        prompt is put in front of a text, and of the first of a pair. `activation_fn` is "sigmoid",
        "softmax", "none" or a function of (n, k); by default what the directory says, else the
        sigmoid of a single label and the logits of several. `convert_to_tensor` gives a torch
        tensor, `convert_to_numpy` False a list. `batch_size` is taken and not used: texts run
        together by their tokens. Raises UsageError for an unknown function or prompt, and for what
        is no text.
        """
        inputs = inputs.tolist() if isinstance(inputs, np.ndarray) else inputs
        single = _is_text(inputs)
        texts = checked([inputs] if single else inputs, _is_text, TEXTS)
        steps = self.steps(prompt_name, prompt, truncate=truncate)
        answers = self._answers(
            list(texts), steps.prepare, show_progress_bar=show_progress_bar, what="predict"
        )
        logits = [steps.finish(answer) for answer in answers]
        rows = np.empty(0, np.float32)
        if logits:
            rows = self._activation(activation_fn)(np.stack(logits))
            if apply_softmax and rows.shape[1] > 1:
                rows = scores.softmax(rows)
            rows = rows[:, 0] if rows.shape[1] == 1 else rows
        if convert_to_tensor:
            import torch  # which only who asks for tensors needs

            rows = torch.from_numpy(rows)
        elif not convert_to_numpy:
            rows = list(rows)
        return rows[0] if single else rows

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Activation = None,
        *,
        truncate: bool = True,
    ) -> list[dict[str, Any]]:
        """The documents by how well they answer the query, the best first.

        Each is {"corpus_id", "score"}, with "text" where documents are asked for. Arguments as of
        `predict`. Raises UsageError for a model of several labels.
        """
        if len(self._outputs()) != 1:
            raise UsageError(
                f"rank needs a model with a single label, this has {len(self._outputs())}",
                "use predict or classify",
            )
        documents = list(documents)
        pairs = [(query, document) for document in documents]
        values = self.predict(
            pairs,
            prompt_name,
            prompt,
            show_progress_bar=show_progress_bar,
            activation_fn=activation_fn,
            truncate=truncate,
        )
        results = []
        for index in np.argsort(-values, kind="stable")[:top_k].tolist():
            results.append({"corpus_id": index, "score": float(values[index])})
            if return_documents:
                results[-1]["text"] = documents[index]
        return results

    def classify(
        self,
        texts: Any,
        top_k: int | None = 0,
        function_to_apply: str | None = None,
        *,
        show_progress_bar: bool | None = None,
        truncate: bool = True,
    ) -> list[Any]:
        """The best label and its score, {"label", "score"}, of each text.

        A text is a str, a pair of them or {"text", "text_pair"}. Without `top_k`, several texts
        give a list of as many; so does a str, as there, but a pair by itself gives its label alone.
        With it, each text gives a list of its best labels; None gives all. `function_to_apply` is
        "softmax", "sigmoid" or "none"; by default what suits the model's problem. Raises UsageError
        for an unknown function, and for what is no text.
        """
        single = isinstance(texts, (str, tuple, dict))
        results = list(
            self.classify_iter(
                [texts] if single else texts,
                top_k,
                function_to_apply,
                show_progress_bar=show_progress_bar,
                truncate=truncate,
            )
        )
        listed = not single or (top_k == 0 and isinstance(texts, str))
        return results if listed else results[0]

    def classify_iter(
        self,
        texts: Iterable[Any],
        top_k: int | None = 0,
        function_to_apply: str | None = None,
        *,
        show_progress_bar: bool | None = None,
        truncate: bool = True,
    ) -> Iterator[Any]:
        """As `classify` of several texts, as they come."""
        function = self._function(function_to_apply or self.settings.scores)
        texts = checked(texts, _is_item, f'{TEXTS} or {{"text", "text_pair"}}')
        several = isinstance(texts, Sequence)
        pairs = (_pair_of(text) for text in texts)
        answers = self._answers(
            list(pairs) if several else pairs,  # of which the number is known
            self.preparer(prompted=False, truncate=truncate),
            show_progress_bar=show_progress_bar,
            what="classify",
        )
        every = (self._ranked(function(answer.outputs["logits"])) for answer in answers)
        return (ranked[0] if top_k == 0 else ranked[:top_k] for ranked in every)

    def zero_shot(
        self,
        sequences: str | Sequence[str],
        candidate_labels: str | Sequence[str],
        hypothesis_template: str = TEMPLATE,
        multi_label: bool = False,
    ) -> Any:
        """Which of the labels fits a text best, by a model trained on entailment.

        Gives {"sequence", "labels", "scores"}, the best label first, for a text, a list for
        several. Scores sum to 1, unless `multi_label`, where each label is for itself. Raises
        UsageError for a model without a label that begins with "entail".
        """
        single = isinstance(sequences, str)
        texts = [sequences] if single else sequences
        results = list(
            self.zero_shot_iter(texts, candidate_labels, hypothesis_template, multi_label)
        )
        return results[0] if single else results

    def zero_shot_iter(
        self,
        sequences: Iterable[str],
        candidate_labels: str | Sequence[str],
        hypothesis_template: str = TEMPLATE,
        multi_label: bool = False,
        *,
        show_progress_bar: bool | None = None,
    ) -> Iterator[dict[str, Any]]:
        """As `zero_shot` of several texts, as they come."""
        entailment = self._entailment()
        if isinstance(candidate_labels, str):
            candidate_labels = candidate_labels.split(",")
        names = [label.strip() for label in candidate_labels if label.strip()]
        if not names or hypothesis_template.format(names[0]) == hypothesis_template:
            raise UsageError(
                "zero_shot needs labels, and a template with {} where a label goes",
                'give candidate_labels=["…"] and a hypothesis_template such as "It is about {}."',
            )
        texts = checked(sequences, is_single, "a str")
        asked: deque[str] = deque()  # texts whose pairs were taken

        def pairs() -> Iterator[tuple[str, str]]:
            for text in texts:
                asked.append(text)
                yield from ((text, hypothesis_template.format(name)) for name in names)

        # a hypothesis says the label at its end: it stays whole
        answers = self._answers(
            pairs(),
            self.preparer(prompted=False, cut=FIRST),
            show_progress_bar=show_progress_bar,
            what="zero-shot",
        )
        alone = multi_label or len(names) == 1

        def results() -> Iterator[dict[str, Any]]:
            while rows := [answer.outputs["logits"] for answer in islice(answers, len(names))]:
                logits = np.stack(rows)
                if alone:
                    contradiction = -1 if entailment == 0 else 0
                    values = scores.softmax(logits[:, [contradiction, entailment]])[:, 1]
                else:
                    values = scores.softmax(logits[:, entailment])
                order = np.argsort(values)[::-1]
                yield {
                    "sequence": asked.popleft(),
                    "labels": [names[i] for i in order],
                    "scores": values[order].tolist(),
                }

        return results()

    def steps(
        self,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        function: str = "none",
        truncate: bool = True,
        side: str | None = None,
    ) -> Steps:
        """What `predict` does before the model and behind it: texts or pairs, and scores (labels,).

        `function` makes those of logits: "sigmoid", "softmax" or "none"; UsageError for another.
        Other arguments as of `preparer`.
        """
        scored = self._function(function)
        prepare = self.preparer(prompt_name, prompt, truncate=truncate, side=side)
        return Steps(prepare, lambda answer: scored(np.array(answer.outputs["logits"])))

    def _outputs(self) -> range:
        return range(self.model.manifest["outputs"][0]["axes"][-1])

    def _ranked(self, values: np.ndarray) -> list[dict[str, Any]]:
        """All labels with their scores (labels,), the best first."""
        order = np.argsort(-values, kind="stable")
        return [{"label": self.label(int(i)), "score": float(values[i])} for i in order]

    def _activation(self, asked: Activation) -> Callable[[np.ndarray], np.ndarray]:
        """What CrossEncoder applies."""
        if type(asked).__module__.startswith("torch."):
            import torch  # which is imported already, with its function

            return lambda rows: asked(torch.from_numpy(rows)).numpy()
        if callable(asked):
            return asked
        return self._function(asked or self.settings.activation)

    def _function(self, name: str) -> Callable[[np.ndarray], np.ndarray]:
        name = {"identity": "none"}.get(name.lower(), name.lower())
        if name not in scores.FUNCTIONS:
            raise UsageError(f"function '{name}' is unknown{nearest(name, scores.FUNCTIONS)}")
        return scores.FUNCTIONS[name]

    def _entailment(self) -> int:
        for index, label in enumerate(self.labels):
            if label.lower().startswith("entail"):
                return index
        raise UsageError(
            f"the labels {', '.join(self.labels)} have no 'entailment'",
            "zero_shot needs a model that was trained on natural language inference",
        )


def _is_text(text: Any) -> bool:
    return is_single(text) or is_pair(text)


def _is_item(item: Any) -> bool:
    return _is_text(_pair_of(item))


def _pair_of(item: Any) -> Any:
    if isinstance(item, dict) and set(item) <= {"text", "text_pair"} and "text" in item:
        pair = item.get("text_pair")
        return item["text"] if pair is None else (item["text"], pair)
    return tuple(item) if isinstance(item, list) else item
