"""Makes vectors of texts, as sentence-transformers does with the model's directory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from bertile.base.errors import UsageError, nearest
from bertile.families.text_settings import WEIGHTS
from bertile.text import similarities
from bertile.text.engine import Answer
from bertile.text.sparse_vectors import SparseVector
from bertile.text.text_model import Steps, TextModel, also_named, checked, is_single

Vector = np.ndarray | SparseVector
PRECISIONS = ("float32", "binary", "ubinary")
VALUE = "sentence_embedding"
DENSE, SPARSE = "dense", "sparse"  # of text_settings.KINDS


class Embedder(TextModel):
    """Vectors of texts: dense (d,), sparse, or one for each token (tokens, d), by `settings.kind`.

    Names and arguments are those of sentence-transformers' SentenceTransformer.
    """

    @property
    def similarity_fn_name(self) -> str:
        """What `similarity` computes: cosine, dot, euclidean or manhattan."""
        return self.settings.similarity

    def get_sentence_embedding_dimension(self) -> int:
        """How many numbers a vector has, after `truncate_dim` of the directory."""
        return min(self._width(), self.settings.dimensions or self._width())

    get_embedding_dimension = get_sentence_embedding_dimension

    @also_named(sentences="inputs")
    def encode(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: str = VALUE,
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        *,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        truncate: bool = True,
    ) -> Any:
        """The vector (d,) float32 of a text, or those (n, d) of several, in their order.

        `precision` "binary" and "ubinary" give a bit a number, packed; `convert_to_tensor` a torch
        tensor; `convert_to_numpy` False a list. Sparse vectors and those of tokens come as a list.
        `batch_size` is taken and not used: texts run together by their tokens. A text that is too
        long is cut as the directory says and counted in `truncated`; `truncate` False refuses it
        with InputError. A model that gives more than a vector (BGE-M3) gives by `output_value`
        "token_embeddings" a vector for each token but the first, and by "token_weights" a sparse
        vector of its ids. Raises UsageError for an unknown prompt, precision or `output_value`, and
        for what is no text.
        """
        kind = self._kind(output_value)
        if precision not in PRECISIONS or (precision != "float32" and kind == SPARSE):
            raise UsageError(f"precision '{precision}' is unknown{nearest(precision, PRECISIONS)}")
        if isinstance(inputs, str):
            steps = self.steps(
                prompt_name,
                prompt,
                normalize_embeddings=normalize_embeddings,
                truncate_dim=truncate_dim,
                truncate=truncate,
                output_value=output_value,
            )
            vector = steps.finish(self._answer(inputs, steps.prepare))
            return self._formed(vector, kind, precision, convert_to_tensor)
        vectors = list(
            self.encode_iter(
                inputs,
                prompt_name,
                prompt,
                show_progress_bar,
                normalize_embeddings=normalize_embeddings,
                truncate_dim=truncate_dim,
                truncate=truncate,
                output_value=output_value,
            )
        )
        if kind != DENSE:
            return [self._formed(vector, kind, precision, convert_to_tensor) for vector in vectors]
        kept = truncate_dim or self.settings.dimensions
        none = np.empty((0, self._width()), np.float32)[:, :kept]
        rows = np.stack(vectors) if vectors else none
        results = self._formed(rows, kind, precision, convert_to_tensor)
        return results if convert_to_numpy or convert_to_tensor else list(results)

    @also_named(sentences="inputs")
    def encode_query(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """As `encode`, with the prompt "query", where no other is asked for; not the default."""
        return self.encode(inputs, *_for("query", prompt_name, prompt), *arguments, **options)

    @also_named(sentences="inputs")
    def encode_document(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """As `encode`, with the prompt "document", where no other is asked for; not the default."""
        return self.encode(inputs, *_for("document", prompt_name, prompt), *arguments, **options)

    @also_named(sentences="inputs")
    def encode_iter(
        self,
        inputs: Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        show_progress_bar: bool | None = None,
        *,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        truncate: bool = True,
        output_value: str = VALUE,
    ) -> Iterator[Vector]:
        """The vectors of any number of texts as they come, in the order of the texts.

        What it holds does not grow with their number. Arguments as of `encode`.
        """
        steps = self.steps(
            prompt_name,
            prompt,
            normalize_embeddings=normalize_embeddings,
            truncate_dim=truncate_dim,
            truncate=truncate,
            output_value=output_value,
        )
        texts = checked(inputs, is_single, "a str")
        answers = self._answers(
            texts, steps.prepare, show_progress_bar=show_progress_bar, what="encode"
        )
        return (steps.finish(answer) for answer in answers)

    def steps(
        self,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        truncate: bool = True,
        side: str | None = None,
        output_value: str = VALUE,
    ) -> Steps:
        """What `encode` does before the model and behind it: texts or lists of ids, and vectors.

        Arguments as of `encode` and of `preparer`.
        """
        return Steps(
            self.preparer(prompt_name, prompt, truncate=truncate, side=side),
            self._finisher(normalize_embeddings, truncate_dim, output_value),
        )

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

    def _width(self) -> int:
        return self.model.manifest["outputs"][0]["axes"][-1]

    def _formed(self, vectors: Vector, kind: str, precision: str, as_tensor: bool) -> Any:
        """Vectors as they were asked for; sparse ones stay as they are."""
        if kind == SPARSE:
            return vectors
        return _tensor(_packed(vectors, precision), as_tensor)

    def _kind(self, output_value: str) -> str:
        """What kind of vectors an `output_value` is; UsageError for one that there is not."""
        if output_value == VALUE:
            return self.settings.kind
        if output_value in self.model.outputs[1:]:
            return SPARSE if output_value == WEIGHTS else "tokens"
        known = [VALUE, *self.model.outputs[1:]]
        raise UsageError(
            f"output_value '{output_value}' is unknown{nearest(str(output_value), known)}",
            "compile the model with --head encoder for the vectors of tokens",
        )

    def _finisher(self, normalize: bool, truncate_dim: int | None, output_value: str):
        """What makes the vector of an answer."""
        kind, most = self._kind(output_value), truncate_dim or self.settings.dimensions
        name = self.model.outputs[0] if output_value == VALUE else output_value

        def finish(answer: Answer) -> Vector:
            vector = answer.outputs[name]
            if name == WEIGHTS:
                return self._weighed(answer.encoding.ids, vector, truncate_dim)
            if name != self.model.outputs[0]:
                vector = vector[1:]  # the first token stands for the whole text
            if kind == SPARSE:
                return SparseVector.of(vector, most)
            if most is not None:
                vector = vector[..., :most]
            if normalize:
                norm = np.linalg.norm(vector, axis=-1, keepdims=True)
                vector = vector / np.maximum(norm, 1e-12)
            return vector

        return finish

    def _weighed(self, ids: list[int], weights: np.ndarray, most: int | None) -> SparseVector:
        """The largest weight of each id of a text, but of special tokens."""
        added = self.tokenizer.get_added_tokens_decoder()
        vector = np.zeros(self.model.manifest["inputs"][0]["below"], np.float32)
        np.maximum.at(vector, ids, weights)
        vector[[number for number, token in added.items() if token.special]] = 0
        return SparseVector.of(vector, most)


def _for(task: str, name: str | None, prompt: str | None) -> tuple[str | None, str | None]:
    """The name and the text of a prompt that are asked for, or else the name of the task's."""
    return (task, None) if name is None and prompt is None else (name, prompt)


def _packed(vectors: np.ndarray, precision: str) -> np.ndarray:
    """Vectors (…, d) as they are, or a bit a number, whether it is above zero: (…, d / 8)."""
    if precision == "float32":
        return vectors
    bits = np.packbits(vectors > 0, axis=-1)
    return bits if precision == "ubinary" else (bits ^ 0x80).view(np.int8)  # less 128


def _tensor(array: np.ndarray, asked: bool) -> Any:
    if not asked:
        return array
    import torch  # which only who asks for tensors needs

    return torch.from_numpy(array)
