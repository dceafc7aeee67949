"""Describes a bundle: what was asked for, what was built, and what is known of it."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from bertile.bundle import safetensors
from bertile.config import Config
from bertile.families import text_settings
from bertile.graph import order
from bertile.graph.graph import Graph
from bertile.loading.interface import interface
from bertile.lower import sparse_choice
from bertile.lower.built import Built
from bertile.onnx.exported import ExportedModel
from bertile.schedules import BLOCK_TOKENS
from bertile.targets.rows import Target


def describe(
    graph: Graph, built: Built, row: Target, config: Config, quantization: Mapping[str, Any]
) -> dict[str, Any]:
    """What a bundle says of itself, without what `bundle.write` adds: hashes, weights, the check.

    `quantization` is what the quantizer reports, empty where nothing is in 8 bits.
    """
    exported = graph.exported
    model = {name: getattr(exported, name) for name in ("source", "sha256", "family", "head")}
    called = _called(graph)
    chosen = {k: v for k, v in config.to_dict().items() if k not in ("cache_dir", "dump_ir")}
    return {
        "bertile": version("bertile"),
        "entry": "main",
        **called,
        "model": {**model, **called["model"], "labels": list(exported.labels)},
        text_settings.SECTION: exported.text.to_json(),
        "target": {"name": row.name, "arch": row.arch, "features": list(row.features)},
        "config": {**chosen, "target": row.name, "log_dir": None, **_file_names(config)},
        "versions": {**_versions(), **built.versions},
        "passes": order.pass_names(),
        "kernels": built.kernels,
        "fallthrough": built.fallthrough,
        "notes": list(exported.notes),
        **({"exits": exits} if (exits := _exits(graph, built, config)) else {}),
        **({"quantization": quantization} if quantization else {}),
        **({"sparsity": sparsity} if (sparsity := sparse_choice.report(graph.plan)) else {}),
    }


def interface_of(graph: Graph, params: Mapping[str, np.ndarray]) -> str:
    """What the library of this graph says of itself; a loader compares it with the manifest."""
    weights = [(name, safetensors.dtype_name(array), array.shape) for name, array in params.items()]
    return interface(_called(graph), weights)


def _called(graph: Graph) -> dict[str, Any]:
    """The part of a manifest that says how the model is called."""
    exported = graph.exported
    return {
        "model": {"max_length": exported.max_length},
        "lanes": BLOCK_TOKENS,
        "inputs": [dataclasses.asdict(spec) for spec in exported.inputs],
        "outputs": _outputs(graph),
        "static": {
            "batch": exported.batch,
            "length": exported.length,
            **({"together": True} if exported.together else {}),
            **({"padded": True} if exported.padded else {}),
        },
    }


def _exits(graph: Graph, built: Built, config: Config) -> dict[str, Any]:
    """The stages of a model with early heads: behind how many layers each ends, its function, and
    the places of its weights among all.
    """
    places = {name: place for place, name in enumerate(built.params)}
    return built.stages and {
        "threshold": config.exit_threshold,
        "layers": list(graph.exported.exits),
        "stages": [
            {
                "entry": stage.entry,
                "params": [places[n] for n in stage.weights],
                "states": stage.states,
            }
            for stage in built.stages
        ],
    }


def _file_names(config: Config) -> dict[str, str | None]:
    """The files that were read, without the directories of the machine that read them."""
    paths = {"calibrate": config.calibrate, "eval": config.eval}
    paths["runtime_from"] = config.runtime_from
    return {name: path and Path(path).name for name, path in paths.items()}


def _outputs(graph: Any) -> list[dict[str, Any]]:
    """Names, dtypes and axes of main's results; the axes of batch and length by name."""
    ret = graph.main.ret_ty
    types = list(ret.fields) if hasattr(ret, "fields") else [ret]
    return [
        {
            "name": name,
            "dtype": str(tensor.dtype),
            "axes": _axes(graph.exported, name, tensor.shape),
        }
        for name, tensor in zip(graph.exported.outputs, types)
    ]


def _axes(exported: ExportedModel, name: str, shape: Any) -> list[int | str]:
    """Symbolic axes have their names; those of a static model are told by their place and size.

    A static (batch, n) is one vector per sequence, even where n is the length, unless it is a
    logit per token: a pooled output of 128 channels of a model for 128 tokens is no rarity.
    """
    axes: list[int | str] = [int(e) if hasattr(e, "value") else e.name for e in shape]
    if axes and axes[0] == exported.batch:
        axes[0] = "batch"
    per_token = len(axes) > 2 or name in ("start_logits", "end_logits")
    if len(axes) > 1 and axes[1] == exported.length and per_token:
        axes[1] = "length"
    return axes


def _versions() -> dict[str, str]:
    llvm = tvm.get_global_func("target.llvm_version_major", allow_missing=True)
    return {
        "tvm": version("apache-tvm"),
        "tvm_ffi": version("apache-tvm-ffi"),
        "llvm": str(llvm()) if llvm else "unknown",
        "onnx": version("onnx"),
        "python": platform.python_version(),
    }
