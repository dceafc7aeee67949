"""Lists the families of small decoders, which embed a text by its last token, or score the next.

EuroBERT stands here too: it is a Llama whose tokens all see each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bertile.families.family import BY_ANGLE, Family

# no head of theirs in transformers
_LACKS = ("masked-lm", "next-sentence", "multiple-choice", "pretraining")
_LAYERS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_LLAMA = {
    "layers": _LAYERS,
    "groups": (3, 1, 2, 1),
    "positions": BY_ANGLE,
    "token_types": False,
}


def _sizes(
    layers: int, hidden: int, heads: tuple[int, int, int], wide: int, vocabulary: int, **more: Any
) -> Mapping[str, Any]:
    """``heads`` are those of queries, those of keys and values, and their channels."""
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        **dict(zip(names, heads)),
        "intermediate_size": wide,
        "vocab_size": vocabulary,
        **more,
    }


def _tiny(heads: tuple[int, int, int], layers: int = 2, **more: Any) -> Mapping[str, Any]:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    # a wide initialisation makes attention sharp: a wrong mask would drown in rounding
    shared = {"max_position_embeddings": 512, "initializer_range": 0.1, **special}
    return _sizes(layers, 128, heads, 512, 1000, **{**shared, **more})


DECODERS = (
    Family(
        name="llama",
        title="Llama",
        model_types=("llama",),
        tiny=_tiny((4, 2, 32)),
        sizes={"llama-1b": _sizes(16, 2048, (32, 8, 64), 8192, 128256, rms_norm_eps=1e-5)},
        causal=True,
        lacks=_LACKS,
        kernels_of="qwen3",
        **_LLAMA,
    ),
    Family(
        name="qwen3",
        title="Qwen3",
        model_types=("qwen3",),
        tiny=_tiny((4, 2, 32)),
        sizes={
            "qwen3-0.6b": _sizes(28, 1024, (16, 8, 128), 3072, 151669),
            # four layers of it, of fewer words
            "qwen3-short": _sizes(4, 1024, (16, 8, 128), 3072, 8192),
        },
        causal=True,
        lacks=_LACKS,
        **_LLAMA,
    ),
    Family(
        name="gemma3",
        title="Gemma 3 (texts)",
        model_types=("gemma3_text",),
        # two kinds of layers, whose windows are shorter than what tests ask for
        tiny=_tiny(
            (4, 2, 32),
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=8,
            query_pre_attn_scalar=24,
        ),
        sizes={
            "gemma3-300m": _sizes(
                24,
                768,
                (3, 1, 256),
                1152,
                262144,
                sliding_window=512,
                use_bidirectional_attention=True,
            ),
            "gemma3-short": _sizes(
                6,
                768,
                (3, 1, 256),
                1152,
                8192,
                sliding_window=512,
                use_bidirectional_attention=True,
            ),
        },
        causal=True,
        lacks=(*_LACKS, "token-classification", "question-answering"),
        kernels_of="qwen3",
        **_LLAMA,
    ),
    Family(
        name="gemma2",
        title="Gemma 2",
        model_types=("gemma2",),
        tiny=_tiny(
            (4, 2, 32),
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=8,
            query_pre_attn_scalar=24,
        ),
        causal=True,
        lacks=(*_LACKS, "question-answering"),
        kernels_of="qwen3",
        **_LLAMA,
    ),
    Family(
        name="gpt2",
        title="GPT-2",
        model_types=("gpt2",),
        layers=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        groups=(1, 1, 1, 1),
        token_types=False,
        tiny={
            **{"n_layer": 2, "n_embd": 128, "n_head": 4, "n_positions": 512, "vocab_size": 1000},
            **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1},
        },
        sizes={"gpt2-small": {"n_layer": 12, "n_embd": 768, "n_head": 12}},
        causal=True,
        lacks=("masked-lm", "next-sentence", "multiple-choice"),
        kernels_of="megatron-bert",
    ),
    Family(
        name="eurobert",
        title="EuroBERT",
        model_types=("eurobert",),
        tiny=_tiny((4, 2, 32)),
        sizes={"eurobert-210m": _sizes(12, 768, (12, 12, 64), 3072, 128256)},
        lacks=("next-sentence", "question-answering", "multiple-choice", "pretraining"),
        kernels_of="qwen3",
        **_LLAMA,
    ),
)
