"""Opens libraries that make vectors of texts, Bertile among them, each as its own pages say.

An opened engine is a function: a str gives its vector (d,), a list of them an array (n, d) float32.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bertile.base import quiet
from bertile.base.errors import MissingExtraError, ModelError, require
from bertile.base.progress import Progress
from bertile.bench import llamacpp, peer_models, peers
from bertile.bench.engines import Engine, LeftOut
from bertile.bench.peers import Opener
from bertile.config import Config
from bertile.export import cached, files
from bertile.studies import peer_layers

Encode = Callable[[str | list[str]], np.ndarray]
Prepare = Callable[[Engine, Config, Path, Progress], Path]

BATCH = 32  # texts a call: sentence-transformers' default, and the best of FastEmbed's here
LONGEST = 256  # tokens, where a directory of sentence-transformers does not say


def prepared(
    engine: Engine, config: Config, work: Path, progress: Progress
) -> tuple[Engine, Opener]:
    """The engine with what it opens, made in `work` or in the cache (a bundle, a directory or a
    file), and what opens it in a process of its own.

    Raises LeftOut for a peer that cannot be had here, or does not compute in the precision.
    """
    precisions, prepare, _ = KINDS[engine.kind]
    if engine.precision not in precisions:
        raise LeftOut(f"{engine.name} is left out: it computes in {', '.join(precisions)} here")
    try:
        path = prepare(engine, config, work, progress)
        packages = peer_layers.layer(engine.kind, config.cache_dir, progress)
    except (ModelError, MissingExtraError) as error:
        raise LeftOut(f"{engine.name} is left out: {error}") from error
    ready = dataclasses.replace(engine, source=dataclasses.replace(engine.source, bundle=path))
    return ready, partial(open_engine, packages)


def open_engine(packages: Path | None, engine: Engine, threads: int) -> tuple[Encode, str]:
    """A prepared engine, and how a table calls it; `packages` are seen before all others.

    Raises LeftOut for a peer that does not open, whatever its packages say.
    """
    if packages is not None:
        peer_layers.enter(packages)
    _, _, opener = KINDS[engine.kind]
    try:
        with quiet.quiet():
            return opener(engine, threads)
    except Exception as error:
        if engine.kind == "bertile" or isinstance(error, LeftOut):
            raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LeftOut(f"{engine.name} is left out: {first_line}") from error


def _bundle(engine: Engine, config: Config, work: Path, progress: Progress) -> Path:
    from bertile import driver

    path = work / f"bundle-{engine.precision}"
    asked = dataclasses.replace(config, precision=engine.precision)
    driver.compile(engine.source.model, path, asked, progress)
    return path


def _directory(engine: Engine, config: Config, work: Path, progress: Progress) -> Path:
    return files.find_directory(engine.source.model)


def _with_file(kind: str, folder: str, name: str) -> Prepare:
    """A copy of the model's directory, in links, with the form of it that `kind` reads."""

    def prepare(engine: Engine, config: Config, work: Path, progress: Progress) -> Path:
        source = files.find_directory(engine.source.model)
        form = _form(kind, "encoder", engine, config, progress)
        path = work / f"{engine.kind}-{engine.precision}"
        path.mkdir()
        for file in source.iterdir():
            (path / file.name).symlink_to(file)
        place = path / folder
        place.mkdir(exist_ok=True)
        if form.suffix == ".onnx" and name.endswith(".xml"):
            (openvino,) = require("bench", "openvino")
            openvino.save_model(
                openvino.Core().read_model(form), place / name, compress_to_fp16=False
            )
            return path
        (place / name).symlink_to(form)
        if name.endswith(".xml"):
            (place / name).with_suffix(".bin").symlink_to(form.with_suffix(".bin"))
        return path

    return prepare


def _fastembed_directory(engine: Engine, config: Config, work: Path, progress: Progress) -> Path:
    """What FastEmbed reads: the model, its tokenizer, and how long a text may be."""
    source = files.find_directory(engine.source.model)
    path = work / f"{engine.kind}-{engine.precision}"
    path.mkdir()
    for name in ("tokenizer.json", "config.json", "special_tokens_map.json"):
        (path / name).symlink_to(source / name)
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["model_max_length"] = settings["max_length"] = _longest(source)
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (path / "model.onnx").symlink_to(_form("onnxruntime", "encoder", engine, config, progress))
    return path


