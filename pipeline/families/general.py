"""Answers for a model type without a row: its models say by config and signature what they take.

They are exported as transformers runs them, with masks and positions of its own making, and go the
way of an ONNX file: fused where a pattern matches, by TVM's kernels elsewhere.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

from bertile.base.allowed import HEADS
from bertile.families.family import Family

# What configs call the number of positions, beside the name that most have.
LENGTHS = (
    *("max_position_embeddings", "max_encoder_position_embeddings", "n_positions", "n_ctx"),
    *("max_sequence_length", "max_seq_len", "context_length"),
)


# What keeps models of a type from an export, and what to do: said where an export of theirs fails.
_OF_LONG_TEXTS = "for long texts compile modernbert, nomic_bert or an xlm-roberta of 8192 tokens"
_OF_GLOBAL_TOKENS = (
    "Longformer gathers the tokens of global attention by the values of a mask, and sizes of"
    " tensors may depend on the batch and the length alone"
)
_OF_STATES = (
    "its state is computed token by token, in a loop that torch's exporter writes for one length",
    "compile an encoder with attention, such as bert or modernbert",
)
_OF_EXPERTS = (
    "it sends tokens to experts by their values, and sizes of tensors may depend on the batch and"
    " the length alone",
    "compile a model whose layers all tokens go through, such as qwen3",
)
HINDRANCES = {
    **dict.fromkeys(("mamba", "mamba2", "rwkv"), _OF_STATES),
    **dict.fromkeys(("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"), _OF_EXPERTS),
    "bros": (
        "BROS compares the boxes of every two tokens as fractions of a page, and a bundle takes"
        " integers, one a token",
        "layoutlm, lilt and layoutlmv3 compile with boxes",
    ),
    "canine": (
        "CANINE attends within pieces of a text one after the other, so that its graph has as many"
        " parts as a text has pieces",
        "compile a model of words, such as bert or xlm-roberta",
    ),
    "funnel": (
        "a Funnel Transformer shortens the text from block to block by lists of places that are"
        " made for one length",
        "compile another encoder, such as bert or modernbert",
    ),
    "led": (
        f"LED's encoder is a Longformer: {_OF_GLOBAL_TOKENS}",
        _OF_LONG_TEXTS,
    ),
    "longt5": (
        "LongT5 cuts texts into blocks, and torch's exporter writes their number for one length",
        _OF_LONG_TEXTS,
    ),
    "longformer": (
        _OF_GLOBAL_TOKENS,
        _OF_LONG_TEXTS,
    ),
    "prophetnet": (
        "torch's exporter has no form for how ProphetNet subtracts its masks",
        "compile another encoder, such as bert or roberta",
    ),
    "reformer": (
        "Reformer looks positions up by two axes and cuts texts into pieces of a fixed size, by"
        " code that goes another way for each length",
        _OF_LONG_TEXTS,
    ),
    "xlnet": (
        "torch's exporter has no form for the arithmetic of XLNet's masks and distances",
        "compile another encoder, such as bert, roberta or deberta-v2",
    ),
}


@dataclass(frozen=True)
class GeneralFamily(Family):
    """The answers of a row, for any model of transformers."""

    own: ClassVar[bool] = False

    @property
    def hindrance(self) -> tuple[str, str] | None:
        """What HINDRANCES says of its type."""
        return HINDRANCES.get(self.name)

    @property
    def heads(self) -> tuple[str, ...]:
        """All that there are: transformers says which of them a type has a class for."""
        return HEADS

    def padding_id(self, model: Any) -> None:
        """None: the model counts by itself."""
        return

    def max_length(self, model: Any) -> int | None:
        """How many positions its config names; None where it names none."""
        lengths = (getattr(model.config, name, None) for name in LENGTHS)
        return next((n for n in lengths if isinstance(n, int) and n > 0), None)

    def type_count(self, model: Any) -> int:
        """How many token types its config names, if the model takes such."""
        count = getattr(model.config, "type_vocab_size", None)
        return count if isinstance(count, int) and "token_type_ids" in self.takes(model) else 0

    def takes(self, model: Any) -> set[str]:
        """The names of what can be passed to the model."""
        return set(inspect.signature(model.forward).parameters)


def family(model_type: str) -> GeneralFamily:
    """What stands in the place of a row for this type."""
    return GeneralFamily(
        name=model_type,
        title=model_type,
        model_types=(model_type,),
        layers=(),
        tiny={},
        lacks=(),
        token_types=False,  # no table of them is folded
        optional_pooler=False,
    )
