"""Compares a bundle with ONNX Runtime on the model that it was made from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bertile import backends, loader
from bertile.backends.backend import NotHere
from bertile.base.errors import NumericMismatchError, require
from bertile.base.progress import Progress, track
from bertile.families import model_config
from bertile.loading.exits import leaving_at
from bertile.onnx import exported
from bertile.onnx.exported import ExportedModel
from bertile.onnx.inputs import Fed
from bertile.onnx.samples import cosine, largest_difference, sample, session
from bertile.onnx.scores import room
from bertile.run import opener
from bertile.targets.rows import Target

# (batch, length): one token, a whole block, tails, unequal lengths with padding. Added are the
# longest, and a batch that is larger than one pass.
CASES = ((1, 1), (1, 16), (3, 37), (2, 64), (1, 128))
# The same under an emulator, which takes a hundred times as long.
EMULATED_CASES = ((1, 1), (2, 18))


def verify(
    directory: str | os.PathLike[str],
    onnx: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    parts: opener.Parts | None = None,
) -> dict[str, Any]:
    """Compare the bundle with ONNX Runtime on ``onnx`` (default: its source, exported again).

    Returns the check of the manifest: "max_abs_difference" and "tolerance" (of the same output,
    the worst one), the lowest "cosine" of an output, the "precision" whose bound it is, "cases",
    and the "emulator" of a bundle for another processor (`opener.opened` says how such a one is
    run, and with which `parts`). It does not raise for a difference; :func:`checked` does.
    """
    directory = Path(directory)
    manifest = loader.read_manifest(directory)
    backend = backends.of_bundle(manifest)
    with backend.open_for_check(directory, threads, parts) as (model, runs_on):
        emulated = "emulator" in runs_on
        wanted, pass_blocks = (EMULATED_CASES, None) if emulated else (CASES, model.pass_blocks)
        cases = _cases(manifest, wanted, pass_blocks)
        reference = _onnx(directory, onnx, progress)
        return {**_compare(model, reference, cases, backend.tolerances), **runs_on}


def checked(
    directory: Path, model: ExportedModel, row: Target, parts: opener.Parts
) -> dict[str, Any]:
    """As :func:`verify`; raises NumericMismatchError where the difference is past the tolerance.

    Where the bundle cannot be run, the check's "executed" is False, with the "reason".
    One for a GPU is run on that GPU where it is here, else emulated where it is small.
    """
    try:
        check = verify(directory, model.onnx_path, row.threads, parts=parts)
    except NotHere as error:
        return {"executed": False, "reason": error.reason, "max_abs_difference": None}
    fixed = loader.read_manifest(directory)["config"].get("ranges", "dynamic") != "dynamic"
    if not check["max_abs_difference"] <= check["tolerance"]:
        raise NumericMismatchError(
            f"the compiled model differs from ONNX Runtime by {check['max_abs_difference']:.2g},"
            f" more than {check['tolerance']:.2g}, at batch and length {check['worst']}",
            "calibrate with more texts, or leave --ranges out; no bundle was written"
            if fixed
            else "report the model with `bertile doctor`'s output; nothing was written",
        )
    return check


def as_text(check: dict[str, Any]) -> str:
    """The check of a manifest in some words."""
    if not check.get("executed", True):
        return f"not executed here: {check['reason']}"
    by = f", run by {check['emulator']}" if "emulator" in check else ""
    by = f", on {check['gpu']}" if check.get("gpu") else by
    close = check["max_abs_difference"] <= check["tolerance"]
    bound = f"{check['precision']}'s bound of {check['tolerance']:.2g}"
    return (
        f"largest error {check['max_abs_difference']:.2g} against ONNX Runtime{by}:"
        f" {'within' if close else 'ABOVE'} {bound} (cosine {check['cosine']:.4f})"
    )


def _onnx(directory: Path, path: str | os.PathLike[str] | None, progress: Progress | None) -> Path:
    """The model to compare a bundle with: what was given, else what it was made of."""
    if path is not None:
        return Path(path)
    from bertile.config import Config
    from bertile.export import cached

    manifest = loader.read_manifest(directory)
    config, source = Config.from_dict(manifest["config"]), manifest["model"]["source"]
    if config.trust_remote_code and not cached.has(source, config):
        config = dataclasses.replace(config, trust_remote_code=False)  # a bundle may be anyone's
    return cached.export_cached(source, config, progress).onnx_path


def _compare(
    model: Any,
    onnx: Path,
    wanted: Sequence[tuple[int, int]],
    tolerances: Mapping[str, float],
) -> dict[str, Any]:
    (runtime,) = require("compile", "onnxruntime")
    manifest = model.manifest
    loosest = max(sorted(_precisions(manifest)), key=lambda precision: tolerances[precision])
    relative = tolerances[loosest]
    specs = [exported.InputSpec(**spec) for spec in manifest["inputs"]]
    rename, padding = manifest["config"].get("rename", ()), _padding_id(onnx.parent)
    peer = Fed.of(session(onnx), onnx, rename)
    names = [output.name for output in peer.get_outputs()]
    axes = {output["name"]: output["axes"] for output in manifest["outputs"]}
    worst: dict[str, Any] = {"max_abs_difference": -1.0, "tolerance": relative, "worst": None}
    cases, cosines = [], [1.0]
    for batch, length in track(wanted, "compare"):
        arrays = sample(specs, batch, length, padding, seed=length)
        want = dict(zip(names, peer.run(names, arrays)))
        mask = arrays.get("attention_mask", arrays[specs[0].name] * 0 + 1)
        largest = 0.0
        for name, got in _answers(model, arrays):
            reference = want[name]
            difference = largest_difference(got, reference, mask, axes[name])
            tolerance = relative * max(1.0, float(abs(reference).max()))
            largest = max(largest, difference)
            cosines.append(cosine(got, reference, mask, axes[name]))
            if worst["max_abs_difference"] < 0 or difference / tolerance > (
                worst["max_abs_difference"] / worst["tolerance"]
            ):
                worst = {
                    "max_abs_difference": difference,
                    "tolerance": tolerance,
                    "worst": [batch, length],
                }
        cases.append({"batch": batch, "length": length, "max_abs_difference": largest})
    feeds = (sample(specs, *shape, padding, seed=shape[1]) for shape in wanted)
    worst["tolerance"] = room(worst["tolerance"], worst["max_abs_difference"], onnx, feeds, rename)
    return {
        "reference": f"onnxruntime {runtime.__version__}",
        "precision": loosest,
        "cosine": round(min(cosines), 6),
        **worst,
        "cases": cases,
    }


def _answers(model: Any, arrays: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each output of the model run as a whole; then the logits of each of its stages, where it has
    such, under the name that the whole model gives them.
    """
    exits = model.manifest.get("exits") if isinstance(model, loader.Model) else None
    if exits is None:
        yield from model(**arrays).items()
        return
    model.exit_thresholds = None
    yield from model(**arrays).items()
    last, *early = model.outputs
    for stage, name in enumerate((*early, last)):
        model.exit_thresholds = leaving_at(stage, exits)
        yield name, model(**arrays)[last]
        model.exit_thresholds = None


