"""Brings an ONNX file that any exporter wrote to the canonical form of the same model."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bertile.base import quiet
from bertile.base.errors import ModelError, NumericMismatchError, UsageError
from bertile.config import Config
from bertile.families import model_config, table, text_settings
from bertile.families.family import AFTER_PADDING, Family
from bertile.families.text_settings import TextSettings
from bertile.onnx import (
    attention,
    branches,
    constants,
    counts,
    distances,
    floats,
    fusions,
    microsoft,
    products,
    reach,
    rewrites,
    spectra,
    tokenizer_file,
    tokens,
    turned_pairs,
)
from bertile.onnx import quantized as onnx_quantized
from bertile.onnx.exported import UNKNOWN, ExportedModel, InputSpec
from bertile.onnx.graph import OnnxGraph, save
from bertile.onnx.inputs import Fed, input_specs, present, tried_limits
from bertile.onnx.integer import is_quantized
from bertile.onnx.lookups import write_lookups
from bertile.onnx.masks import write_masks
from bertile.onnx.places import write_place_tables
from bertile.onnx.probing import SHAPES, Probes, opened, probe
from bertile.onnx.quantized import drop_marks
from bertile.onnx.reader import check_operators, read
from bertile.onnx.samples import largest_difference, sample, session, squared_norms
from bertile.onnx.scores import room
from bertile.onnx.shapes import Axes, fold_constants, write_shapes
from bertile.onnx.source_files import fingerprint, text_files

OPSET = 20
TOLERANCE = 1e-3  # largest absolute difference from the original, real tokens only
# Norm of the difference by that of the original's outputs, where that is quantized and rounds other
# activations too: 0.02 to 0.3 is seen, unrelated results are 1.4 apart.
QUANTIZED_TOLERANCE = 0.5
HALF_TOLERANCE = 0.05  # the same of an original that computes in float16
_FAULT = "this is a fault in Bertile's normalizer; please report it"
_CALIBRATE = (
    "the file also quantizes sums with the attention mask, as it seems, and is itself far from"
    " the model in floats: quantize MatMul and Gemm alone (op_types_to_quantize)"
)


def normalize(path: Path, directory: Path, config: Config) -> ExportedModel:
    """Write the model in `path` as `directory`/model.onnx in canonical form, with export.json.

    Tokenizer files and config.json beside `path`, or in `config.tokenizer`, are copied. Raises
    ModelError for a file that is damaged, not an encoder, or uses an operator that cannot be
    imported (named), and NumericMismatchError if the result differs from the original by more than
    TOLERANCE.
    """
    path, directory = Path(path), Path(directory)
    original, opset = read(path)
    original = branches.settle(original)
    graph = OnnxGraph(original)
    batch, length, renamed = present(graph, path, config.rename)
    with quiet.quiet():
        halves = floats.to_float32(graph)
        rounded, bits = any(map(microsoft.rounds, graph.nodes)), microsoft.note(graph)
        opset = microsoft.expand(graph, opset, batch, length)
        constants.fold(graph, opset)
        # ONNX Runtime rounds activations too where weights alone are stored as integers.
        integers = rounded or any(map(is_quantized, graph.nodes))
        quantized = onnx_quantized.lift_quantization(graph)
        constants.fold(graph, opset)
    check_operators(graph)
    lifted = graph.to_model(opset) if integers or halves else None
    _spell(graph)
    home = Path(config.tokenizer) if config.tokenizer else path.parent
    beside = model_config.beside(home)
    family = table.of_type(beside.get("model_type"))
    inputs = tuple(_counted(spec, family) for spec in input_specs(graph))
    with quiet.quiet():
        inputs = tried_limits(graph, inputs, opset, batch, length)
        probes = probe(graph, inputs, opset, batch, length)
        places = (spec.below for spec in inputs if spec.default == "places")
        positions = length or next(places, None) or beside.get("max_position_embeddings")
        max_length, notes = rewrite(graph, probes, opset, positions)
    check_operators(graph, rewritten=True)
    _name_axes(graph, probes)
    read_names = {value.name for value in graph.inputs}
    if quantized and not read_names.issuperset(spec.name for spec in inputs):
        quantized = (*quantized, _unread(inputs, read_names))
    inputs = tuple(spec for spec in inputs if spec.name in read_names)
    max_length = length or max_length or positions
    longest = min(max_length or 37, 512)
    shapes = ((batch or 2, length or min(16, longest)), (batch or 3, length or min(37, longest)))
    shapes = (*shapes, (batch or 1, length or 1), (batch or 1, length or longest))
    head = _head(tuple(graph.outputs), probes, inputs, config.head)
    directory.mkdir(parents=True, exist_ok=True)
    save(graph.to_model(OPSET), directory / "model.onnx")
    rounding = ("quantized", QUANTIZED_TOLERANCE, _CALIBRATE)
    if not integers:
        rounding = (" and ".join(halves), HALF_TOLERANCE, _FAULT)
    sizes = (shapes, batch, length)
    theirs, normalized = Fed.of(session(path), path, config.rename), directory / "model.onnx"
    differs, seen = _check(theirs, normalized, lifted, rounding, inputs, *sizes)
    labels = model_config.labels(beside) if head.endswith("-classification") else ()
    text = _prepare_texts(home, directory, labels)
    return ExportedModel(
        directory=directory,
        source=str(path),
        sha256=fingerprint(path, home),
        family=family.name if family else UNKNOWN,
        head=head,
        max_length=max_length,
        inputs=inputs,
        outputs=tuple(graph.outputs),
        labels=labels,
        batch=batch,
        length=length,
        together=bool(seen.rows),
        padded=bool(seen.padding),
        notes=(
            *(*renamed, *floats.note(original, halves), *bits, *quantized, *notes, *seen.notes()),
            differs,
        ),
        text=text,
    ).write()


def brought(
    graph: OnnxGraph, inputs: tuple[InputSpec, ...], opset: int, limit: int | None
) -> tuple[int | None, tuple[str, ...]]:
    """Bring a graph that torch's exporter wrote of a model's own code to canonical form, in place.

    `limit` is how many positions its config names. Returns how many it has, and notes.
    """
    constants.fold(graph, opset)
    check_operators(graph)
    _spell(graph)
    longest = max(length for _, length in SHAPES)
    length = limit if limit is not None and limit < longest else None
    probes = probe(graph, inputs, opset, None, length)
    positions, notes = rewrite(graph, probes, opset, limit)
    check_operators(graph, rewritten=True)
    return min((n for n in (positions, limit) if n), default=None), notes


def _spell(graph: OnnxGraph) -> None:
    products.expand_einsums(graph)
    products.look_up_one_hots(graph)
    rewrites.split_gemms(graph)


def _prepare_texts(home: Path, directory: Path, labels: tuple[str, ...]) -> TextSettings:
    """Copy what makes ids of texts, and give the settings by which its tokenizer.json is set."""
    for file in text_files(home):
        shutil.copyfile(file, directory / file.name)
    settings = text_settings.read(directory, len(labels) or None)
    return tokenizer_file.prepare(directory, settings, str(home))


def rewrite(
    graph: OnnxGraph, probes: Probes, opset: int, positions: int | None
) -> tuple[int | None, tuple[str, ...]]:
    """Rewrite the graph in place; return how many positions it has tables of, and notes.

    ``positions`` are how many the model is said to have, where tables do not tell.
    """
    # To opset 20: no other operator that TVM imports means something else there than in 13.
    rewrites.upgrade_reductions(graph)
    rewrites.upgrade_splits(graph)
    rewrites.drop_dropouts(graph)
    rewrites.pick_from_stacks(graph, probes.sizes)
    rewrites.write_gathers(graph)
    floats.drop_casts(graph, probes)
    axes = Axes(graph, probes)
    spectra.write_spectra(graph, probes, axes)
    tokens.unfold_first_axes(graph, probes, axes)
    products.join_heads(graph, probes)
    turned_pairs.turn_halves(graph, probes)  # what it reorders is cut out of products
    products.cut_products(graph, probes)
    notes = onnx_quantized.settle_quantization(graph, probes)
    attention.expand_attention(graph, lambda name: _is_bool(probes, name))
    attention.unfold_softmax(graph, probes.sizes)
    counts.gather_places(graph, probes, axes)
    counts.pick_rows(graph, probes)
    # Judged by values. Lookups and masks first: they need none of the shapes they were made of.
    max_length = write_lookups(graph, probes, axes, max(opset, OPSET))
    limit = max_length or positions
    by_distance, limit = distances.find_distances(graph, probes, axes, limit, max(opset, OPSET))
    max_length = limit if by_distance else max_length
    kept = write_masks(graph, probes, axes, max_length or positions, max(opset, OPSET))
    max_length = max_length or positions
    max_length = (
        write_place_tables(graph, probes, axes, max_length, max(opset, OPSET)) or max_length
    )
    attention.merge_transposes(graph, probes.sizes)
    rewrites.write_reshapes(graph, probes.sizes)
    fold_constants(graph, probes)
    tails = counts.write_tails(graph, probes, axes)
    max_length = min((n for n in (max_length, tails) if n), default=None)
    counts.write_flips(graph, probes, axes)
    counts.write_shifts(graph, probes, axes)
    counts.pick_tokens(graph, probes, axes)
    counts.write_counts(graph, probes, axes)
    write_shapes(graph, probes, axes)
    distances.write_distances(graph, by_distance)  # behind what would count its places anew
    rewrites.drop_expands(graph, probes.sizes)
    rewrites.join_copies(graph, probes.sizes)
    # Judged by structure.
    if not kept:
        attention.drop_nan_guards(graph)
    rewrites.transpose_weights(graph)
    attention.scale_scores(graph)
    rewrites.flatten_biases(graph)
    fusions.fuse_layer_norms(graph, probes.sizes)
    fusions.fuse_gelus(graph)
    rewrites.name_weights(graph)
    graph.clean()
    masks = (f"the attention mask '{name}' is kept as it is" for name in kept)
    return max_length, (*masks, *notes)


def _counted(spec: InputSpec, family: Family | None) -> InputSpec:
    """Positions that a caller leaves out count from 0, but not those of RoBERTa's relatives."""
    after_padding = family is not None and family.positions == AFTER_PADDING
    counts = spec.default == "places" and after_padding
    return dataclasses.replace(spec, default=None) if counts else spec


