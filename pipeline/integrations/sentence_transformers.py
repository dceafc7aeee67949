"""Puts bundles into sentence-transformers, as the first module of its models.

`SentenceTransformer(modules=[BertileTransformer(DIR)])` encodes as the model that was compiled, and
so do CrossEncoder and SparseEncoder. What `save` writes holds the bundle.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import InputModule, Transformer
from sentence_transformers.util import import_from_string
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bertile.base.errors import UsageError
from bertile.families import model_config, text_settings
from bertile.integrations.bundle_copy import copy_bundle
from bertile.integrations.transformers import CLASSES
from bertile.loader import read_manifest
from bertile.text.tokens import FIELDS, TextTokenizer, max_tokens

# What a head's output is called among the features that modules hand on.
FEATURES = {
    "embedding": "sentence_embedding",
    "encoder": "token_embeddings",
    "masked-lm": "token_embeddings",  # as a pooling of SPLADE takes logits
    "sequence-classification": "scores",
}
# Dotted names of what settings call the function of a cross-encoder's scores.
_ACTIVATIONS = {
    "none": "torch.nn.Identity",
    "sigmoid": "torch.nn.Sigmoid",
    "softmax": "torch.nn.Softmax",
}


# CrossEncoder asks only a Transformer, and such it is in all that is asked, for its labels.
@Transformer.register
class BertileTransformer(InputModule):
    """Texts to the outputs of a bundle: vectors of sentences or of tokens, logits, or scores.

    A bundle of the head `embedding` pools by itself; `encoder` and `masked-lm` are followed by
    pooling modules, `sequence-classification` is a CrossEncoder's only module.
    """

    save_in_root = False  # where the library writes files that a bundle has too
    can_flatten_inputs = False  # padding is never computed

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        threads: int | None = None,
        streams: int | None = None,
        verify: bool = True,
    ) -> None:
        """Load the bundle in `directory`; `threads`, `streams` and `verify` as of `bertile.load`.

        Raises what that raises, BundleError for a bundle without a tokenizer, and UsageError for
        one whose head sentence-transformers has no use for.
        """
        super().__init__()
        directory = Path(directory)
        manifest = read_manifest(directory)
        head = manifest["model"]["head"]
        if head not in FEATURES:
            raise UsageError(
                f"sentence-transformers has no use for the head {head} of {directory}",
                f"compile the model with a --head of {', '.join(FEATURES)}",
            )
        self.settings = text_settings.of_bundle(directory, manifest)
        self._tokens = TextTokenizer(directory, self.settings, max_tokens(manifest))
        self.model = CLASSES[head].from_pretrained(
            directory, threads=threads, streams=streams, verify=verify
        )
        by_token = "length" in manifest["outputs"][0]["axes"]
        self._feature = "token_embeddings" if by_token else FEATURES[head]
        self._tokenizer: Any = None
        self._settles = True  # what its model says of texts

    @property
    def tokenizer(self) -> Any:
        """The bundle's tokenizer, for who wants to look: `preprocess` uses its own."""
        if self._tokenizer is None:
            directory = self.model.bundle.directory
            described = (directory / model_config.NAME).is_file()  # not of every ONNX file
            kind = AutoTokenizer if described else PreTrainedTokenizerFast
            self._tokenizer = kind.from_pretrained(directory)
            if self.max_seq_length is not None:
                self._tokenizer.model_max_length = self.max_seq_length
        return self._tokenizer

    @property
    def max_seq_length(self) -> int | None:
        """To how many tokens texts are cut; None for no limit. May be set, up to the model's."""
        return self._tokens.cut_at

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        most = self._tokens.longest
        if value is not None and (value < 1 or (most and value > most)):
            raise UsageError(f"max_seq_length is {value}", f"give a number from 1 to {most}")
        self._tokens.cut_at = value or most

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        processing_kwargs: Any = None,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Tensors (batch, length) of texts or pairs of texts, int64, padded to the longest.

        `prompt` is put in front of a text, and of the first of a pair. Raises UsageError for what
        is no text, and for options of other kinds of models.
        """
        if processing_kwargs:
            raise UsageError("a bundle does not take processing_kwargs", "set max_seq_length")
        if prompt and not self.settings.include_prompt and self._feature == "sentence_embedding":
            raise UsageError(
                "the model leaves its prompts out of the pooling, which a bundle cannot",
                "compile it with --head encoder, and add the model's own pooling",
            )
        texts = [_text(text, prompt or "") for text in inputs]
        encodings = self._encode(texts, max_length)
        shape = len(encodings), max(map(len, encodings), default=0)
        fill = {"input_ids": self.settings.padding_id}
        names = [name for name in FIELDS if name in ("attention_mask", *self.model.bundle.inputs)]
        features: dict[str, Any] = {}
        for name in names:
            rows = torch.full(shape, fill.get(name, 0), dtype=torch.int64)
            for row, encoding in enumerate(encodings):
                rows[row, : len(encoding)] = torch.tensor(getattr(encoding, FIELDS[name]))
            features[name] = rows
        features["modality"] = "text"
        if prompt:
            features["prompt_length"] = self._prompt_length(prompt)
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """The features with the bundle's output: `sentence_embedding` (batch, size), `scores`
        (batch, labels) or `token_embeddings` (batch, length, size), float32.
        """
        outputs = self.model(**{name: features[name] for name in FIELDS if name in features})
        features[self._feature] = outputs[0]
        return features

    def get_embedding_dimension(self) -> int:
        """How many numbers a vector has."""
        return self.model.bundle.manifest["outputs"][0]["axes"][-1]

    def get_config_dict(self) -> dict[str, Any]:
        """What tells this module from others."""
        model = self.model.bundle.manifest["model"]
        return {key: model.get(key) for key in ("source", "family", "head", "max_length")}

    def on_model_ready(self, model: Any) -> None:
        """Give the model what the compiled one's directory says of texts, where nobody said it.

        Not to a model that was saved and is loaded again, which has it from its own files.
        """
        if not self._settles:
            return
        if isinstance(model, CrossEncoder):
            if model.activation_fn is None:
                model.activation_fn = import_from_string(_ACTIVATIONS[self.settings.activation])()
            return
        for name, text in self.settings.prompts.items():
            model.prompts[name] = model.prompts.get(name) or text
        model.default_prompt_name = model.default_prompt_name or self.settings.default_prompt
        self._settle_vectors(model)

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Copy the bundle to `output_path`."""
        copy_bundle(self.model.bundle, output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BertileTransformer:
        """Load what `save` wrote; `model_kwargs` may have `threads`, `streams` and `verify`."""
        directory = cls.load_dir_path(
            model_name_or_path,
            subfolder=subfolder,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        if directory is None:
            raise UsageError(f"{model_name_or_path} has no folder {subfolder}", "save it again")
        module = cls(directory, **(model_kwargs or {}))
        module._settles = False
        return module

    def _encode(self, texts: Sequence[Any], length: int | None) -> list[Any]:
        most = self.max_seq_length
        if length is None or (most and length >= most):
            return self._tokens.encode(texts)
        return self._tokens.cutting(length, "longest_first").encode_batch(texts)

    def _prompt_length(self, prompt: str) -> int:
        """How many tokens a prompt has, with the special ones before it, not those behind it."""
        (encoding,) = self._tokens.encode([prompt])
        return len(encoding) - encoding.special_tokens_mask[-1]

    def _settle_vectors(self, model: Any) -> None:
        """How vectors are compared, and how many of their numbers are kept."""
        similarity, dimensions = self.settings.similarity, self.settings.dimensions
        # "cosine" is also what is read where a directory says nothing, and no sparse model means
        said = self.model.head == "embedding" or similarity != "cosine"
        known = similarity in getattr(model, "SUPPORTED_SIMILARITY_FN_NAMES", ())
        # its property would choose the default
        if said and known and model._similarity_fn_name is None:
            model.similarity_fn_name = similarity
        kept = "max_active_dims" if self.settings.kind == "sparse" else "truncate_dim"
        if hasattr(model, kept) and getattr(model, kept) is None:
            setattr(model, kept, dimensions)


def _text(text: Any, prompt: str) -> str | tuple[str, str]:
    """A text or a pair of them, with the prompt; UsageError for anything else."""
    if isinstance(text, str):
        return prompt + text
    pair = isinstance(text, (tuple, list)) and len(text) == 2
    if pair and all(isinstance(part, str) for part in text):
        return prompt + text[0], text[1]
    raise UsageError(f"{type(text).__name__} is no text", "give a str or a pair of them")
