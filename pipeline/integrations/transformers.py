"""Puts bundles into transformers' pipelines, in the place of the models that they were made of.

`BertileModelForSequenceClassification.from_pretrained(DIR)` and its siblings are PreTrainedModels:
torch tensors in, the same ModelOutput as the original's out, computed by the bundle.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from bertile import loader
from bertile.base.errors import UsageError
from bertile.families import model_config
from bertile.integrations.bundle_copy import copy_bundle
from bertile.loader import MANIFEST, Model

SUBFOLDER = "bertile"  # of what save_pretrained writes; a tokenizer may be saved beside it


class BertileConfig(PreTrainedConfig):
    """By what transformers' pipelines know that they can take the classes here.

    A model's own `config` is that of the model which was compiled.
    """

    model_type = "bertile"


class BertileModel(PreTrainedModel):
    """A bundle as a transformers model, on the CPU and without gradients.

    `bundle` is the loaded `bertile.Model`, `config` the original's. Use the class for your head.
    """

    config_class = BertileConfig
    base_model_prefix = "bertile"
    head: ClassVar[str]
    answer: ClassVar[type[ModelOutput]]
    names: ClassVar[tuple[str, ...]]  # what `answer` calls the first outputs

    def __init__(self, config: PreTrainedConfig, bundle: Model) -> None:
        super().__init__(config)
        self.bundle = bundle
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: PreTrainedConfig | None = None,
        threads: int | None = None,
        streams: int | None = None,
        verify: bool = True,
        **others: Any,
    ) -> BertileModel:
        """Load a bundle's directory, or what `save_pretrained` wrote.

        `threads`, `streams` and `verify` are those of `bertile.load`. Raises what that raises, and
        UsageError for a bundle of another head and for options that a compiled model cannot follow.
        """
        if others:
            raise UsageError(
                f"a bundle does not take {', '.join(sorted(others))}",
                "its precision and target are chosen by bertile compile",
            )
        bundle = loader.load(
            _directory(pretrained_model_name_or_path), threads, streams=streams, verify=verify
        )
        try:
            _must_have_head(cls, bundle)
            return cls(config or _config(bundle), bundle)
        except BaseException:
            bundle.close()
            raise

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> ModelOutput | tuple[torch.Tensor, ...]:
        """The outputs for integers (batch, length), float32, on the device of `input_ids`.

        Behind the last token of a sequence, outputs by token are zero. Raises InputError for wrong
        ids, UsageError for what only the original computes: losses, hidden states, attentions.
        """
        asked = sorted(name for name, value in others.items() if value not in (None, False))
        if asked:
            raise UsageError(
                f"a bundle does not take {', '.join(asked)}", "call the original model for that"
            )
        tensors = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        arrays = {name: _array(tensor) for name, tensor in tensors.items() if tensor is not None}
        outputs = self.bundle(**arrays)
        names = (*self.names, *self.bundle.outputs[len(self.names) :])
        known = {field.name for field in dataclasses.fields(self.answer)}
        answer = self.answer(
            **{
                name: torch.from_numpy(array).to(input_ids.device)
                for name, array in zip(names, outputs.values())
                if name in known
            }
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return answer if as_dict else answer.to_tuple()

    @property
    def device(self) -> torch.device:
        """Where tensors are made: always the CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the outputs, whatever precision the bundle was compiled with."""
        return torch.float32

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write config.json, and the bundle into the folder `bertile`, for `from_pretrained`.

        Options of the original that say how its weights are written change nothing. Raises
        UsageError for `push_to_hub`, and for a folder that holds what is not Bertile's.
        """
        if options.get("push_to_hub"):
            raise UsageError(
                "a bundle is not pushed to a hub", "save it, and upload the directory yourself"
            )
        directory = Path(save_directory)
        copy_bundle(self.bundle, directory / SUBFOLDER)
        self.config.save_pretrained(directory)


class BertileModelForFeatureExtraction(BertileModel):
    """`last_hidden_state` (batch, length, hidden), and `pooler_output` where the model has it."""

    head, answer, names = "encoder", BaseModelOutputWithPooling, ("last_hidden_state",)


