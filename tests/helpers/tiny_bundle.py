"""Makes the bundle of a tiny model that numpy can compute too, and damages it."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

from bertile import loader
from bertile.base.cache import Cache
from bertile.bundle import writer

PARAMS = {
    "words": np.random.default_rng(0).standard_normal((50, 8), dtype=np.float32),
    "types": np.random.default_rng(1).standard_normal((2, 8), dtype=np.float32),
    "scale": np.random.default_rng(2).standard_normal(8, dtype=np.float32),
    "bias": np.full(3, 0.25, np.float32),
}

MANIFEST = {
    "bertile": "0.1.0",
    "entry": "main",
    "model": {"source": "tiny", "family": "bert", "head": "encoder", "max_length": 64},
    "target": {"name": "native", "arch": platform.machine(), "features": []},
    "lanes": 16,
    "inputs": [
        {"name": "input_ids", "dtype": "int64", "below": 50, "default": None},
        {"name": "attention_mask", "dtype": "int64", "below": 2, "default": "ones"},
        {"name": "token_type_ids", "dtype": "int64", "below": 2, "default": "zeros"},
    ],
    "outputs": [
        {"name": "hidden", "dtype": "float32", "axes": ["batch", "length", 8]},
        {"name": "pooled", "dtype": "float32", "axes": ["batch", 8]},
        {"name": "blocks", "dtype": "float32", "axes": ["batch", 4]},
    ],
    "static": {"batch": None, "length": None},
}


def build_library(path, interface=None):
    """Compile (words[ids] + types[token types]) * scale, its masked sum, and the sum of blocks.

    `interface` is what the library says of itself; without, it is as that of an older Bertile.
    """
    import tvm
    from tvm import relax
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def scaled(var_x: T.handle, scale: T.Buffer((8,), "float32"), var_y: T.handle):
        # opaque: fused with its neighbours it would no longer run on several threads
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        b, n = T.int64(), T.int64()
        x = T.match_buffer(var_x, (b, n, 8), "float32")
        y = T.match_buffer(var_y, (b, n, 8), "float32")
        for i in T.parallel(b * n):
            for j in range(8):
                y[i // n, i % n, j] = x[i // n, i % n, j] * scale[j]

    b, n, m = (tvm.tirx.Var(name, "int64") for name in ("batch", "length", "m"))
    tokens = [relax.Var(s["name"], relax.TensorType((b, n), "int64")) for s in MANIFEST["inputs"]]
    blocks = relax.Var("blocks", relax.TensorType((m, 4), "int32"))
    params = [relax.Var(k, relax.TensorType(v.shape, "float32")) for k, v in PARAMS.items()]
    op, builder = relax.op, relax.BlockBuilder()
    call = builder.add_func(scaled, "scaled")

    def look_up(table, ids):
        return op.reshape(op.take(table, op.reshape(ids, (b * n,)), axis=0), (b, n, 8))

    with builder.function("main", [*tokens, blocks, *params]):
        with builder.dataflow():
            total = op.add(look_up(params[0], tokens[0]), look_up(params[1], tokens[2]))
            shape = relax.TensorType((b, n, 8), "float32")
            hidden = builder.emit(relax.call_tir(call, (builder.emit(total), params[2]), shape))
            mask = op.expand_dims(op.astype(tokens[1], "float32"), 2)
            pooled = builder.emit(op.sum(op.multiply(hidden, mask), axis=1))
            summed = op.sum(op.astype(blocks, "float32"), axis=0, keepdims=True)
            seen = builder.emit(op.broadcast_to(summed, (b, 4)))
            result = builder.emit_output(relax.Tuple([hidden, pooled, seen]))
        builder.emit_func_output(result)
    if interface is not None:
        with builder.function("interface", []):
            builder.emit_func_output(tvm.ir.StringImm(interface))
    target = tvm.target.Target({"kind": "llvm", "num-cores": 2})
    pipeline = relax.get_default_pipeline(target)
    relax.build(builder.get(), target=target, relax_pipeline=pipeline).export_library(str(path))


def library(stages):
    """The library, built once for all files, by a process of its own: this one imports no TVM."""
    place = f"importlib.util.spec_from_file_location('built', {__file__!r})"

    def build(directory):
        python(
            f"import importlib.util; spec = {place}\n"
            "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
            f"module.build_library({str(directory / 'lib.so')!r})"
        )

    return Path(Cache(stages).get_or_make("tiny-library", build)[0]) / "lib.so"


def python(code, *, check=True, env=None, **options):
    """Run `code` in a new process and return what it printed."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
        **options,
    )
    assert run.returncode == 0 or not check, run.stderr
    return run.stdout if check else run