def _gguf(engine: Engine, config: Config, work: Path, progress: Progress) -> Path:
    return _form("llamacpp", "embedding", engine, config, progress)


def _form(kind: str, head: str, engine: Engine, config: Config, progress: Progress) -> Path:
    """The model file of `kind` in the engine's precision, from the cache where it is there."""
    asked = dataclasses.replace(config, head=head)
    exported = cached.export_cached(engine.source.model, asked, progress)
    path = peer_models.prepared(
        kind, engine.precision, exported.onnx_path, exported, config.cache_dir, progress
    )
    return Path(str(path)).resolve()


def _longest(directory: Path) -> int:
    settings = directory / "sentence_bert_config.json"
    if not settings.is_file():
        return LONGEST
    return int(json.loads(settings.read_text(encoding="utf-8")).get("max_seq_length", LONGEST))


def _bertile(engine: Engine, threads: int) -> tuple[Encode, str]:
    import bertile

    model = bertile.open(engine.source.bundle, threads)
    return model.encode, f"Bertile {bertile.__version__}"


def _sentence_transformers(engine: Engine, threads: int) -> tuple[Encode, str]:
    torch, library = require("demo", "torch", "sentence_transformers")
    torch.set_num_threads(threads)
    backend = engine.kind.removeprefix("st-")
    model = library.SentenceTransformer(
        str(engine.source.bundle), device="cpu", backend=backend, **_backend(engine, threads)
    )
    if backend == "torch" and engine.precision == "int8":
        (quantization,) = require("bench", "torchao.quantization")
        kind = quantization.Int8DynamicActivationInt8WeightConfig()
        quantization.quantize_(model[0].model, kind)
    elif backend == "torch" and engine.precision == "bf16":
        model = model.to(torch.bfloat16)

    def encode(texts: str | list[str]) -> np.ndarray:
        return model.encode(texts, batch_size=BATCH, show_progress_bar=False)

    return encode, f"sentence-transformers {library.__version__} ({_behind(backend, engine)})"


def _backend(engine: Engine, threads: int) -> dict[str, Any]:
    """What makes a backend use so many threads, in the engine's precision; torch has been told."""
    backend = engine.kind.removeprefix("st-")
    if backend == "onnx":
        (ort,) = require("compile", "onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        return {
            "model_kwargs": {"provider": "CPUExecutionProvider", "session_options": options},
        }
    if backend == "openvino":
        return {"model_kwargs": {"ov_config": peers.openvino_settings(engine, threads)}}
    return {}


def _behind(backend: str, engine: Engine) -> str:
    if backend == "onnx":
        return f"ONNX Runtime {require('compile', 'onnxruntime')[0].__version__}"
    if backend == "openvino":
        version = require("bench", "openvino")[0].__version__
        return f"OpenVINO {version.partition('-')[0]}"
    quantizer = ", torchao" if engine.precision == "int8" else ""
    return f"PyTorch {require('export', 'torch')[0].__version__.partition('+')[0]}{quantizer}"


def _session(engine: Engine, threads: int) -> tuple[Encode, str]:
    """ONNX Runtime or OpenVINO behind the package tokenizers, with nothing between: texts by their
    lengths, in batches that are padded to the longest.
    """
    tokenizer, vectors_of, version = session(engine, threads)

    def encode(texts: str | list[str]) -> np.ndarray:
        if isinstance(texts, str):
            return vectors([texts])[0]
        order = np.argsort([-len(text) for text in texts], kind="stable")
        pieces = [
            vectors([texts[index] for index in order[first : first + BATCH]])
            for first in range(0, len(order), BATCH)
        ]
        answer = np.empty((len(texts), pieces[0].shape[1]), np.float32)
        answer[order] = np.concatenate(pieces)
        return answer

    def vectors(texts: list[str]) -> np.ndarray:
        return vectors_of(tokenizer.encode_batch(texts))

    return encode, f"{version} behind tokenizers"


