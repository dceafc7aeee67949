"""Lets a decoder that answers yes or no give the logits of these words alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NOTE = (
    "texts are not taken: its questions go through the chat template of its tokenizer, which a"
    " bundle does not have; give the ids that it makes"
)


def ids_of(words: Sequence[str], directory: Path | None) -> tuple[int, ...]:
    """The id of each word, a token of the tokenizer in `directory`; of "#9693" that number.

    Raises UsageError for a word that is no single token, MissingExtraError without tokenizers.
    """
    from bertile.base.errors import UsageError, require

    ids = []
    for word in words:
        if word[0] == "#" and word[1:].isdigit():
            ids.append(int(word[1:]))
            continue
        file = directory / "tokenizer.json" if directory else None
        if file is None or not file.is_file():
            raise UsageError(
                f"the label '{word}' has no id without a tokenizer.json", "give its id, as in #9693"
            )
        (tokenizers,) = require("run", "tokenizers")
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        pieces = tokenizer.encode(word, add_special_tokens=False)
        if len(pieces.ids) != 1:
            raise UsageError(
                f"the label '{word}' is no token but {len(pieces.ids)}: {' '.join(pieces.tokens)}",
                "name a token, or its id, as in #9693",
            )
        ids += pieces.ids
    return tuple(ids)


def keep_words(model: Any, ids: Sequence[int]) -> None:
    """Leave of the head of a causal model the rows of these ids, in place: logits (batch, length,
    ids) then; whatever the model makes of its logits stays.

    Raises ModelError for an id that it does not have.
    """
    import torch
    from torch import nn

    from bertile.base.errors import ModelError

    head = model.get_output_embeddings()
    if not all(0 <= number < len(head.weight) for number in ids):
        raise ModelError(f"the model has {len(head.weight)} ids, its LogitScore reads {list(ids)}")
    kept = nn.Linear(head.in_features, len(ids), bias=head.bias is not None)
    with torch.no_grad():
        for name, parameter in kept.named_parameters():
            parameter.copy_(getattr(head, name)[list(ids)])
    model.set_output_embeddings(kept)


def has_template(directory: Path) -> bool:
    """Whether a tokenizer turns questions and documents into a conversation first."""
    settings = directory / "tokenizer_config.json"
    if any(directory.glob("*chat_template*")):
        return True
    try:
        return bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):  # no tokenizer, or none that is read here
        return False
