"""Makes vectors of texts, as sentence-transformers does with the model's directory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from bertile.base.errors import UsageError, nearest
from bertile.text import similarities
from bertile.text.engine import Answer
from bertile.text.sparse_vectors import SparseVector
from bertile.text.text_model import TextModel, checked, is_single

Vector = np.ndarray | SparseVector
PRECISIONS = ("float32", "binary", "ubinary")
# The names of prompts that are for a task, in the order in which sentence-transformers looks.
_TASKS = {"query": ("query",), "document": ("document", "passage", "corpus")}


class Embedder(TextModel):
    """Vectors of texts: dense (d,), sparse, or one for each token (tokens, d), by `settings.kind`.

    Names and arguments are those of sentence-transformers' SentenceTransformer.
    """

    @property
    def prompts(self) -> dict[str, str]:
        """What can be put in front of a text, by name."""
        return dict(self.settings.prompts)

    @property
    def default_prompt_name(self) -> str | None:
        """The prompt that every text has where no other is asked for."""
        return self.settings.default_prompt

    @property
    def similarity_fn_name(self) -> str:
        """What `similarity` computes: cosine, dot, euclidean or manhattan."""
        return self.settings.similarity

    def get_sentence_embedding_dimension(self) -> int:
        """How many numbers a vector has, after `truncate_dim` of the directory."""
        size = self.model.manifest["outputs"][0]["axes"][-1]
        return min(size, self.settings.dimensions or size)

    get_embedding_dimension = get_sentence_embedding_dimension

    def encode(
        self,
        sentences: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        *,
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        truncate: bool = True,
    ) -> Any:
        """The vector (d,) float32 of a text, or those (n, d) of several, in their order.

        `precision` "binary" and "ubinary" give a bit a number, packed; `convert_to_tensor` a torch
        tensor; `convert_to_numpy` False a list. Sparse vectors and those of tokens come as a list.
        `batch_size` is taken and not used: texts run together by their tokens. A text that is too
        long is cut as the directory says and counted in `truncated`; `truncate` False refuses it
        with InputError. Raises UsageError for an unknown prompt or precision, and for what is no
        text.
        """
        if precision not in PRECISIONS:
            raise UsageError(f"precision '{precision}' is unknown{nearest(precision, PRECISIONS)}")
        finish = self._finisher(normalize_embeddings, truncate_dim)
        if isinstance(sentences, str):
            text = self._prompt(prompt_name, prompt) + sentences
            vector = finish(self._answer(text, truncate=truncate))
            return _converted([vector], precision, convert_to_numpy, convert_to_tensor, True)
        vectors = list(
            self.encode_iter(
                sentences,
                prompt_name,
                prompt,
                show_progress_bar,
                normalize_embeddings=normalize_embeddings,
                truncate_dim=truncate_dim,
                truncate=truncate,
            )
        )
        if not vectors and self.settings.kind == "dense":
            width = truncate_dim or self.get_sentence_embedding_dimension()
            vectors = np.empty((0, width), np.float32)
        return _converted(vectors, precision, convert_to_numpy, convert_to_tensor, False)

    def encode_query(self, sentences: str | Iterable[str], **options: Any) -> Any:
        """As `encode`, with the prompt "query" where the directory has it."""
        return self.encode(sentences, **self._task_prompt(options, "query"))

    def encode_document(self, sentences: str | Iterable[str], **options: Any) -> Any:
        """As `encode`, with the prompt "document" (or "passage", "corpus") where there is one."""
        return self.encode(sentences, **self._task_prompt(options, "document"))

    def encode_iter(
        self,
        sentences: Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        show_progress_bar: bool | None = None,
        *,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        truncate: bool = True,
    ) -> Iterator[Vector]:
        """The vectors of any number of texts as they come, in the order of the texts.

        What it holds does not grow with their number. Arguments as of `encode`.
        """
        finish = self._finisher(normalize_embeddings, truncate_dim)
        texts = checked(sentences, is_single, "a str")
        if before := self._prompt(prompt_name, prompt):
            texts = (
                [before + text for text in texts]
                if isinstance(texts, (list, tuple))
                else (before + text for text in texts)
            )
        answers = self._answers(
            texts, truncate=truncate, show_progress_bar=show_progress_bar, what="encode"
        )
        return (finish(answer) for answer in answers)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """How alike each of n vectors is to each of m: (n, m) float32."""
        return similarities.between_all(self.similarity_fn_name, embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """How alike vectors are, pair by pair: (n,) float32."""
        return similarities.between_pairs(self.similarity_fn_name, embeddings1, embeddings2)

    def decode(self, vector: SparseVector, top_k: int | None = None) -> list[tuple[str, float]]:
        """The tokens of a sparse vector with their weights, the heaviest first."""
        order = np.argsort(-vector.values, kind="stable")[:top_k]
        names = self.tokenizer.id_to_token
        return [(names(int(vector.indices[i])), float(vector.values[i])) for i in order]

    def prompt_name_of(self, task: str) -> str | None:
        """The prompt that the directory has for a task, "query" or "document"; None for none."""
        return next((name for name in _TASKS[task] if name in self.settings.prompts), None)

    def _task_prompt(self, options: dict[str, Any], task: str) -> dict[str, Any]:
        if options.get("prompt") is None and options.get("prompt_name") is None:
            options = {**options, "prompt_name": self.prompt_name_of(task)}
        return options

    def _prompt(self, name: str | None, prompt: str | None) -> str:
        if prompt is not None:
            return prompt
        if name is None:
            return self.settings.prompt
        if name not in self.settings.prompts:
            raise UsageError(f"prompt '{name}' is unknown{nearest(name, self.settings.prompts)}")
        return self.settings.prompts[name]

    def _finisher(self, normalize: bool, truncate_dim: int | None):
        """What makes the vector of an answer."""
        kind, most = self.settings.kind, truncate_dim or self.settings.dimensions
        name = self.model.outputs[0]

        def finish(answer: Answer) -> Vector:
            vector = answer.outputs[name]
            if kind == "sparse":
                return SparseVector.of(vector, most)
            if most is not None:
                vector = vector[..., :most]
            if normalize:
                norm = np.linalg.norm(vector, axis=-1, keepdims=True)
                vector = vector / np.maximum(norm, 1e-12)
            return vector

        return finish


def _converted(vectors: Any, precision: str, to_numpy: bool, to_tensor: bool, single: bool) -> Any:
    """Vectors in the form that a caller asks for; the only of them where it is a `single`."""
    if precision != "float32":
        vectors = [np.packbits(vector > 0, axis=-1) for vector in vectors]
        if precision == "binary":
            vectors = [(vector.astype(np.int16) - 128).astype(np.int8) for vector in vectors]
    stacks = all(isinstance(vector, np.ndarray) and vector.ndim == 1 for vector in vectors)
    if to_tensor:
        import torch  # which only who asks for tensors needs

        vectors = [torch.from_numpy(np.array(vector)) for vector in vectors] if stacks else vectors
        if single:
            return vectors[0]
        return torch.stack(vectors) if stacks and vectors else vectors
    if single:
        return np.array(vectors[0]) if stacks else vectors[0]
    return np.stack(vectors) if to_numpy and stacks and len(vectors) else vectors
