"""Makes the form of a model that a peer's own documentation recommends for a precision."""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from bertile.base import cache
from bertile.base.errors import BertileError, ModelError, require
from bertile.base.fingerprint import hash_path
from bertile.base.progress import Progress
from bertile.bench import llamacpp
from bertile.evaluation.sentences import sentences
from bertile.onnx.exported import ExportedModel
from bertile.onnx.samples import sample, session
from bertile.quantize import calibration

CALIBRATION_SAMPLES = 300  # NNCF's own default
RANDOM_LENGTH = 64
FLOAT = 1  # onnx.TensorProto.FLOAT
LONGEST_REASON = 200  # characters of what an engine says
INT8_ACTIVATIONS = 4  # what MatMulNBits calls an accuracy level
TRY_LENGTH, TRY_CALLS = 128, 9  # by which the fastest of several forms is told

Make = Callable[[Path, ExportedModel, Path], None]


def prepared(
    kind: str,
    precision: str,
    onnx: Path | None,
    exported: ExportedModel,
    cache_dir: str | None,
    progress: Progress,
) -> Path | None:
    """The file that engine `kind` opens for `precision`: `onnx` itself where it takes that.

    `exported` tells the inputs and has the tokenizer for calibration. Works in a process of its
    own, since quantizers leave gigabytes and threads behind.
    """
    if onnx is None or (kind, precision) not in FORMS:
        return onnx
    name, _ = FORMS[kind, precision]
    packages = [_version(package) for package in ("onnxruntime", "openvino", "nncf", "gguf")]
    key = cache.key("bench.peer_models", kind, precision, hash_path(onnx), packages)

    def make(directory: Path) -> None:
        progress.status(f"bench     {kind}'s model in {precision}")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                pool.submit(_make, kind, precision, onnx, exported, directory / name).result()
            except BrokenProcessPool as error:
                raise BertileError(f"the process that makes {kind}'s model crashed") from error
            except BertileError:
                raise
            except Exception as error:  # of the engine's own tools: any
                reason = str(error).partition("\n")[0][:LONGEST_REASON]
                raise ModelError(f"{kind} cannot make its {precision} form: {reason}") from error

    directory, _ = cache.Cache(cache_dir).get_or_make(key, make)
    return directory / name


def _make(kind: str, precision: str, onnx: Path, exported: ExportedModel, target: Path) -> None:
    with _quiet():
        FORMS[kind, precision][1](onnx, exported, target)


def _onnxruntime_int8(onnx: Path, exported: ExportedModel, target: Path) -> None:
    """Quantized dynamically: weights s8 per channel, activations u8."""
    (quantization,) = require("compile", "onnxruntime.quantization")

    def quantize(source: Path, quantized: Path) -> None:
        quantization.quantize_dynamic(
            source,
            quantized,
            per_channel=True,
            reduce_range=False,
            weight_type=quantization.QuantType.QInt8,
            # behind its own fused operators it cannot tell the type of a tensor
            extra_options={"DefaultTensorType": FLOAT},
        )

    _fastest_of_onnxruntime(onnx, exported, target, quantize)


def _onnxruntime_int4(onnx: Path, exported: ExportedModel, target: Path) -> None:
    """MatMulNBits: weights in 4 bits by blocks of 32 inputs, activations in 8 as they come."""
    (quantizers,) = require("compile", "onnxruntime.quantization.matmul_nbits_quantizer")

    def quantize(source: Path, quantized: Path) -> None:
        quantizer = quantizers.MatMulNBitsQuantizer(
            str(source), bits=4, block_size=32, is_symmetric=True, accuracy_level=INT8_ACTIVATIONS
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(quantized))

    _fastest_of_onnxruntime(onnx, exported, target, quantize)


def _fastest_of_onnxruntime(
    onnx: Path, exported: ExportedModel, target: Path, quantize: Callable[[Path, Path], None]
) -> None:
    """Quantize the model as it is, with the fusions of ONNX Runtime's optimizer for transformers,
    and with all of them but attention's, and keep what is fastest.
    """
    require("bench", "onnxruntime", "onnx", "sympy")
    from onnxruntime.transformers import fusion_options, optimizer

    from bertile.onnx import legacy as onnx_legacy

    legacy = target.with_name("legacy.onnx")
    onnx_legacy.rewrite(onnx, legacy)
    sources = [legacy]
    for attention in (True, False):
        options = fusion_options.FusionOptions("bert")
        options.enable_attention = attention
        sources.append(target.with_name(f"fused{attention:d}.onnx"))
        # heads and width 0: it finds them in the graph
        optimizer.optimize_model(
            str(legacy),
            model_type="bert",
            num_heads=0,
            hidden_size=0,
            opt_level=0,
            optimization_options=options,
        ).save_model_to_file(str(sources[-1]))
    by_milliseconds = {}
    for source in sources:
        quantized = source.with_suffix(".quantized.onnx")
        quantize(source, quantized)
        by_milliseconds[_milliseconds(quantized, exported)] = quantized
    by_milliseconds[min(by_milliseconds)].rename(target)
    for path in target.parent.glob("*.onnx"):
        if path != target:
            path.unlink()