class BertileModelForSequenceClassification(BertileModel):
    """`logits` (batch, labels)."""

    head, answer, names = "sequence-classification", SequenceClassifierOutput, ("logits",)


class BertileModelForTokenClassification(BertileModel):
    """`logits` (batch, length, labels)."""

    head, answer, names = "token-classification", TokenClassifierOutput, ("logits",)


class BertileModelForQuestionAnswering(BertileModel):
    """`start_logits` and `end_logits` (batch, length)."""

    head, answer = "question-answering", QuestionAnsweringModelOutput
    names = ("start_logits", "end_logits")


class BertileModelForMaskedLM(BertileModel):
    """`logits` (batch, length, vocabulary)."""

    head, answer, names = "masked-lm", MaskedLMOutput, ("logits",)


@dataclasses.dataclass
class SentenceEmbeddingOutput(ModelOutput):
    """`sentence_embedding` (batch, size)."""

    sentence_embedding: torch.Tensor | None = None


class BertileModelForSentenceEmbedding(BertileModel):
    """`sentence_embedding` (batch, size), which transformers itself has no class for."""

    head, answer, names = "embedding", SentenceEmbeddingOutput, ("sentence_embedding",)


CLASSES: dict[str, type[BertileModel]] = {
    model_class.head: model_class
    for model_class in (
        BertileModelForFeatureExtraction,
        BertileModelForSequenceClassification,
        BertileModelForTokenClassification,
        BertileModelForQuestionAnswering,
        BertileModelForMaskedLM,
        BertileModelForSentenceEmbedding,
    )
}

# Pipelines log an error for a class that no auto class has registered.
for _auto_class, _model_class in (
    (AutoModel, BertileModelForFeatureExtraction),
    (AutoModelForSequenceClassification, BertileModelForSequenceClassification),
    (AutoModelForTokenClassification, BertileModelForTokenClassification),
    (AutoModelForQuestionAnswering, BertileModelForQuestionAnswering),
    (AutoModelForMaskedLM, BertileModelForMaskedLM),
):
    _auto_class.register(BertileConfig, _model_class)


def _directory(path: str | os.PathLike[str]) -> Path:
    """The bundle: the directory itself, or its folder that `save_pretrained` filled."""
    directory = Path(path)
    inner = directory / SUBFOLDER
    saved = not (directory / MANIFEST).exists() and (inner / MANIFEST).exists()
    return inner if saved else directory


def _must_have_head(model_class: type[BertileModel], bundle: Model) -> None:
    head = bundle.manifest["model"]["head"]
    if head == model_class.head:
        return
    fitting = CLASSES.get(head)
    remedy = f"use {fitting.__name__}, or" if fitting else ""
    raise UsageError(
        f"{model_class.__name__} needs the head {model_class.head}, the bundle has {head}",
        f"{remedy} compile the model with --head {model_class.head}".strip(),
    )


def _config(bundle: Model) -> PreTrainedConfig:
    """The original's config with as many labels as the bundle has outputs."""
    path = bundle.directory / model_config.NAME
    held = model_config.read_object(path) if path.is_file() else {}
    if held.get("model_type") in CONFIG_MAPPING:
        # compiled code attends as it does: "eager" asks for no other package
        config = AutoConfig.from_pretrained(bundle.directory, attn_implementation="eager")
    else:  # of an ONNX file, which may be of a model that transformers does not know
        config = PreTrainedConfig(name_or_path=str(bundle.directory))
    count = bundle.manifest["outputs"][0]["axes"][-1]
    if "classification" in bundle.manifest["model"]["head"] and config.num_labels != count:
        names = bundle.labels or [f"LABEL_{index}" for index in range(count)]
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
    return config


def _array(tensor: Any) -> Any:
    """A tensor as the numpy array of the same memory; what is none is left to the loader."""
    return tensor.detach().cpu().numpy() if isinstance(tensor, torch.Tensor) else tensor
