"""Compiles a tiny random model of each model type of transformers, and compares it with that.

python -m bertile.studies.model_types --into types.jsonl --table types.md

Each is made, compiled and run in a process of its own with a limit of time and memory. A type that
FILE has a row of is not tried again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertile import driver, loader
from bertile.base import scratch
from bertile.base.errors import BertileError, NumericMismatchError, require
from bertile.base.progress import Progress
from bertile.base.quiet import quiet
from bertile.base.tables import short, table
from bertile.config import Config
from bertile.families import states
from bertile.families import table as families
from bertile.families.family import BY_DISTANCE

# Beside the types with a row: encoders, encoders of translators, and decoders read as encoders.
OTHER_TYPES = """
bert-generation big_bird bros canine convbert dpr esmc flaubert
fnet funnel gte ibert jina_embeddings_v3 layoutlmv3 lilt longformer luke markuplm mobilebert mra
nystromformer reformer roc_bert splinter squeezebert tapas ultrabert xlm
xlnet yoso clip_text_model bart blenderbot fsmt led longt5 m2m_100 marian mbart mt5 pegasus
plbart prophetnet switch_transformers t5 t5gemma umt5 biogpt bloom codegen cohere ctrl falcon
gemma glm gpt_bigcode gpt_neo gpt_neox gptj granite mamba mistral
modernbert-decoder mpt nemotron olmo olmo2 openai-gpt opt persimmon phi phi3 qwen2
qwen3_moe rwkv smollm3 stablelm starcoder2 xglm
""".split()
TYPES = tuple(
    sorted({name for family in families.FAMILIES for name in family.model_types} | {*OTHER_TYPES})
)
# Values of small models, by what configs call them.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers",), 2),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim"), 64),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "input_embedding_size"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "d_ff", "d_inner", "n_inner", "ffn_dim"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "dff"), 96),
    **dict.fromkeys(("ffn_hidden_size", "feed_forward_size"), 96),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size", "d_head"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("max_encoder_position_embeddings", "context_length"), 128),
    **dict.fromkeys(
        ("vocab_size", "src_vocab_size", "tgt_vocab_size", "pronunciation_vocab_size"), 320
    ),
    **dict.fromkeys(("shape_vocab_size", "entity_vocab_size"), 300),
    **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim", "entity_emb_size"), 16),
    **dict.fromkeys(("sliding_window", "window_size", "local_attention", "attention_window"), 16),
    **dict.fromkeys(("pad_token_id", "eos_token_id", "sep_token_id"), 1),
    **dict.fromkeys(("bos_token_id", "cls_token_id", "decoder_start_token_id"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts"), 4),
    "num_experts_per_tok": 2,
    # Wide, so that attention looks at something.
    **dict.fromkeys(("initializer_range", "init_std"), 0.1),
}
# What the general values do not fit.
_RELATIVE = {
    **{"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    **{"max_relative_positions": -1, "type_vocab_size": 0},
}
OTHERS: dict[str, dict[str, Any]] = {
    "canine": {"local_transformer_stride": 16, "num_hash_buckets": 64},
    "codegen": {"rotary_dim": 8},
    "ctrl": {"n_positions": 128},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1]},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "longformer": {"attention_window": [16, 16]},
    "led": {"attention_window": [16, 16]},
    "mobilebert": {
        **{"intra_bottleneck_size": 64, "true_hidden_size": 64, "embedding_size": 32},
        "num_feedforward_networks": 2,
    },
    "reformer": {
        **{
            "axial_pos_shape": [8, 16],
            "axial_pos_embds_dim": [16, 48],
            "local_attn_chunk_length": 16,
        },
        **{"lsh_attn_chunk_length": 16, "attn_layers": ["local", "local"], "num_buckets": 4},
    },
    **{
        name: _RELATIVE
        for family in families.FAMILIES
        if family.positions == BY_DISTANCE
        for name in family.model_types
    },
    "dpr": {"projection_dim": 0},
    "mamba": {"hidden_size": 64, "time_step_rank": 4},
    "mpt": {"attn_config": None},
    "nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 8},
    "esmc": {"num_key_value_heads": 4},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "lilt": {"hidden_size": 96},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "mra": {"max_position_embeddings": 128},
    "persimmon": {"num_key_value_heads": None},
    "xlnet": {"n_head": 4, "d_head": 16},
}
METHOD = "forkserver"  # which imports once for all
PRELOADED = ("torch", "transformers.models.auto.modeling_auto", "onnxruntime", "onnxscript", "tvm")
SHAPES = ((1, 1), (2, 7), (3, 37), (1, 64))  # (batch, length) that are compared
SEED = 7


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a line of FILE for each type as it is done, and the table at the end."""
    options = _options(arguments)
    done = states.read(options.into)
    for model_type in options.only or TYPES:
        if model_type in done:
            continue
        row = _apart(model_type, options.seconds, options.gigabytes)
        with options.into.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{model_type}: {row['state']} {row.get('reason') or ''}", file=sys.stderr)
    if options.table:
        options.table.write_text(as_table(states.read(options.into)) + "\n", encoding="utf-8")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--into",
        metavar="FILE",
        type=Path,
        required=True,
        help="the rows, one a line; those that it has stay",
    )
    add("--table", metavar="FILE", type=Path, help="write the rows as a table in Markdown")
    add("--only", metavar="TYPE", nargs="+", help="these types alone")
    add("--seconds", metavar="N", type=int, default=300, help="the most that a type may take")
    add("--gigabytes", metavar="N", type=int, default=12, help="the most memory of a type")
    return parser.parse_args(arguments)


