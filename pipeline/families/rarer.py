"""Lists the families of encoders that are met more rarely, and look like BERT but for one thing."""

from __future__ import annotations

from bertile.families import esm, roformer, xmod
from bertile.families.bert import BEHIND_PADDING, BERT_LAYERS, sizes_of, tiny
from bertile.families.family import AFTER_PADDING, BY_ANGLE, Family

RARER = (
    Family(
        name="xlm-roberta-xl",
        title="XLM-RoBERTa-XL",
        model_types=("xlm-roberta-xl",),
        layers=BERT_LAYERS,
        positions=AFTER_PADDING,
        tiny=tiny(type_vocab_size=1, **BEHIND_PADDING),
        kernels_of="megatron-bert",
    ),
    Family(
        name="xmod",
        title="X-MOD",
        model_types=("xmod",),
        layers=BERT_LAYERS,
        positions=AFTER_PADDING,
        check=xmod.must_have_language,
        prepare=xmod.choose_language,
        tiny=tiny(
            languages=["de_DE", "en_XX"],
            default_language="en_XX",
            type_vocab_size=1,
            **BEHIND_PADDING,
        ),
        kernels_of="roberta",
    ),
    Family(
        name="esm",
        title="ESM-2",
        lacks=("question-answering", "next-sentence", "multiple-choice", "pretraining"),
        model_types=("esm",),
        layers=BERT_LAYERS,
        positions=BY_ANGLE,
        table_after_padding=True,
        position_types=("absolute", "rotary"),
        token_types=False,
        prepare=esm.spell_embeddings,
        tiny=tiny(
            position_embedding_type="rotary", token_dropout=True, mask_token_id=3, pad_token_id=1
        ),
        sizes={
            "esm2-35m": {
                **sizes_of(12, 480, 20, 33, max_position_embeddings=1026, layer_norm_eps=1e-5),
                **{"position_embedding_type": "rotary", "token_dropout": True, "pad_token_id": 1},
                "mask_token_id": 32,
            },
        },
        kernels_of="modernbert",
    ),
    Family(
        name="roformer",
        title="RoFormer",
        lacks=("next-sentence", "pretraining"),
        model_types=("roformer",),
        layers=BERT_LAYERS,
        positions=BY_ANGLE,
        prepare=roformer.turn_halves,
        tiny=tiny(embedding_size=64, rotary_value=True),
        kernels_of="modernbert",
    ),
)