def change_manifest(directory, change):
    """Change the manifest, and give it the hash of what it says then."""
    manifest = json.loads((directory / "manifest.json").read_text())
    change(manifest)
    writer.write_manifest(directory, manifest)


def expected(ids, mask=None, types=None):
    ids = np.asarray(ids, np.int64)
    mask = np.ones_like(ids) if mask is None else np.asarray(mask, np.int64)
    types = np.zeros_like(ids) if types is None else np.asarray(types, np.int64)
    hidden = (PARAMS["words"][ids] + PARAMS["types"][types]) * PARAMS["scale"]
    pooled = (hidden * mask[:, :, None]).sum(axis=1)
    for row, end in enumerate(loader.sequence_ends(mask)):
        hidden[row, end:] = 0
    blocks = loader.token_blocks(mask, 16).sum(axis=0, dtype=np.float32)
    return {"hidden": hidden, "pooled": pooled, "blocks": np.tile(blocks, (len(ids), 1))}


def assert_same(outputs, wanted):
    assert list(outputs) == list(wanted)
    for name, array in wanted.items():
        assert outputs[name].dtype == np.float32
        np.testing.assert_allclose(outputs[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


def random_ids(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, 50, (batch, length))


WRONG_INPUTS = {
    "unknown name": (dict(input_idz=[[1]]), "no input 'input_idz'; did you mean 'input_ids'?"),
    "no ids": (dict(attention_mask=[[1]]), "the input input_ids is missing"),
    "nothing": ({}, "the input input_ids is missing"),
    "one dimension": (dict(input_ids=[1, 2]), "has 1 dimension; give (batch, length), for one"),
    "three dimensions": (dict(input_ids=[[[1]]]), "input_ids has 3 dimensions"),
    "a number": (dict(input_ids=3), "input_ids has 0 dimensions"),
    "a row of none": (dict(input_ids=[[1, 2], []]), "input_ids[1] has no token"),
    "uneven": (dict(input_ids=[[1, 2], 3]), "input_ids"),
    "floats": (dict(input_ids=[[1.0]]), "input_ids has dtype float64; give integers"),
    "float mask": (dict(input_ids=[[1]], attention_mask=[[0.5]]), "attention_mask has dtype"),
    "text": (dict(input_ids=[["a"]]), "input_ids has dtype <U1"),
    "huge": (dict(input_ids=[[2**70]]), "input_ids holds values that are not 64-bit integers"),
    "no rows": (dict(input_ids=np.zeros((0, 4), int)), "input_ids has shape (0, 4)"),
    "no tokens": (dict(input_ids=[[]]), "input_ids has shape (1, 0)"),
    "shapes": (
        dict(input_ids=[[1, 2]], attention_mask=[[1]]),
        "attention_mask has shape (1, 1), but input_ids has (1, 2)",
    ),
    "too long": (
        dict(input_ids=np.ones((1, 65), int)),
        "has 65 tokens, the model takes at most 64",
    ),
    "beyond": (dict(input_ids=[[1], [50]]), "input_ids[1, 0] is 50, the model takes 0 to 49"),
    "negative": (dict(input_ids=[[1, -1]]), "input_ids[0, 1] is -1, the model takes 0 to 49"),
    "wraps": (dict(input_ids=np.array([[2**64 - 1]], np.uint64)), f"is {2**64 - 1}, the model"),
    "types": (dict(input_ids=[[1]], token_type_ids=[[2]]), "token_type_ids[0, 0] is 2"),
    "places": (
        dict(input_ids=[[1, 2]], position_ids=[[1, 2]]),
        "the model has no input 'position_ids', which is not 0, 1, 2, …; known: input_ids",
    ),
    "mask": (dict(input_ids=[[1]], attention_mask=[[2]]), "attention_mask[0, 0] is 2"),
}


def shift_weights(data):
    """Take one space out of the header, so that no tensor is aligned any more."""
    size = int.from_bytes(data[:8], "little")
    return (size - 1).to_bytes(8, "little") + data[8 : 8 + size - 1] + data[8 + size :]


DAMAGED_WEIGHTS = {
    "empty": lambda data: b"",
    "header too long": lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
    "header no JSON": lambda data: data[:8] + b"?" + data[9:],
    "header no object": lambda data: (2).to_bytes(8, "little") + b"[]" + data[10:],
    "name": lambda data: data.replace(b'"words"', b'"sword"'),
    "shape": lambda data: data.replace(b"[50,8]", b"[51,8]"),
    "dtype": lambda data: data.replace(b'"F32"', b'"X32"'),
    "end": lambda data: data[:-64],
    "alignment": shift_weights,
}