def _is_bool(probes: Probes, name: str) -> bool:
    values = probes.of(name)
    return values is not None and values[0].dtype == np.bool_


def _name_axes(graph: OnnxGraph, probes: Probes) -> None:
    """Call the dynamic axes "batch" and "length", and drop inputs that nothing reads."""
    used = {name for node in graph.nodes for name in node.input}
    graph.inputs = [value for value in graph.inputs if value.name in used]
    names = dict(zip(probes.sizes("input_ids"), ("batch", "length")))
    for value in [*graph.inputs, *graph.results]:
        sizes = probes.sizes(value.name)
        if sizes is None:
            raise ModelError(f"output '{value.name}' changes its rank with the input's shape")
        if value in graph.results and probes.of(value.name)[0].dtype != np.float32:
            raise ModelError(f"output '{value.name}' is not float32", "export it in float32")
        dims = [
            size if isinstance(size, int) else names.get(size, f"{value.name}_{axis}")
            for axis, size in enumerate(sizes)
        ]
        kind = value.type.tensor_type.elem_type or onnx.TensorProto.FLOAT
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, dims))


def _unread(inputs: tuple[InputSpec, ...], read: set[str]) -> str:
    names = ", ".join(spec.name for spec in inputs if spec.name not in read)
    return f"{names} changes nothing in the quantized file (was it calibrated without padding?)"


