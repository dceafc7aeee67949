"""Lists the families, one row each, and finds a model's row, or what answers in its place."""

from __future__ import annotations

from typing import Any

from bertile.families import deberta, ernie, general, layoutlm, mpnet
from bertile.families.bert import BEHIND_PADDING, BERT_LAYERS, sizes_of, tiny
from bertile.families.decoders import DECODERS
from bertile.families.family import AFTER_PADDING, BY_ANGLE, BY_DISTANCE, Family
from bertile.families.rarer import RARER

# of a small vocabulary, where a family's own lie beyond it
_SPECIAL = {
    "pad_token_id": 0,
    **dict.fromkeys(("bos_token_id", "cls_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
}
# DeBERTa's attention, from tokens to distances and back
_BOTH_WAYS = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_OF_V3 = {
    **_BOTH_WAYS,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
}

FAMILIES = (
    Family(
        name="bert",
        title="BERT / MiniLM",
        lacks=(),
        model_types=("bert",),
        layers=BERT_LAYERS,
        tiny=tiny(),
        sizes={
            "bert-odd": tiny(hidden_size=312, num_attention_heads=12, intermediate_size=1200),
            "minilm": sizes_of(6, 384, 12, 30522),
            "bert-base": sizes_of(12, 768, 12, 30522),
            "bert-large": sizes_of(24, 1024, 16, 30522),
            # two layers of BERT-base that take long texts
            "bert-long": sizes_of(2, 768, 12, 30522, max_position_embeddings=8192),
        },
    ),
    Family(
        name="roberta",
        title="RoBERTa / XLM-R / CamemBERT",
        model_types=("roberta", "xlm-roberta", "camembert"),
        layers=BERT_LAYERS,
        positions=AFTER_PADDING,
        tiny=tiny(type_vocab_size=1, **BEHIND_PADDING),
        sizes={
            "roberta-base": sizes_of(
                12, 768, 12, 50265, type_vocab_size=1, layer_norm_eps=1e-5, **BEHIND_PADDING
            ),
            # four layers of BGE-M3, of fewer words; places count from the padding's on
            "bge-m3-short": sizes_of(
                4,
                1024,
                16,
                8192,
                max_position_embeddings=8194,
                type_vocab_size=1,
                layer_norm_eps=1e-5,
            ),
        },
    ),
    Family(
        name="distilbert",
        title="DistilBERT",
        model_types=("distilbert",),
        layers=(
            "attention.q_lin",
            "attention.k_lin",
            "attention.v_lin",
            "attention.out_lin",
            "ffn.lin1",
            "ffn.lin2",
        ),
        token_types=False,
        # Its sizes are called n_layers, dim, …; its config accepts the common names through an
        # attribute map except for the feed-forward size.
        tiny=tiny(hidden_dim=512),
        sizes={"distilbert-base": sizes_of(6, 768, 12, 30522, hidden_dim=3072)},
        kernels_of="bert",
    ),
    Family(
        name="electra",
        title="ELECTRA",
        model_types=("electra",),
        layers=BERT_LAYERS,
        tiny=tiny(embedding_size=64),
        kernels_of="albert",
    ),
    Family(
        name="albert",
        title="ALBERT",
        model_types=("albert",),
        layers=(
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.dense",
            "ffn",
            "ffn_output",
        ),
        tiny=tiny(embedding_size=64, pad_token_id=0),
    ),
    Family(
        name="mpnet",
        title="MPNet",
        model_types=("mpnet",),
        layers=(
            "attention.attn.q",
            "attention.attn.k",
            "attention.attn.v",
            "attention.attn.o",
            "intermediate.dense",
            "output.dense",
        ),
        positions=AFTER_PADDING,
        token_types=False,
        prepare=mpnet.tabulate_bias,
        tiny=tiny(**BEHIND_PADDING),
    ),
    Family(
        name="ernie",
        title="ERNIE",
        lacks=(),
        model_types=("ernie",),
        layers=BERT_LAYERS,
        prepare=ernie.fold_task_type,
        tiny=tiny(use_task_id=True),
        kernels_of="bert",
    ),
    Family(
        name="data2vec-text",
        title="data2vec-text",
        model_types=("data2vec-text",),
        layers=BERT_LAYERS,
        positions=AFTER_PADDING,
        tiny=tiny(type_vocab_size=1, **BEHIND_PADDING),
        kernels_of="roberta",
    ),
    Family(
        name="megatron-bert",
        title="MegatronBERT",
        lacks=(),
        model_types=("megatron-bert",),
        layers=BERT_LAYERS,
        tiny=tiny(),
    ),
    Family(
        name="roberta-prelayernorm",
        title="RoBERTa-PreLayerNorm",
        model_types=("roberta-prelayernorm",),
        layers=BERT_LAYERS,
        positions=AFTER_PADDING,
        tiny=tiny(type_vocab_size=1, **BEHIND_PADDING),
        kernels_of="megatron-bert",
    ),
    Family(
        name="rembert",
        title="RemBERT",
        lacks=("next-sentence", "pretraining"),
        model_types=("rembert",),
        layers=BERT_LAYERS,
        tiny=tiny(input_embedding_size=48, output_embedding_size=192),
        kernels_of="bert",
    ),
    Family(
        name="layoutlm",
        title="LayoutLM",
        lacks=("next-sentence", "multiple-choice"),
        model_types=("layoutlm",),
        layers=BERT_LAYERS,
        boxes=True,
        optional_pooler=False,
        prepare=layoutlm.take_mask,
        auto_classes={"question-answering": "AutoModelForDocumentQuestionAnswering"},
        tiny=tiny(max_2d_position_embeddings=64),
        kernels_of="bert",
    ),
    Family(
        name="modernbert",
        title="ModernBERT",
        lacks=("next-sentence", "pretraining"),
        model_types=("modernbert",),
        layers=("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"),
        groups=(1, 1, 1, 1),
        positions=BY_ANGLE,
        token_types=False,
        # two kinds of layers, whose windows are shorter than what tests ask for
        tiny=tiny(num_hidden_layers=4, local_attention=16, **_SPECIAL),
        sizes={
            "modernbert-base": sizes_of(22, 768, 12, 50368, intermediate_size=1152),
            "modernbert-large": sizes_of(28, 1024, 16, 50368, intermediate_size=2624),
            # four layers of ModernBERT-base
            "modernbert-long": sizes_of(4, 768, 12, 50368, intermediate_size=1152),
        },
    ),
    Family(
        name="nomic-bert",
        title="Nomic BERT",
        kernels_of="modernbert",
        lacks=("next-sentence", "question-answering", "multiple-choice", "pretraining"),
        model_types=("nomic_bert",),
        layers=(
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        ),
        groups=(3, 1, 2, 1),
        positions=BY_ANGLE,
        tiny=tiny(),
        sizes={"nomic-bert-base": sizes_of(12, 768, 12, 30528, max_position_embeddings=2048)},
    ),
    Family(
        name="deberta-v2",
        title="DeBERTa-v2 / DeBERTa-v3",
        model_types=("deberta-v2",),
        layers=(
            *(f"attention.self.{name}_proj" for name in ("query", "key", "value")),
            *BERT_LAYERS[3:],
        ),
        positions=BY_DISTANCE,
        check=deberta.must_be_known,
        prepare=deberta.spell_attention,
        # buckets end far below 512 tokens
        tiny=tiny(**_BOTH_WAYS, position_buckets=16, max_relative_positions=100),
        sizes={
            "deberta-v3-small": sizes_of(6, 768, 12, 128100, **_OF_V3),
            "deberta-v3-base": sizes_of(12, 768, 12, 128100, **_OF_V3),
        },
    ),
    Family(
        name="deberta",
        title="DeBERTa",
        lacks=("next-sentence", "multiple-choice"),
        model_types=("deberta",),
        layers=("attention.self.in_proj", *BERT_LAYERS[3:]),
        groups=(1, 1, 1, 1),
        by_head=True,
        positions=BY_DISTANCE,
        check=deberta.must_be_known,
        prepare=deberta.spell_attention,
        tiny=tiny(**_BOTH_WAYS, max_relative_positions=40),
        kernels_of="deberta-v2",
    ),
    *RARER,
    *DECODERS,
)


def named(name: str) -> Family:
    """The row of that name, which a loaded model's checkpoint carries; a type without a row has its
    own name.
    """
    rows = (family for family in FAMILIES if family.name == name)
    return next(rows, None) or general.family(name)


def of_type(model_type: Any) -> Family | None:
    """The row that a config.json's `model_type` belongs to; None where there is none."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def answering(model_type: str) -> Family:
    """The row of a type, or what stands in its place."""
    return of_type(model_type) or general.family(model_type)


def must_have_head(model_type: str, head: str) -> None:
    """UsageError where models of a type with a row have no such head."""
    family = answering(model_type)
    if head not in family.heads:
        # it brings numpy, which `bertile --help` does without
        from bertile.base.errors import UsageError

        known = ", ".join(family.heads)
        raise UsageError(f"models of type '{model_type}' have no head '{head}'; known: {known}")


def titles() -> str:
    """All families as a sentence lists them."""
    return ", ".join(family.title for family in FAMILIES)
