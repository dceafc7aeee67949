"""Describes a family: what the rest of the program asks before it loads, exports or prunes a model.

The methods take a transformers model and read its attributes, so that nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from bertile.base.allowed import HEADS

CAUSAL = "causal-lm"  # the head of decoders alone
FROM_ZERO = "from zero"
# As fairseq does: the first real token has the position `padding_idx` + 1, and tokens that are the
# padding id are not counted.
AFTER_PADDING = "after padding"
# By rotary positions, which count from zero: there is no table, and no row to run out of.
BY_ANGLE = "by angle"
# As FROM_ZERO where the config has a table of positions; beside it, or alone, attention looks at
# the distance of two tokens.
BY_DISTANCE = "by distance"
WITHOUT_TABLE = 8192  # tokens of a model that has no table of positions and names no limit


def has_places(model: Any) -> bool:
    """Whether a model's embeddings look up the place of each token."""
    return getattr(model.base_model.embeddings, "position_embeddings", None) is not None


@dataclass(frozen=True)
class Family:
    """A row of ``table.FAMILIES``.

    name             as manifests and logs spell it
    title            as README and the command line spell it
    model_types      what `model_type` of config.json says; the first is its synthetic models'
    layers           the linear layers of an encoder layer, by their names within it: Q, K and V,
                     the attention's output, the first and the second of the feed-forward network
    groups           how many layers these are each: Q, K and V may be one, and of a gated network
                     the two that are multiplied may be the first together
    by_head          whether Q, K and V of a head lie side by side, not the Q of all heads
    tiny             the configuration of synthetic:NAME-tiny, which tests take
    sizes            the configurations of its other synthetic models, by name
    positions        FROM_ZERO, AFTER_PADDING, BY_ANGLE or BY_DISTANCE
    table_after_padding  whether a model that has a table all the same counts AFTER_PADDING
    position_types   what `position_embedding_type` of a config.json may be
    token_types      whether its embeddings have a table of token types; one row is no input
    boxes            whether it reads where on a page each token's box lies
    optional_pooler  whether transformers' code takes a pooler that is None
    check            raises ModelError for a model of its that has no export, before anything runs
    prepare          changes a model in place so that its export shows what it computes; returns
                     notes for people
    auto_classes     by head, transformers' class that loads it, where that is not the usual one
    lacks            the heads that transformers has no class for
    causal           whether it is a decoder: a token sees those before it alone, and the head
                     "causal-lm" scores the next
    kernels_of       the family whose kernels its models have: quick tests compile that one
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    layers: tuple[str, ...]
    tiny: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    groups: tuple[int, int, int, int] = (3, 1, 1, 1)
    by_head: bool = False
    positions: str = FROM_ZERO
    table_after_padding: bool = False
    position_types: tuple[str, ...] = ("absolute",)
    token_types: bool = True
    boxes: bool = False
    optional_pooler: bool = True
    check: Callable[[Any], None] | None = None
    prepare: Callable[[Any], tuple[str, ...]] | None = None
    auto_classes: Mapping[str, str] = field(default_factory=dict)
    lacks: tuple[str, ...] = ("next-sentence",)
    causal: bool = False
    kernels_of: str | None = None

    own: ClassVar[bool] = True  # a row of the table; False of what stands in the place of one
    # Why models of a type have no export, and what to do, where that is known.
    hindrance: ClassVar[tuple[str, str] | None] = None

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that its models may have."""
        lacks = self.lacks if self.causal else (*self.lacks, CAUSAL)
        return tuple(head for head in HEADS if head not in lacks)

    def sees_all(self, config: Any) -> bool:
        """Whether the tokens of a model of this configuration all see each other."""
        return not self.causal or bool(getattr(config, "use_bidirectional_attention", False))

    def padding_id(self, model: Any) -> int | None:
        """The id behind which positions count; None where they count from zero."""
        has_table = self.table_after_padding and has_places(model)
        if self.positions != AFTER_PADDING and not has_table:
            return None
        return int(model.base_model.embeddings.padding_idx)

    def max_length(self, model: Any) -> int:
        """How many tokens a sequence may have: rows up to the padding id are never used."""
        if self.positions == BY_DISTANCE and not has_places(model):
            return WITHOUT_TABLE
        rows = model.config.max_position_embeddings
        padding_id = self.padding_id(model)
        return rows if padding_id is None else rows - padding_id - 1

    def type_count(self, model: Any) -> int:
        """How many token types there are; 0 for a family without them."""
        return model.config.type_vocab_size if self.token_types else 0

    def box_count(self, model: Any) -> int:
        """Below what the sides of boxes are; 0 for a model that reads none."""
        count = getattr(model.config, "max_2d_position_embeddings", 0)
        return count if "bbox" in self.takes(model) else 0

    def takes(self, model: Any) -> set[str]:
        """The names of what can be passed to the model, as far as the export asks."""
        extra = {"token_type_ids": self.token_types, "bbox": self.boxes}
        return {"input_ids", "attention_mask", *(name for name, has in extra.items() if has)}

    def encoder_layers(self, model: Any) -> list[dict[str, Any]]:
        """The linear layers of each encoder layer, in the order of `layers`, by their whole names.

        An encoder layer lies wherever Q does, so that groups and shared layers need no rule.
        """
        modules = dict(model.base_model.named_modules())
        query = f".{self.layers[0]}"
        starts = [name.removesuffix(query) for name in modules if name.endswith(query)]
        return [
            {name: modules[name] for name in (f"{start}.{layer}" for layer in self.layers)}
            for start in starts
        ]

    def grouped(self, layer: Mapping[str, Any]) -> list[list[Any]]:
        """The linear layers of one encoder layer, as `groups` says what they are."""
        rest, parts = iter(layer.values()), []
        for count in self.groups:
            parts.append([next(rest) for _ in range(count)])
        return parts

    def synthetic(self) -> dict[str, tuple[str, Mapping[str, Any]]]:
        """Its synthetic models: by name the model type and the configuration."""
        sizes = {f"{self.name}-tiny": self.tiny, **self.sizes}
        return {name: (self.model_types[0], values) for name, values in sizes.items()}