def _llamacpp(precision: str) -> Make:
    def make(onnx: Path, exported: ExportedModel, target: Path) -> None:
        llamacpp.write(precision, exported, target)

    return make


def _openvino_int8(onnx: Path, exported: ExportedModel, target: Path) -> None:
    """NNCF's post-training quantization for transformers, calibrated."""
    openvino, nncf = require("bench", "openvino", "nncf")
    dataset = nncf.Dataset(_samples(exported))
    quantized = nncf.quantize(
        openvino.Core().read_model(onnx),
        dataset,
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=CALIBRATION_SAMPLES,
    )
    openvino.save_model(quantized, target, compress_to_fp16=False)


def _deepsparse_fp32(onnx: Path, exported: ExportedModel, target: Path) -> None:
    from bertile.onnx import legacy as onnx_legacy

    onnx_legacy.rewrite(onnx, target)


def _deepsparse_int8(onnx: Path, exported: ExportedModel, target: Path) -> None:
    """ONNX Runtime's static quantization in QOperator form: every product, attention's too, takes
    bytes and gives bytes. With ranges per channel DeepSparse leaves products to its fallback.
    """
    (quantization,) = require("compile", "onnxruntime.quantization")
    from bertile.onnx import legacy as onnx_legacy

    legacy = target.with_name("legacy.onnx")
    onnx_legacy.rewrite(onnx, legacy)
    quantization.quantize_static(
        legacy,
        target,
        _Reader(_samples(exported)),
        quant_format=quantization.QuantFormat.QOperator,
        op_types_to_quantize=["MatMul", "Gemm"],
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    legacy.unlink()


def _samples(exported: ExportedModel) -> list[dict[str, np.ndarray]]:
    """Single sequences to calibrate on: sentences, or random ids where there is no tokenizer."""
    if (exported.directory / "tokenizer.json").is_file():
        rows = calibration.tokenized(sentences(CALIBRATION_SAMPLES), exported)
        return [sample for row in rows for sample in calibration.batches([row], exported)]
    length = min(exported.length or RANDOM_LENGTH, exported.max_length or RANDOM_LENGTH)
    seeds = range(CALIBRATION_SAMPLES)
    return [sample(exported.inputs, exported.batch or 1, length, 0, seed) for seed in seeds]


class _Reader:
    """What ONNX Runtime's calibration takes samples from."""

    def __init__(self, arrays: list[dict[str, np.ndarray]]) -> None:
        self._rest = iter(arrays)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._rest, None)


def _milliseconds(path: Path, exported: ExportedModel) -> float:
    """The fastest of some calls: what else the machine does only adds to a call."""
    runner = session(path)
    length = min(exported.length or TRY_LENGTH, exported.max_length or TRY_LENGTH)
    inputs = sample(exported.inputs, exported.batch or 1, length, padding_id=-1)
    times = []
    for _ in range(TRY_CALLS):
        began = time.perf_counter()
        runner.run(None, inputs)
        times.append(time.perf_counter() - began)
    return min(times) * 1e3


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Quantizers warn of what they were told to do, and draw bars on stdout."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


FORMS: dict[tuple[str, str], tuple[str, Make]] = {
    ("onnxruntime", "int8"): ("model.onnx", _onnxruntime_int8),
    ("onnxruntime", "int4"): ("model.onnx", _onnxruntime_int4),
    ("openvino", "int8"): ("model.xml", _openvino_int8),
    ("deepsparse", "fp32"): ("model.onnx", _deepsparse_fp32),
    ("deepsparse", "int8"): ("model.onnx", _deepsparse_int8),
    **{
        ("llamacpp", precision): (llamacpp.NAME, _llamacpp(precision))
        for precision in llamacpp.TYPES
    },
}