def _check(
    original: Fed,
    normalized: Path,
    lifted: onnx.ModelProto | None,
    rounded: tuple[str, float, str],
    inputs: tuple[InputSpec, ...],
    shapes: tuple[tuple[int, int], ...],
    batch: int | None,
    length: int | None,
) -> tuple[str, reach.Reach]:
    """Say how far the result is from the original, and how far its outputs see; raise
    NumericMismatchError for too far.

    A model that rounds (`lifted`: with its quantization lifted and all in float32, otherwise as it
    was) is compared twice: in float32 alone, closely, and as it is, where one rounding more or less
    moves the result by the step of an 8-bit number. `rounded` says how it rounds, how far it may be
    then, and what to do where it is further.
    """
    feeds = [sample(inputs, *shape, padding_id=1, seed=seed) for seed, shape in enumerate(shapes)]
    after = session(normalized)
    reach.check_axes(after.get_outputs())
    names = [output.name for output in after.get_outputs()]
    try:
        if lifted is not None:
            results = []
            for model in (lifted, onnx.load(normalized)):
                with opened(drop_marks(model)) as runner:
                    results.append(_results(runner, names, feeds))
            _refuse(
                _compare(*results, feeds)[0], TOLERANCE, "the original, both in floats,", _FAULT
            )
            with opened(drop_marks(onnx.load(normalized))) as runner:
                seen = reach.look(runner, inputs, batch, length)
        else:
            seen = reach.look(after, inputs, batch, length)
        want = _results(original, names, feeds)
        worst, relative = _compare(want, _results(after, names, feeds), feeds)
        if lifted is None:
            _refuse(worst, room(TOLERANCE, worst, normalized, feeds), "the original", _FAULT)
            return f"differs from the original by at most {worst:.2g} on real tokens", seen
        kind, tolerance, hint = rounded
        what = f"the {kind} original, relative to its magnitude,"
        _refuse(relative, tolerance, what, hint)
    except NumericMismatchError:
        normalized.unlink()
        raise
    return (
        f"differs from the {kind} original by {relative:.2g} of its magnitude, and by at most"
        f" {worst:.2g}, on real tokens"
    ), seen


