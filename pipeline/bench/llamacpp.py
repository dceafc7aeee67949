"""Runs a BERT model in llama.cpp, from a GGUF file that is written here.

The package gguf writes the file, xllamacpp has the library. llama.cpp knows encoders that
give token vectors, or one vector of them; it adds the first row of the token types to every token.
A pooler, which it does not know, is one small product behind it and computed here.
"""

from __future__ import annotations

import ctypes
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bertile.base.errors import BertileError, ModelError, require
from bertile.bench.engines import Arrays, Engine, LeftOut
from bertile.onnx.exported import ExportedModel

NAME, POOLER = "model.gguf", "pooler.npz"
FAMILY = "bert"
# Of what llama.cpp says it was built for, the best that it has goes into the table.
FEATURES = ("AMX_INT8", "AVX512_VNNI", "AVX_VNNI", "AVX512", "AVX2", "NEON")
# What our precisions are called in a GGUF file; only weights of linear layers are rounded.
TYPES = {"fp32": "F32", "int8": "Q8_0", "int4": "Q4_0"}
POOLINGS = {"mean": "MEAN", "cls": "CLS"}
NORMALIZE = "bertile.normalize"  # whether the vector of a text is brought to unit length


def write(precision: str, exported: ExportedModel, target: Path) -> None:
    """Write the checkpoint that a model was exported from as GGUF.

    Raises ModelError for a model that llama.cpp does not compute, MissingExtraError without gguf.
    """
    (gguf,) = require("bench", "gguf")
    from bertile.export import checkpoints, files

    if exported.family != FAMILY or files.is_onnx(exported.source):
        raise ModelError(f"it is written here for checkpoints of the family '{FAMILY}' alone")
    if not set(exported.outputs) <= {"last_hidden_state", "pooler_output", "sentence_embedding"}:
        raise ModelError(f"it gives vectors of tokens and texts, not {', '.join(exported.outputs)}")
    checkpoint = checkpoints.load(exported.source, exported.head, allow_unused=True)
    config = checkpoint.model.config
    pooling, normalize = _pooling(checkpoint.chain)
    if config.hidden_act != "gelu":
        raise ModelError(f"it computes GELU, not {config.hidden_act}")
    writer = gguf.GGUFWriter(target, "bert")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType[pooling])
    writer.add_bool(NORMALIZE, normalize)
    _add_vocabulary(gguf, writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config.num_hidden_layers)
    rounded = gguf.GGMLQuantizationType[TYPES[precision]]
    for name, tensor in checkpoint.model.base_model.state_dict().items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:  # the pooler, which nobody reads here, and buffers
            continue
        array = tensor.detach().numpy().astype(np.float32)
        layer = theirs.startswith("blk.") and array.ndim == 2
        as_type = rounded if layer else gguf.GGMLQuantizationType.F32
        block, _ = gguf.GGML_QUANT_SIZES[as_type]
        if array.shape[-1] % block:
            raise ModelError(
                f"its blocks of {block} weights do not divide {array.shape[-1]} inputs"
            )
        writer.add_tensor(theirs, gguf.quants.quantize(array, as_type), raw_dtype=as_type)
    if "pooler_output" in exported.outputs:
        dense = checkpoint.model.base_model.pooler.dense
        weight, bias = dense.weight.detach().numpy(), dense.bias.detach().numpy()
        np.savez(target.with_name(POOLER), weight=weight, bias=bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pooling(chain: Any) -> tuple[str, bool]:
    """llama.cpp's name of what makes an embedding, and whether that is brought to unit length.

    Raises ModelError for what llama.cpp does not compute.
    """
    from bertile.export.sentence_modules import Normalize, Pool

    if chain is None:
        return "NONE", False
    pooled, *after = chain.steps or (None,)
    modes = pooled.modes if isinstance(pooled, Pool) else ()
    if len(modes) != 1 or modes[0] not in POOLINGS or after not in ([], [Normalize()]):
        what = f"pooling of the kind '{' + '.join(modes)}'" if modes else "embedding of that kind"
        raise ModelError(f"it has no {what}, or computes more of it than its length")
    return POOLINGS[modes[0]], bool(after)


def _add_vocabulary(gguf: Any, writer: Any, config: Any) -> None:
    """Names for the ids, which nobody reads: requests are ids already."""
    size = config.vocab_size
    writer.add_tokenizer_model("bert")
    writer.add_token_list([f"token{number}" for number in range(size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_type_count(config.type_vocab_size)
    for number, add in enumerate(
        (writer.add_unk_token_id, writer.add_sep_token_id, writer.add_pad_token_id)
    ):
        add(number)


def open_model(engine: Engine, threads: int) -> tuple[Any, str]:
    """A function that runs the engine's GGUF file, and the library's version.

    Sequences are computed one after the other, without their padding. `threads` are those of one
    call; callers at once have a context each, and share the weights.
    """
    library, version = _library()
    model = library.llama_model_load_from_file(
        str(engine.source.onnx).encode(), library.llama_model_default_params()
    )
    if not model:
        raise LeftOut(f"{engine.name} is left out: it cannot read {engine.source.onnx}")
    pooler = _pooler(engine)
    idle: queue.SimpleQueue[_Context] = queue.SimpleQueue()

    def infer(inputs: Arrays) -> list[np.ndarray]:
        try:
            context = idle.get_nowait()
        except queue.Empty:
            context = _Context(library, model, threads)
        answer = context.run(inputs)
        idle.put(context)
        return [answer] if pooler is None else [answer, pooler(answer)]

    return infer, version


class _Params(ctypes.Structure):
    """Of llama_model_params and llama_context_params what is set here.

    Both are larger, differ with the version, and are passed by value: as the last argument, so that
    room behind their end does no harm.
    """

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")),
        ("rest", ctypes.c_uint8 * 1008),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        *(
            (name, ctypes.c_void_p)
            for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")
        ),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_POINTER, _INT, _TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
# What is called of llama.h: the type of the result, and of the arguments.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "llama_log_set": (None, _LOG, _POINTER),
    "llama_backend_init": (None,),
    "llama_print_system_info": (_TEXT,),
    "llama_model_default_params": (_Params,),
    "llama_context_default_params": (_Params,),
    "llama_model_load_from_file": (_POINTER, _TEXT, _Params),
    "llama_init_from_model": (_POINTER, _POINTER, _Params),
    "llama_model_n_ctx_train": (_INT, _POINTER),
    "llama_model_n_embd": (_INT, _POINTER),
    "llama_model_meta_val_str": (_INT, _POINTER, _TEXT, _TEXT, ctypes.c_size_t),
    "llama_pooling_type": (_INT, _POINTER),
    "llama_set_n_threads": (None, _POINTER, _INT, _INT),
    "llama_set_embeddings": (None, _POINTER, ctypes.c_bool),
    "llama_encode": (_INT, _POINTER, _Batch),
    "llama_get_embeddings": (_POINTER, _POINTER),
    "llama_get_embeddings_seq": (_POINTER, _POINTER, _INT),
}
_quiet = _LOG(lambda level, text, data: None)  # kept as long as the library may call it
# Of a new context, by which a library of another layout is told.
_DEFAULTS = (512, 2048, 512, 1)


def _library() -> tuple[Any, str]:
    """The library in the package xllamacpp, ready for calls, and how a table shows it."""
    (package,) = require("bench", "xllamacpp")
    library = ctypes.CDLL(package.xllamacpp.__file__)
    try:
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise LeftOut(f"llamacpp is left out: its library lacks a function: {error}") from error
    params = library.llama_context_default_params()
    if (params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max) != _DEFAULTS:
        raise LeftOut("llamacpp is left out: its library is newer than this code knows it")
    library.llama_log_set(_quiet, None)
    library.llama_backend_init()
    said = library.llama_print_system_info().decode()
    feature = next((name for name in FEATURES if f"{name} = 1" in said), "no SIMD")
    return library, f"llama.cpp {package.__version__} ({feature})"


def _pooler(engine: Engine) -> Callable[[np.ndarray], np.ndarray] | None:
    """What makes (batch, hidden) of token vectors, where the model has that output too."""
    if "pooler_output" not in engine.source.outputs:
        return None
    with np.load(engine.source.onnx.with_name(POOLER)) as file:
        weight, bias = file["weight"].T.copy(), file["bias"]
    return lambda hidden: np.tanh(hidden[:, 0] @ weight + bias)


class _Context:
    """What llama.cpp needs to answer one caller at a time."""

    def __init__(self, library: Any, model: Any, threads: int) -> None:
        self._library = library
        limit = library.llama_model_n_ctx_train(model)
        params = library.llama_context_default_params()
        # attention without a causal mask wants all tokens at once
        params.n_ctx = params.n_batch = params.n_ubatch = limit
        self._context = library.llama_init_from_model(model, params)
        if not self._context:
            raise LeftOut(f"llamacpp is left out: it has no room for {limit} tokens")
        library.llama_set_n_threads(self._context, threads, threads)
        library.llama_set_embeddings(self._context, True)
        self._width = library.llama_model_n_embd(model)
        self._pooled = library.llama_pooling_type(self._context) != 0
        self._normalize = self._says(model, NORMALIZE)
        sequence = np.zeros(1, np.int32)
        self._arrays = {
            "token": np.zeros(limit, np.int32),
            "pos": np.arange(limit, dtype=np.int32),
            "n_seq_id": np.ones(limit, np.int32),
            "seq_id": np.full(limit, sequence.ctypes.data, np.uintp),
            "logits": np.ones(limit, np.int8),
        }
        self._kept = sequence  # which the pointers point at
        places = {name: array.ctypes.data for name, array in self._arrays.items()}
        self._batch = _Batch(embd=None, **places)

    def run(self, inputs: Arrays) -> np.ndarray:
        """(batch, hidden) of a model that pools, else (batch, length, hidden), padding zero."""
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        ends = [ids.shape[1]] * len(ids) if mask is None else mask.sum(axis=1)
        shape = (len(ids), self._width) if self._pooled else (*ids.shape, self._width)
        answer = np.zeros(shape, np.float32)
        library, context = self._library, self._context
        for row, end in enumerate(ends):
            count = int(end)
            self._arrays["token"][:count] = ids[row, :count]
            self._batch.n_tokens = count
            if code := library.llama_encode(context, self._batch):
                raise BertileError(f"llama.cpp fails with code {code} on {count} tokens")
            if self._pooled:
                answer[row] = _floats(library.llama_get_embeddings_seq(context, 0), self._width)
            else:
                vectors = _floats(library.llama_get_embeddings(context), count * self._width)
                answer[row, :count] = vectors.reshape(count, self._width)
        if self._normalize:
            answer /= np.maximum(np.linalg.norm(answer, axis=-1, keepdims=True), 1e-12)
        return answer

    def _says(self, model: Any, key: str) -> bool:
        text = ctypes.create_string_buffer(16)
        self._library.llama_model_meta_val_str(model, key.encode(), text, len(text))
        return text.value == b"true"


def _floats(address: int | None, count: int) -> np.ndarray:
    """The floats that lie there; BertileError where nothing does."""
    if not address:
        raise BertileError("llama.cpp gives no vectors")
    return np.frombuffer((ctypes.c_float * count).from_address(address), np.float32)
