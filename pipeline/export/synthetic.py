"""Encoders with seeded random weights, pruned where asked, for benchmarks and tests without
downloads.
"""

from __future__ import annotations

import json
from typing import Any

from bertile.base.errors import UsageError, nearest, require
from bertile.config import HEADS
from bertile.export import pruning

SEED = 20


def _sizes(layers: int, hidden: int, heads: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": vocabulary,
        **more,
    }


def _tiny(**more: Any) -> dict[str, Any]:
    # A wide initialisation makes attention sharp: with 0.02 a two-layer model hardly looks at
    # its input, and a wrong mask or position would drown in rounding.
    sizes = _sizes(2, 128, 2, 1000, max_position_embeddings=512, initializer_range=0.1)
    return {**sizes, **more}


# DistilBERT calls its sizes n_layers, dim, …; its config accepts the common names through an
# attribute map except for the feed-forward size.
_DISTILBERT = {"hidden_dim": 512}
_AFTER_PADDING = {"max_position_embeddings": 514}

SYNTHETIC: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-tiny": ("bert", _tiny()),
    "bert-odd": ("bert", _tiny(hidden_size=312, num_attention_heads=12, intermediate_size=1200)),
    "minilm": ("bert", _sizes(6, 384, 12, 30522)),
    "bert-base": ("bert", _sizes(12, 768, 12, 30522)),
    "bert-large": ("bert", _sizes(24, 1024, 16, 30522)),
    "distilbert-tiny": ("distilbert", _tiny(**_DISTILBERT)),
    "distilbert-base": ("distilbert", _sizes(6, 768, 12, 30522, hidden_dim=3072)),
    "roberta-tiny": ("roberta", _tiny(type_vocab_size=1, **_AFTER_PADDING)),
    "roberta-base": (
        "roberta",
        _sizes(12, 768, 12, 50265, type_vocab_size=1, layer_norm_eps=1e-5, **_AFTER_PADDING),
    ),
    "electra-tiny": ("electra", _tiny(embedding_size=64)),
    "albert-tiny": ("albert", _tiny(embedding_size=64, pad_token_id=0)),
    "mpnet-tiny": ("mpnet", _tiny(**_AFTER_PADDING)),
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
            f"'{share}' of '{model}' is no sparsity", "write it as in synthetic:bert-base@0.9:4x1"
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
