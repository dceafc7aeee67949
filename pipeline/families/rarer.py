"""Lists the families of encoders that are met more rarely, and look like BERT but for one thing."""

from __future__ import annotations

from typing import Any

from bertile.families import esm, roformer, xmod
from bertile.families.family import AFTER_PADDING, BY_ANGLE, Family

_BERT_LAYERS = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)
# 512 tokens behind padding id 1
_AFTER_PADDING = {"max_position_embeddings": 514, "type_vocab_size": 1}


def _tiny(**more: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2}
    # a wide initialisation makes attention sharp: a wrong mask would drown in rounding
    rest = {"vocab_size": 1000, "max_position_embeddings": 512, "initializer_range": 0.1}
    return {**sizes, "intermediate_size": 512, **rest, **more}


RARER = (
    Family(
        name="xlm-roberta-xl",
        title="XLM-RoBERTa-XL",
        model_types=("xlm-roberta-xl",),
        layers=_BERT_LAYERS,
        positions=AFTER_PADDING,
        tiny=_tiny(**_AFTER_PADDING),
        kernels_of="megatron-bert",
    ),
    Family(
        name="xmod",
        title="X-MOD",
        model_types=("xmod",),
        layers=_BERT_LAYERS,
        positions=AFTER_PADDING,
        check=xmod.must_have_language,
        prepare=xmod.choose_language,
        tiny=_tiny(
            languages=["de_DE", "en_XX"],
            default_language="en_XX",
            **_AFTER_PADDING,
        ),
        kernels_of="roberta",
    ),
    Family(
        name="esm",
        title="ESM-2",
        lacks=("question-answering", "next-sentence", "multiple-choice", "pretraining"),
        model_types=("esm",),
        layers=_BERT_LAYERS,
        positions=BY_ANGLE,
        table_after_padding=True,
        position_types=("absolute", "rotary"),
        token_types=False,
        prepare=esm.spell_embeddings,
        tiny=_tiny(
            position_embedding_type="rotary", token_dropout=True, mask_token_id=3, pad_token_id=1
        ),
        sizes={
            "esm2-35m": {
                **{"num_hidden_layers": 12, "hidden_size": 480, "num_attention_heads": 20},
                **{"intermediate_size": 1920, "vocab_size": 33},
                **{"position_embedding_type": "rotary", "token_dropout": True, "pad_token_id": 1},
                **{"mask_token_id": 32, "max_position_embeddings": 1026, "layer_norm_eps": 1e-5},
            },
        },
        kernels_of="modernbert",
    ),
    Family(
        name="roformer",
        title="RoFormer",
        lacks=("next-sentence", "pretraining"),
        model_types=("roformer",),
        layers=_BERT_LAYERS,
        positions=BY_ANGLE,
        prepare=roformer.turn_halves,
        tiny=_tiny(embedding_size=64, rotary_value=True),
        kernels_of="modernbert",
    ),
)
