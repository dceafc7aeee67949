"""Encoders with seeded random weights, pruned where asked, for benchmarks and tests without
downloads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bertile.base.errors import UsageError, nearest, require
from bertile.config import HEADS
from bertile.export import pruning
from bertile.families import table

SEED = 20

SYNTHETIC: dict[str, tuple[str, Mapping[str, Any]]] = {
    name: model for family in table.FAMILIES for name, model in family.synthetic().items()
}


def config(name: str) -> Any:
    """Return the transformers configuration of the synthetic model `name`."""
    (transformers,) = require("export", "transformers")
    model_type, sizes = SYNTHETIC[name]
    return transformers.AutoConfig.for_model(model_type, **sizes)


def parse(model: str, head: str | None) -> tuple[str, str]:
    """The name and head of "synthetic:NAME[:HEAD][@SPARSITY:PATTERN]"; `head` must not say
    another.
    """
    name, _, written = model.removeprefix("synthetic:").partition("@")[0].partition(":")
    if name not in SYNTHETIC:
        raise UsageError(f"synthetic model '{name}' is unknown{nearest(name, SYNTHETIC)}")
    if written and written not in HEADS:
        raise UsageError(f"head '{written}' of '{model}' is unknown{nearest(written, HEADS)}")
    if written and head not in (None, written):
        raise UsageError(f"'{model}' asks for another head than '{head}'", "name only one")
    return name, head or written or "encoder"


def pruned(model: str) -> tuple[float, str] | None:
    """The sparsity and pattern that a synthetic model's name asks for; None for a dense one."""
    _, asked, how = model.partition("@")
    if not asked:
        return None
    share, _, pattern = how.partition(":")
    try:
        sparsity = float(share)
    except ValueError as error:
        raise UsageError(
            f"'{share}' of '{model}' is not a sparsity",
            "write it as in synthetic:bert-base@0.9:4x1",
        ) from error
    return pruning.check(sparsity, pattern), pattern


def describe(model: str, head: str | None) -> str:
    """Return a text that differs for any two synthetic models with different weights."""
    name, head = parse(model, head)
    zeros = [pruned(model)] if pruned(model) else []
    return json.dumps([name, head, SEED, SYNTHETIC[name], *zeros])


def build(auto_class: Any, model_config: Any) -> Any:
    """Return `auto_class` of this config, every parameter random, the same on every call."""
    (torch,) = require("export", "torch")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        model = auto_class.from_config(model_config, attn_implementation="eager")
        for parameter in model.parameters():
            # Fresh biases are all zero and fresh scales all one: exporters merge such equal
            # tensors, which hides faults that real weights would show.
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