def _precisions(manifest: dict[str, Any]) -> set[str]:
    """The one asked for, and those of layers that a quantized model brought along."""
    layers = {kernel["shape"].get("precision", "fp32") for kernel in manifest["kernels"]}
    return {
        manifest["config"]["precision"],
        *(precision.partition("_")[0] for precision in layers),
    }


def _cases(
    manifest: dict[str, Any], wanted: Sequence[tuple[int, int]], pass_blocks: int | None = None
) -> list[tuple[int, int]]:
    """`wanted` as far as the model takes them; and, where a pass has at most so many blocks of
    tokens, the longest sequence that the model takes, and a batch that is larger than a pass.
    """
    static, limit = manifest["static"], manifest["model"]["max_length"] or 512
    if pass_blocks is not None:
        tokens = static["length"] or min(3, limit)
        rows = pass_blocks // -(-tokens // manifest["lanes"]) + 1
        wanted = [*wanted, (1, min(limit, 512)), (rows, tokens)]
    return sorted(
        {
            (static["batch"] or batch, static["length"] or min(length, limit))
            for batch, length in wanted
        }
    )


def _padding_id(directory: Path) -> int:
    """What the tokenizer pads with; RoBERTa counts positions from where ids are not this."""
    return model_config.padding_id(model_config.beside(directory))
