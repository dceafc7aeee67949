"""Makes a bundle a model that mteb evaluates, with the prompts that mteb would choose for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bertile.base.errors import require
from bertile.integrations import bundles

_encoder, _meta = require("mteb", "mteb.models.abs_encoder", "mteb.models.model_meta")


class Encoder(_encoder.AbsEncoder):
    """An encoder of mteb's protocol, for `mteb.evaluate`.

    Raises as `bundles.embedder`.
    """

    def __init__(
        self,
        bundle: bundles.Bundle,
        revision: str | None = None,
        threads: int | None = None,
        **_options: Any,
    ) -> None:
        self.model = bundles.embedder(bundle, threads)
        # what is for no task of mteb's is left out, as mteb does of sentence-transformers' models
        self.model_prompts, _ = self.validate_task_to_prompt_name(
            self.model.prompts, raise_for_invalid_keys=False
        )
        directory = Path(bundles.name_of(bundle))
        self.mteb_model_meta = _meta.ModelMeta.create_empty(
            {
                "name": f"bertile/{directory.name}",
                "revision": revision or self.model.model.manifest["model"].get("sha256"),
                "max_tokens": self.model.max_seq_length,
                "embed_dim": self.model.get_sentence_embedding_dimension(),
                "similarity_fn_name": _meta.ScoringFunction(self.model.similarity_fn_name),
            }
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **options: Any,
    ) -> Any:
        """Vectors (n, d) float32 of the texts in batches of {"text": […]}.

        The prompt is that for the task, its type or the kind of text, else the model's own.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        name = self.get_prompt_name(task_metadata, prompt_type)
        prompt = self.model_prompts.get(name) if name else None
        kind = getattr(prompt_type, "value", None)
        encode = {
            "query": self.model.encode_query,
            "document": self.model.encode_document,
        }.get(kind, self.model.encode)
        kept = {key: options[key] for key in _OPTIONS if key in options}
        return encode(texts, prompt=prompt, **kept)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """How alike n vectors are to m, as the model compares them: a tensor (n, m) float32."""
        return _tensor(self.model.similarity(embeddings1, embeddings2))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """How alike vectors are, pair by pair: a tensor (n,) float32."""
        return _tensor(self.model.similarity_pairwise(embeddings1, embeddings2))


def _tensor(array: np.ndarray) -> Any:
    import torch  # which mteb brings

    return torch.from_numpy(array)


# Of what mteb hands on to `encode` of sentence-transformers.
_OPTIONS = ("batch_size", "show_progress_bar", "precision", "normalize_embeddings", "truncate_dim")
