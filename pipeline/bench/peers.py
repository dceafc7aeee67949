"""Opens a model in each engine, as a function that runs it."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable
from typing import Any

import numpy as np

from bertile.base.errors import require
from bertile.bench.engines import Arrays, Engine
from bertile.loading.exits import leaving_at

COMPILED_SIZES = 256  # of requests, that torch.compile makes code for

Infer = Callable[[Arrays], list[np.ndarray]]
# Opens an engine for so many threads: a function that runs it, and how a table calls it.
Opener = Callable[[Engine, int], tuple[Any, str]]


def threads_of(engine: Engine, threads: int) -> int:
    """Of `threads` in all, those that one call of the engine may use."""
    return max(1, threads // engine.streams)


def _bertile(engine: Engine, threads: int) -> tuple[Infer, str]:
    import bertile
    from bertile import loader

    model = loader.load(engine.source.bundle, threads_of(engine, threads), streams=engine.streams)
    return Loaded(model), f"Bertile {bertile.__version__}"


class Loaded:
    """Runs a bundle as a whole, as its peers do, until it is told where texts leave early."""

    def __init__(self, model: Any) -> None:
        self._model = model
        if "exits" in model.manifest:
            self._own, model.exit_thresholds = model.exit_thresholds, None

    def __call__(self, inputs: Arrays) -> list[np.ndarray]:
        return list(self._model(**inputs).values())

    def leave_at(self, stage: int | None) -> None:
        """Let every text leave at a stage of the model, counted from 0; None: where it is as sure
        as the bundle was compiled for.
        """
        exits = self._model.manifest["exits"]
        self._model.exit_thresholds = self._own if stage is None else leaving_at(stage, exits)


def _onnxruntime(engine: Engine, threads: int) -> tuple[Infer, str]:
    (ort,) = require("compile", "onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # the thread that calls is one of them: any number of callers may have a call in one session
    options.intra_op_num_threads = threads_of(engine, threads)
    options.inter_op_num_threads = 1
    path = str(engine.source.onnx)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs), f"ONNX Runtime {ort.__version__}"


def _openvino(engine: Engine, threads: int) -> tuple[Infer, str]:
    (openvino,) = require("bench", "openvino")
    config = openvino_settings(engine, threads)
    model = openvino.Core().compile_model(str(engine.source.onnx), "CPU", config)
    idle: queue.SimpleQueue[Any] = queue.SimpleQueue()  # a request answers one caller at a time

    def infer(inputs: Arrays) -> list[np.ndarray]:
        try:
            request = idle.get_nowait()
        except queue.Empty:
            request = model.create_infer_request()
        results = request.infer(inputs, share_inputs=True)
        answer = [results[port] for port in model.outputs]
        idle.put(request)
        return answer

    return infer, f"OpenVINO {openvino.__version__.partition('-')[0]}"


def openvino_settings(engine: Engine, threads: int) -> dict[str, Any]:
    """What OpenVINO is told of threads and streams, and of the precision that it computes in."""
    config: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if engine.streams > 1:
        config |= {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": engine.streams}
    # Given, since on a CPU with bf16 a float32 model would otherwise compute in that; what an int8
    # model leaves in floating point is OpenVINO's to choose.
    hint = {"fp32": "f32", "bf16": "bf16"}.get(engine.precision)
    return config | ({"INFERENCE_PRECISION_HINT": hint} if hint else {})


def _torch(engine: Engine, threads: int) -> tuple[Infer, str]:
    torch, _ = require("export", "torch", "transformers")
    from bertile.base import quiet
    from bertile.export import checkpoints
    from bertile.export.torch_module import Embedding, with_boxes
    from bertile.families import table

    compiled = engine.kind == "torch-compile"
    source = engine.source
    torch.set_num_threads(threads_of(engine, threads))
    torch.set_num_interop_threads(1)
    checkpoint = checkpoints.load(source.model, source.head, allow_unused=True)
    model, embedding = checkpoint.model, checkpoint.chain and Embedding(checkpoint.chain).eval()
    with quiet.quiet(), contextlib.suppress(ValueError, ImportError):
        model.set_attn_implementation("sdpa")  # a family without it keeps what it has
    optional = table.named(checkpoint.family).optional_pooler
    if source.head == "embedding" and optional and hasattr(model, "pooler"):
        model.pooler = None  # nobody reads it
    with quiet.quiet():
        convert = _by_torchao if compiled and engine.precision == "int8" else _converted
        model = convert(torch, model, engine.precision)
    if compiled:
        model = _compiled(torch, model)

    def infer(inputs: Arrays) -> list[np.ndarray]:
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
            outputs = model(**with_boxes(tensors))
            if embedding is None:
                return [outputs[name].float().numpy() for name in source.outputs]
            return [embedding(outputs, tensors["attention_mask"].float()).numpy()]

    compiler = ", compiled" if compiled else ""
    return infer, f"PyTorch {torch.__version__.partition('+')[0]}{compiler}"


def _converted(torch: Any, model: Any, precision: str) -> Any:
    """The model in that precision: int8 is dynamic quantization of every linear layer."""
    if precision == "bf16":
        return model.to(torch.bfloat16)
    if precision == "int8":
        quantization = torch.ao.quantization
        return quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    return model


def _by_torchao(torch: Any, model: Any, precision: str) -> Any:
    """int8: weights per channel, activations per token as they come."""
    (quantization,) = require("bench", "torchao.quantization")
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


def _compiled(torch: Any, model: Any) -> Any:
    """The model by torch.compile, anew for each size of request; none falls back in silence."""
    from torch._dynamo import config as tracing
    from torch._inductor import config as inductor

    inductor.freezing = True  # weights are constants: their layouts and sums are made once
    tracing.recompile_limit = tracing.accumulated_recompile_limit = COMPILED_SIZES
    tracing.fail_on_recompile_limit_hit = True
    return torch.compile(model, dynamic=False)


def _llamacpp(engine: Engine, threads: int) -> tuple[Infer, str]:
    from bertile.bench import llamacpp

    return llamacpp.open_model(engine, threads_of(engine, threads))


OPENERS: dict[str, Opener] = {
    "bertile": _bertile,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "torch": _torch,
    "torch-compile": _torch,
    "llamacpp": _llamacpp,
}
