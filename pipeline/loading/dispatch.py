"""Loads a bundle with the model for its kind of machine, a CPU or a GPU."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np

from bertile.loading.errors import BundleError, PlatformError
from bertile.loading.exits import thresholds
from bertile.loading.files import check_files
from bertile.loading.interface import check_interface, interface
from bertile.loading.manifest import CUDA, LIBRARY, WEIGHTS, read_manifest
from bertile.loading.model import Model
from bertile.loading.platform import check_platform
from bertile.loading.pool import outside
from bertile.loading.runtime import open_runtime
from bertile.loading.threads import stream_count, thread_count
from bertile.loading.tvm_abi import Object, Runtime
from bertile.loading.weights import Place, check_ids, described, map_tensors


def load(
    directory: str | os.PathLike[str],
    threads: int | None = None,
    *,
    verify: bool = True,
    device: int = 0,
    streams: int | None = None,
    exit_threshold: float | Sequence[float] | None = None,
) -> Model:
    """Load the bundle in `directory`; one for a GPU gives a `cuda_loader.Model`.

    `threads` is how many cores one call may use (default: every core this process may run on), or
    `device` the number of the GPU; `verify` compares the hash of every file with the manifest.
    `streams` is how many calls run at once (default: one; several on a GPU), each on `threads`
    cores and with buffers of its own: two of one thread answer more short requests a second than
    one of two. `exit_threshold` is the confidence above which a text leaves at an early head, for
    all heads or for each (default: what the bundle was compiled with); 1 lets none leave.
    Raises BundleError for a damaged bundle, PlatformError for one that this machine cannot run,
    InputError for a wrong `threads`, `streams`, `device` or `exit_threshold`.
    """
    root = Path(directory)
    manifest = read_manifest(root)
    limits = thresholds(exit_threshold, manifest.get("exits"))
    if manifest["target"]["arch"] == CUDA:
        chosen = {} if streams is None else {"streams": streams}
        return _cuda_loader().load(root, device, verify=verify, **chosen)
    check_platform(manifest["target"])
    count = thread_count(threads)
    files = check_files(root, manifest["files"], verify)
    data, places = map_tensors(files[WEIGHTS], manifest["params"])
    check_ids(manifest, places)
    with outside:
        runtime = open_runtime(root, manifest["files"])
        params = _tensors(runtime, data, places)
        model = Model(
            runtime, manifest, files[LIBRARY], params, count, stream_count(streams), limits
        )
    wanted = interface(manifest, described(manifest["params"], places))
    try:
        check_interface(model.interface, wanted, files[LIBRARY])
    except BundleError:
        model.close()
        raise
    again = {"verify": verify, "streams": streams, "exit_threshold": exit_threshold}
    model.loaded_by = functools.partial(load, root.absolute(), threads, **again)
    return model


def _tensors(runtime: Runtime, data: np.ndarray, places: list[Place]) -> list[Object]:
    """Return the tensors of a safetensors file, in place: mapped, shared, never copied."""
    return [
        runtime.tensor_at(data[place.begin : place.end], place.shape, place.code, place.bits)
        for place in places
    ]


def _cuda_loader() -> ModuleType:
    """The module for GPUs: in a bundle the file beside this one, which shares its errors."""
    if __package__:
        from bertile.loading.cuda import model

        return model
    if "cuda_loader" not in sys.modules:
        sys.modules.setdefault("loader", sys.modules[__name__])  # `python loader.py` is __main__
        path = Path(__file__).with_name("cuda_loader.py")
        if not path.is_file():
            raise PlatformError(
                f"the bundle is for a GPU, and {path} is missing", "copy it beside loader.py"
            )
        spec = spec_from_file_location("cuda_loader", path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["cuda_loader"] = module
    return sys.modules["cuda_loader"]