def _refuse(difference: float, tolerance: float, what: str, hint: str) -> None:
    if not difference <= tolerance:
        raise NumericMismatchError(
            f"the normalised model differs from {what} by {difference:.3g}, more than"
            f" {tolerance:g}",
            hint,
        )


def _results(
    runner: Any, names: list[str], feeds: list[dict[str, np.ndarray]]
) -> list[list[np.ndarray]]:
    """Run the batches; an input that the other model does not have is what it is by default."""
    fed = runner if isinstance(runner, Fed) else Fed(runner, {})
    return [fed.run(names, feed) for feed in feeds]


def _compare(
    want: list[list[np.ndarray]], got: list[list[np.ndarray]], feeds: list[dict[str, np.ndarray]]
) -> tuple[float, float]:
    """Return the largest difference, and the norm of all differences by the norm of `want`."""
    worst, squares = 0.0, np.zeros(2)
    for before, after, feed in zip(want, got, feeds):
        mask = feed.get("attention_mask", np.ones_like(feed["input_ids"]))
        for actual, expected in zip(after, before):
            worst = max(worst, largest_difference(actual, expected, mask))
            squares += squared_norms(actual, expected, mask)
    return worst, float(np.sqrt(squares[0] / max(squares[1], 1e-30)))


def _head(
    outputs: tuple[str, ...], probes: Probes, inputs: tuple[InputSpec, ...], wanted: str | None
) -> str:
    """Tell the head from the outputs' names and ranks; `wanted` names one that they do not."""
    head = UNKNOWN
    if "sentence_embedding" in outputs:
        head = "embedding"
    elif "last_hidden_state" in outputs:
        head = "encoder"
    elif {"start_logits", "end_logits"} <= set(outputs):
        head = "question-answering"
    elif "logits" in outputs:
        sizes = probes.sizes("logits") or []
        of_tokens = "masked-lm" if sizes[-1] == inputs[0].below else "token-classification"
        head = "sequence-classification" if len(sizes) == 2 else of_tokens
    if wanted and head not in (UNKNOWN, wanted):
        raise UsageError(
            f"the ONNX file's outputs ({', '.join(outputs)}) are those of the head '{head}',"
            f" not '{wanted}'"
        )
    return wanted or head