def session(engine: Engine, threads: int) -> tuple[Any, Callable[[Sequence[Any]], np.ndarray], str]:
    """A prepared engine's tokenizer, which cuts and does not pad, what makes vectors (n, d) of n of
    its encodings, padded to the longest, and how a table calls the engine.
    """
    infer, version = _infer_of(engine, threads)
    fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}

    def vectors(encodings: Sequence[Any]) -> np.ndarray:
        shape = len(encodings), max(map(len, encodings))
        inputs = {name: np.zeros(shape, np.int64) for name in fields}
        for name, array in inputs.items():  # the id of padding makes no difference behind a mask
            for row, encoding in enumerate(encodings):
                array[row, : len(encoding)] = getattr(encoding, fields[name])
        return infer(inputs)[0]

    return _tokenizer(engine), vectors, version


def _infer_of(engine: Engine, threads: int) -> tuple[Any, str]:
    from bertile.bench.peers import OPENERS

    source = dataclasses.replace(engine.source, onnx=engine.source.bundle)
    return OPENERS[engine.kind](dataclasses.replace(engine, source=source), threads)


def _fastembed(engine: Engine, threads: int) -> tuple[Encode, str]:
    import fastembed
    from fastembed.common.model_description import ModelSource, PoolingType

    name = f"local/{engine.precision}"
    fastembed.TextEmbedding.add_custom_model(
        model=name,
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="local/model"),
        dim=int(_config(engine)["hidden_size"]),
        model_file="model.onnx",
    )
    model = fastembed.TextEmbedding(
        name, threads=threads, specific_model_path=str(engine.source.bundle)
    )

    def encode(texts: str | list[str]) -> np.ndarray:
        vectors = np.stack(list(model.embed(texts, batch_size=BATCH)))
        return vectors[0] if isinstance(texts, str) else vectors

    return encode, f"FastEmbed {fastembed.__version__}"


def _llamacpp(engine: Engine, threads: int) -> tuple[Encode, str]:
    """llama.cpp behind the package tokenizers: a text after the other, without padding."""
    source = dataclasses.replace(engine.source, onnx=engine.source.bundle)
    infer, version = llamacpp.open_model(dataclasses.replace(engine, source=source), threads)
    tokenizer = _tokenizer(engine)

    def vector(encoding: Any) -> np.ndarray:
        return infer({"input_ids": np.array([encoding.ids])})[0][0]

    def encode(texts: str | list[str]) -> np.ndarray:
        if isinstance(texts, str):
            return vector(tokenizer.encode(texts))
        return np.stack([vector(encoding) for encoding in tokenizer.encode_batch(texts)])

    return encode, f"{version} behind tokenizers"


def _tokenizer(engine: Engine) -> Any:
    """The tokenizer of the model's directory, which cuts as sentence-transformers does."""
    (tokenizers,) = require("run", "tokenizers")
    directory = files.find_directory(engine.source.model)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(_longest(directory))
    return tokenizer


def _config(engine: Engine) -> dict[str, Any]:
    return json.loads((engine.source.bundle / "config.json").read_text(encoding="utf-8"))


def _session_form(engine: Engine, config: Config, work: Path, progress: Progress) -> Path:
    return _form(engine.kind, "embedding", engine, config, progress)


# Of each kind the precisions that it computes in, what makes the form that it opens, and what opens
# that.
KINDS: dict[str, tuple[tuple[str, ...], Prepare, Opener]] = {
    "bertile": (("fp32", "bf16", "int8"), _bundle, _bertile),
    "st-torch": (("fp32", "bf16", "int8"), _directory, _sentence_transformers),
    "st-onnx": (
        ("fp32", "int8"),
        _with_file("onnxruntime", "onnx", "model.onnx"),
        _sentence_transformers,
    ),
    "st-openvino": (
        ("fp32", "int8"),
        _with_file("openvino", "openvino", "openvino_model.xml"),
        _sentence_transformers,
    ),
    "onnxruntime": (("fp32", "int8"), _session_form, _session),
    "openvino": (("fp32", "bf16", "int8"), _session_form, _session),
    "fastembed": (("fp32", "int8"), _fastembed_directory, _fastembed),
    "llamacpp": (("fp32", "int8"), _gguf, _llamacpp),
}
