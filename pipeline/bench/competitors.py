"""Finds the engines that a bundle is to be compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bertile import loader
from bertile.base.errors import BundleError, MissingExtraError, ModelError, UsageError, nearest
from bertile.base.progress import Progress
from bertile.bench import deepsparse, peer_models
from bertile.bench.engines import Engine, LeftOut, Source
from bertile.config import Config
from bertile.export import files
from bertile.families import text_settings
from bertile.numerics.precision import PRECISIONS
from bertile.onnx.exported import ExportedModel, InputSpec

# Which precisions a peer computes in on a CPU.
PEERS = {
    "onnxruntime": ("fp32", "int8", "int4"),
    "openvino": ("fp32", "bf16", "int8"),
    "torch": ("fp32", "bf16", "int8"),
    "torch-compile": ("fp32", "bf16", "int8"),
    "llamacpp": ("fp32", "int8", "int4"),
    "deepsparse": ("fp32", "int8"),
}
CHECKPOINTS = ("torch", "torch-compile", "llamacpp")  # run these, not ONNX files
NOT_A_CHECKPOINT = "{} is left out: {} is an ONNX file, and it runs checkpoints"
NO_FORM = "{} is left out: it computes in {} on a CPU, not in {}"


def engines(
    directory: Path,
    manifest: dict[str, Any],
    against: Sequence[str],
    onnx: Path | None,
    cache_dir: str | None,
    progress: Progress,
) -> tuple[list[Engine], list[str]]:
    """The bundle itself and each peer that can run its model; a sentence on each that cannot.

    A peer is a name of `PEERS`, in the bundle's precision or, as "openvino:bf16", in another, or
    the directory of another bundle. `onnx` None exports the bundle's source again, from the cache
    where it can. Raises UsageError for an unknown name.
    """
    precision = precision_of(manifest)
    wanted = list(dict.fromkeys(parse(name, precision) for name in against if name != "none"))
    peers, notes = possible([choice for choice in wanted if choice[1] != "bertile"], manifest)
    ours = source(directory, manifest, [kind for _, kind, _ in peers], onnx, cache_dir)
    exported = described(directory, manifest)
    ready = [Engine("bertile", "bertile", precision, ours)]
    for name, kind, its_precision in wanted:
        if kind == "bertile":
            ready.append(_bundle(name, manifest, ours))
        elif (name, kind, its_precision) in peers:
            peer = Engine(name, kind, its_precision, ours)
            try:
                ready.append(_prepared(peer, exported, cache_dir, progress))
            except LeftOut as reason:
                notes.append(str(reason))
    return ready, notes


def precision_of(manifest: dict[str, Any]) -> str:
    """What the bundle was compiled for."""
    return str(manifest["config"].get("precision", "fp32"))


def check(name: str) -> None:
    """UsageError for a peer that nobody knows."""
    if name != "none":
        parse(name, "fp32")


def parse(name: str, precision: str) -> tuple[str, str, str]:
    """Name, kind and precision of a peer; "kind:precision" is called "kind" where it is the same
    as the bundle's precision.
    """
    if (Path(name) / loader.MANIFEST).exists():
        return name, "bertile", ""
    kind, _, its_precision = name.partition(":")
    if kind not in PEERS:
        hint = f"{nearest(kind, (*PEERS, 'none'))}; or give the directory of another bundle"
        raise UsageError(f"engine '{kind}' is unknown{hint}")
    known = sorted({other for precisions in PEERS.values() for other in precisions})
    if its_precision and its_precision not in known:
        raise UsageError(
            f"precision '{its_precision}' of '{name}' is unknown{nearest(its_precision, known)}"
        )
    # fp16 is a way to store weights: its products are those of float32
    ours = PRECISIONS[precision].peer or precision
    return kind if its_precision in ("", ours) else name, kind, its_precision or ours


def possible(
    wanted: Sequence[tuple[str, str, str]], manifest: dict[str, Any]
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """The peers that can run the bundle's model, and a sentence on each that cannot."""
    model = str(manifest["model"]["source"])
    kept, notes = [], []
    for name, kind, precision in wanted:
        if precision not in PEERS[kind]:
            notes.append(NO_FORM.format(name, ", ".join(PEERS[kind]), precision))
        elif kind in CHECKPOINTS and files.is_onnx(model):
            notes.append(NOT_A_CHECKPOINT.format(name, model))
        else:
            kept.append((name, kind, precision))
    return kept, notes


def source(
    directory: Path,
    manifest: dict[str, Any],
    kinds: Sequence[str],
    onnx: Path | None,
    cache_dir: str | None,
) -> Source:
    """What the engines read; BundleError where the model has changed since it was compiled."""
    model = manifest["model"]
    if kinds and not (onnx and not set(kinds) & set(CHECKPOINTS)):
        from bertile.export import cached, exporter

        config = Config.from_dict({**manifest["config"], "cache_dir": cache_dir})
        if exporter.fingerprint(model["source"], config) != model["sha256"]:
            raise BundleError(
                f"'{model['source']}' has changed since {directory} was compiled from it",
                "compile it again",
            )
        onnx = onnx or cached.export_cached(model["source"], config).onnx_path
    outputs = tuple(output["name"] for output in manifest["outputs"])
    return Source(directory, onnx and Path(onnx), model["source"], model["head"], outputs)


def _prepared(
    peer: Engine, exported: ExportedModel, cache_dir: str | None, progress: Progress
) -> Engine:
    """The peer with the model file that it opens; LeftOut where that cannot be made."""
    if peer.kind == "deepsparse":
        deepsparse.environment(cache_dir, progress)
    try:
        form = peer_models.prepared(
            peer.kind, peer.precision, peer.source.onnx, exported, cache_dir, progress
        )
    except (ModelError, MissingExtraError) as error:
        raise LeftOut(f"{peer.name} is left out: {error}") from error
    return dataclasses.replace(peer, source=dataclasses.replace(peer.source, onnx=form))


def described(directory: Path, manifest: dict[str, Any]) -> ExportedModel:
    """What the bundle says of the model that it was compiled from; the tokenizer is in it too."""
    model = manifest["model"]
    return ExportedModel(
        directory=directory,
        source=model["source"],
        sha256=model["sha256"],
        family=model["family"],
        head=model["head"],
        max_length=model["max_length"],
        inputs=tuple(InputSpec(**entry) for entry in manifest["inputs"]),
        outputs=tuple(entry["name"] for entry in manifest["outputs"]),
        batch=manifest["static"]["batch"],
        length=manifest["static"]["length"],
        text=text_settings.of_bundle(directory, manifest),
    )


def _bundle(name: str, manifest: dict[str, Any], ours: Source) -> Engine:
    theirs = loader.read_manifest(Path(name))
    for part in ("inputs", "outputs"):
        names, wanted = (
            [entry["name"] for entry in its_manifest[part]] for its_manifest in (theirs, manifest)
        )
        if names != wanted:
            raise UsageError(
                f"{name} has the {part} {', '.join(names)}, {ours.bundle} has {', '.join(wanted)}",
                "compare two bundles of one model",
            )
    own = dataclasses.replace(ours, bundle=Path(name))
    return Engine(name, "bertile", precision_of(theirs), own)
