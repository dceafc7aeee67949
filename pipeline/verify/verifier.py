"""A bundle and the ONNX model it came from in, how far apart they are out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bertile import loader
from bertile.base.errors import NumericMismatchError, PlatformError, require
from bertile.base.progress import Progress
from bertile.onnx import exported
from bertile.onnx.exported import ExportedModel
from bertile.onnx.samples import largest_difference, sample, session
from bertile.run import opener, qemu
from bertile.targets.rows import Target, is_foreign

# Largest difference at a real token, relative to the largest magnitude of the reference output (at
# least 1).
# float32 sums of a thousand products in another order differ by about 1e-6 a layer.
TOLERANCES = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 0.05, "int8": 0.25}

# On a GPU what crosses memory has so many digits too, in each of up to 24 layers.
ON_GPU = {**TOLERANCES, "tf32": 0.02, "fp16": 0.02}

# (batch, length): one token, a whole block, tails, unequal lengths with padding; the longest is
# added.
CASES = ((1, 1), (1, 16), (3, 37), (2, 64), (1, 128))
# The same under an emulator, which takes a hundred times as long.
EMULATED_CASES = ((1, 1), (2, 18))


def verify(
    directory: Path,
    onnx: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    parts: opener.Parts | None = None,
) -> dict[str, Any]:
    """Compare the bundle with ONNX Runtime on ``onnx`` (default: its source, exported again).

    Returns the check of the manifest: "max_abs_difference" and "tolerance" (of the same output,
    the worst one), "cases", and the "emulator" of a bundle for another processor (`opener.opened`
    says how such a one is run, and with which `parts`). It does not raise for a difference;
    :func:`checked` does.
    """
    if loader.read_manifest(directory)["target"]["arch"] == loader.CUDA:
        check = _on_gpu(directory, _onnx(directory, onnx, progress))
        if not check.get("executed", True):
            raise PlatformError(check["reason"], "verify the bundle on a machine with the GPU")
        return check
    with opener.opened(directory, threads, parts) as model:
        emulated = isinstance(model, qemu.Model)
        cases = _cases(model.manifest, EMULATED_CASES if emulated else CASES)
        check = _compare(model, _onnx(directory, onnx, progress), cases)
        return {**check, "emulator": model.name} if emulated else check


def checked(
    directory: Path, model: ExportedModel, row: Target, parts: opener.Parts
) -> dict[str, Any]:
    """As :func:`verify`; raises NumericMismatchError where the difference is past the tolerance.

    Where the bundle cannot be run, the check's "executed" is False, with the "reason".
    One for a GPU is run on that GPU where it is here, else emulated where it is small.
    """
    if reason := opener.cannot_run(row):
        return _not_executed(reason)
    if row.gpu:
        check = _on_gpu(directory, model.onnx_path)
        if not check.get("executed", True):
            return check
    else:
        if is_foreign(row):
            try:
                parts()
            except PlatformError as error:  # offline, and nothing but this check needs them
                return _not_executed(error.what)
        check = verify(directory, model.onnx_path, row.threads, parts=parts)
    fixed = loader.read_manifest(directory)["config"].get("ranges", "dynamic") != "dynamic"
    if not check["max_abs_difference"] <= check["tolerance"]:
        raise NumericMismatchError(
            f"the compiled model differs from ONNX Runtime by {check['max_abs_difference']:.2g},"
            f" more than {check['tolerance']:.2g}, at batch and length {check['worst']}",
            "calibrate with more texts, or leave --ranges out; nothing was written"
            if fixed
            else "report the model with `bertile doctor`'s output; nothing was written",
        )
    return check


def surroundings(row: Target) -> Any:
    """What beside Python modules decides how a bundle for `row` is made and checked here."""
    if row.gpu is None:
        return opener.cannot_run(row)
    from bertile.codegen.cuda import compiler
    from bertile.targets import detect

    card = detect.gpu()
    return [card if isinstance(card, str) else card.name, compiler.words()]


def as_text(check: dict[str, Any]) -> str:
    """The check of a manifest in some words."""
    if not check.get("executed", True):
        return f"not executed here: {check['reason']}"
    by = f", run by {check['emulator']}" if "emulator" in check else ""
    by = f", on {check['gpu']}" if "gpu" in check else by
    return f"at most {check['max_abs_difference']:.1e} from ONNX Runtime{by}"


def _onnx(directory: Path, given: str | Path | None, progress: Progress | None) -> Path:
    """The model to compare a bundle with: what was given, else what it was made of."""
    if given is not None:
        return Path(given)
    from bertile.config import Config
    from bertile.export import cached

    manifest = loader.read_manifest(directory)
    config = Config.from_dict(manifest["config"])
    return cached.export_cached(manifest["model"]["source"], config, progress).onnx_path


def _on_gpu(directory: Path, onnx: Path) -> dict[str, Any]:
    from bertile.run.cuda import opener as check

    opened = check.open_model(directory)
    if isinstance(opened, str):
        return _not_executed(opened)
    if check.emulates(opened):
        cases = _cases(opened.manifest, EMULATED_CASES)
        return {**_compare(opened, onnx, cases), "emulator": "the emulator of CUDA kernels"}
    with opened as model:
        return {**_compare(model, onnx, _cases(model.manifest, CASES)), "gpu": model.gpu.name}


def _not_executed(reason: str) -> dict[str, Any]:
    return {"executed": False, "reason": reason, "max_abs_difference": None}


def _compare(
    model: loader.Model | qemu.Model, onnx: Path, wanted: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    (runtime,) = require("compile", "onnxruntime")
    manifest = model.manifest
    known = ON_GPU if manifest["target"]["arch"] == loader.CUDA else TOLERANCES
    relative = max(known[precision] for precision in _precisions(manifest))
    specs = [exported.InputSpec(**spec) for spec in manifest["inputs"]]
    peer = session(onnx)
    names = [output.name for output in peer.get_outputs()]
    worst: dict[str, Any] = {"max_abs_difference": -1.0, "tolerance": relative, "worst": None}
    cases = []
    for batch, length in wanted:
        arrays = sample(specs, batch, length, _padding_id(onnx.parent), seed=length)
        want, got = peer.run(names, arrays), model(**arrays)
        mask = arrays.get("attention_mask", arrays[specs[0].name] * 0 + 1)
        found = 0.0
        for name, reference in zip(names, want):
            difference = largest_difference(got[name], reference, mask)
            tolerance = relative * max(1.0, float(abs(reference).max()))
            found = max(found, difference)
            if worst["max_abs_difference"] < 0 or difference / tolerance > (
                worst["max_abs_difference"] / worst["tolerance"]
            ):
                worst = {
                    "max_abs_difference": difference,
                    "tolerance": tolerance,
                    "worst": [batch, length],
                }
        cases.append({"batch": batch, "length": length, "max_abs_difference": found})
    return {"reference": f"onnxruntime {runtime.__version__}", **worst, "cases": cases}


def _precisions(manifest: dict[str, Any]) -> set[str]:
    """The one asked for, and those of layers that a quantized model brought along."""
    layers = {kernel["shape"].get("precision", "fp32") for kernel in manifest["kernels"]}
    return {manifest["config"]["precision"], *(one.removesuffix("_static") for one in layers)}


def _cases(manifest: dict[str, Any], wanted: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """`wanted` as far as the model takes them, and of CASES the longest sequence that it takes."""
    static = manifest["static"]
    if static["length"]:
        return [(static["batch"] or 1, static["length"])]
    limit = manifest["model"]["max_length"] or 512
    lengths = {(static["batch"] or batch, min(length, limit)) for batch, length in wanted}
    longest = {(static["batch"] or 1, min(limit, 512))} if wanted is CASES else set()
    return sorted(lengths | longest)


def _padding_id(directory: Path) -> int:
    """What the tokenizer pads with; RoBERTa counts positions from where ids are not this."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    return int(config.get("pad_token_id") or 0)