def as_table(types: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows in Markdown, by type."""
    header = ("model type", "state", "median error", "largest error", "operators of TVM's")
    return table(header, [_cells(types[name]) for name in sorted(types)], markdown=True)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    name = f"`{row['type']}`"
    if row["state"] == states.REFUSED:
        return name, f"refused: {short(row['reason'], 110)}", "", "", ""
    operators = ", ".join(sorted(set(row["operators"]))) or "none"
    errors = (f"{row[key]:.1e}" for key in ("median", "largest"))
    return (
        name,
        {states.OWN: "own row", states.GENERAL: "general road"}[row["state"]],
        *errors,
        operators,
    )


def _apart(model_type: str, seconds: int, gigabytes: int) -> dict[str, Any]:
    """The row of a type, made by a process of its own."""
    processes = multiprocessing.get_context(METHOD)
    multiprocessing.set_forkserver_preload([__name__, *PRELOADED])
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_send, args=(theirs, model_type, gigabytes << 30))
    process.start()
    theirs.close()
    refused = {"type": model_type, "state": states.REFUSED}
    try:
        if not ours.poll(seconds):
            return {**refused, "reason": f"takes more than {seconds} s"}
        return ours.recv()
    except EOFError:
        process.join()
        return {**refused, "reason": f"ends its process with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _send(end: Any, model_type: str, memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with quiet():
        end.send(tried(model_type))


def tried(model_type: str) -> dict[str, Any]:
    """Make, compile and run a tiny model of a type; its row."""
    torch, _ = require("export", "torch", "transformers")
    torch.set_num_threads(1)
    row: dict[str, Any] = {"type": model_type, "state": states.REFUSED}
    with scratch.directory() as place:
        try:
            model = tiny(model_type)
        except Exception as error:  # a config that the small values do not fit
            return {**row, "reason": f"no tiny model: {type(error).__name__}: {error}"}
        path = Path(place)
        model.save_pretrained(path / "model")
        config = Config(tune="none", threads=1, head="encoder", cache_dir=str(path / "cache"))
        try:
            driver.compile(str(path / "model"), path / "bundle", config, Progress(verbosity=-1))
        except BertileError as error:
            numbers = isinstance(error, NumericMismatchError)
            reason = str(error).replace(str(path / "model"), model_type)
            return {**row, "reason": reason, **({"numbers": True} if numbers else {})}
        own = families.of_type(model_type) is not None
        state = states.OWN if own else states.GENERAL
        return {**row, "state": state, **compared(model, path / "bundle")}


def tiny(model_type: str) -> Any:
    """A seeded random model of a type, in evaluation mode."""
    torch, transformers = require("export", "torch", "transformers")
    kind = transformers.CONFIG_MAPPING[model_type]
    plain = kind()
    family = families.of_type(model_type)
    # what tells a family from others, of its row
    values = dict(family.tiny) if family else {}
    values |= {name: SMALL[name] for name in _held(plain)}
    values |= OTHERS.get(model_type, {})
    for part in ("encoder", "decoder"):
        inner = getattr(plain, part, None)
        if hasattr(inner, "to_dict"):
            values[part] = {
                **inner.to_dict(),
                **{name: SMALL[name] for name in _held(inner)},
                "layer_types": None,
            }
    config = kind(**values, architectures=[])  # which transformers asks of some types
    torch.manual_seed(SEED)
    with torch.no_grad():
        model = transformers.AutoModel.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # fresh biases are zeros and scales ones
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _held(config: Any) -> list[str]:
    """The names of SMALL that a config has values of, and not by computing them."""
    computed = {name for name in SMALL if isinstance(getattr(type(config), name, None), property)}
    return [n for n in SMALL if n not in computed and getattr(config, n, None) is not None]


def compared(model: Any, bundle: Path) -> dict[str, Any]:
    """Differences from transformers over batches padded on either side, and what TVM computes."""
    (torch,) = require("export", "torch")
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    model.config.use_cache = False
    differences, largest = [], 0.0
    with loader.load(bundle, threads=1) as compiled:
        names = {spec["name"] for spec in compiled.manifest["inputs"]}
        limit = compiled.manifest["model"]["max_length"] or 64
        for seed, (rows, length) in enumerate(SHAPES):
            for left in (False, True):
                arrays = batch(rows, min(length, limit), names, left, seed, model)
                tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
                with torch.no_grad():
                    want = model(**tensors)
                results = compiled(**arrays)
                name = "last_hidden_state" if "last_hidden_state" in results else "pooler_output"
                got, want = results[name], want[name].float().numpy()
                real = arrays.get("attention_mask", np.ones_like(arrays["input_ids"])) != 0
                real = real if want.ndim == 3 else real[:, 0] | True
                if got.shape != want.shape:
                    return {"state": states.REFUSED, "reason": f"has {got.shape}, not {want.shape}"}
                scale = max(1.0, float(np.abs(want[real]).max()))
                apart = np.abs(got - want)[real].reshape(-1) / scale
                differences.append(apart)
                largest = max(largest, float(apart.max()))
        fallen = {name.partition(" ")[0] for name in compiled.manifest["fallthrough"]}
    together = np.concatenate(differences)
    row = {"median": float(np.median(together)), "largest": largest}
    if not np.isfinite(together).all() or largest > 1e-3:
        reason = f"differs from transformers by {largest:.2g}"
        return {**row, "state": states.REFUSED, "reason": reason, "numbers": True}
    return {**row, "operators": sorted(name.removeprefix("relax.") for name in fallen)}


def batch(
    batch: int, length: int, names: set[str], left: bool, seed: int, model: Any
) -> dict[str, np.ndarray]:
    """Random ids, of which all rows but the first are padded."""
    random = np.random.default_rng(seed)
    ids = random.integers(3, 100, (batch, length))  # those of masked tokens are among them
    real = np.maximum(1, random.integers(1, length + 1, batch))
    real[0] = length
    places = np.arange(length)[::-1] if left else np.arange(length)
    mask = (places < real[:, None]).astype(np.int64)
    padding = getattr(model.config, "pad_token_id", None)
    arrays = {"input_ids": ids, "attention_mask": mask}
    if "attention_mask" in names:
        arrays["input_ids"] = np.where(mask == 1, ids, 0 if padding is None else padding)
    if "token_type_ids" in names:
        arrays["token_type_ids"] = random.integers(0, 2, (batch, length))
    arrays = {name: array for name, array in arrays.items() if name in names}
    if names.issuperset(loader.SIDES):
        corners = random.integers(0, model.config.max_2d_position_embeddings, (batch, length, 4))
        arrays[loader.BOXES] = np.sort(corners.reshape(batch, length, 2, 2), axis=2).reshape(
            batch, length, 4
        )
    return arrays


if __name__ == "__main__":
    raise SystemExit(main())
