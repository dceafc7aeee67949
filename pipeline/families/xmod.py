"""Lets an X-MOD model go through the adapters of one language, without looking for rows of others.

transformers picks the rows of each language out of every layer's batch by truth values, whose sizes
no graph of fixed axes has.
"""

from __future__ import annotations

from typing import Any


def must_have_language(model: Any) -> None:
    """ModelError for a model that does not say whose adapters to take."""
    from bertile.base.errors import ModelError  # brings numpy

    known, language = model.config.languages, model.config.default_language
    if language not in known:
        raise ModelError(
            f"an X-MOD model is compiled for one language, and its default_language is {language}",
            f"write one into its config.json: {', '.join(known)}",
        )


def choose_language(model: Any) -> tuple[str, ...]:
    """Take the adapters of the config's `default_language` for every row, in place."""
    language = model.config.default_language
    for layer in model.base_model.encoder.layer:
        _adapt(layer.output, layer.output.adapter_modules[language])
    return (f"languages are not an input: every row is of '{language}', the default_language",)


def _adapt(output: Any, adapter: Any) -> None:
    def lang_adapter(lang_ids: Any, hidden: Any) -> Any:
        normed = hidden
        if output.adapter_layer_norm is not None:
            normed = output.adapter_layer_norm(hidden)
        elif output.adapter_reuse_layer_norm:
            normed = output.LayerNorm(hidden)
        return adapter(normed) + (normed if output.ln_before_adapter else hidden)

    # Beside the class's method, which the model would find first else.
    output.__dict__["lang_adapter"] = lang_adapter
