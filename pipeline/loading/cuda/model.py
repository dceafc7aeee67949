"""Loads a bundle onto a GPU, and answers requests there, several at once."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bertile.loading.about import Bundled
from bertile.loading.again import load_again
from bertile.loading.batch import Pass
from bertile.loading.blocks import BLOCK_TOKENS
from bertile.loading.cuda.borrowed import borrow_all, on_device
from bertile.loading.cuda.code import Code
from bertile.loading.cuda.device_array import Results, stream_handle
from bertile.loading.cuda.driver import open_driver
from bertile.loading.cuda.gpu import Gpu, OutOfMemory
from bertile.loading.cuda.graph import Graph
from bertile.loading.cuda.plan import PLAN, Plan, read_plan
from bertile.loading.cuda.request import PASS_BLOCKS, Request
from bertile.loading.cuda.workspace import Workspace
from bertile.loading.errors import BertileError, InputError, PlatformError
from bertile.loading.files import check_files
from bertile.loading.inputs import check_length
from bertile.loading.manifest import CUDA, WEIGHTS, read_manifest
from bertile.loading.padding import check_outputs, cut

STREAMS = 4  # requests at once; more wait for their turn


def load(
    directory: str | os.PathLike[str],
    device: int = 0,
    driver: str | None = None,
    *,
    verify: bool = True,
    streams: int = STREAMS,
) -> Model:
    """Load the bundle in `directory` onto the GPU of number `device`.

    `driver` is the path of the driver's library (default: libcuda.so.1), `streams` how many
    requests may run at once, each with memory of its own for activations. Raises BundleError for a
    damaged bundle, PlatformError for a machine that cannot run it.
    """
    root = Path(directory)
    manifest = read_manifest(root)
    target = manifest["target"]
    if target["arch"] != CUDA:
        raise PlatformError(
            f"the bundle is for {target['arch']}, not for a GPU", "load it with bertile.load"
        )
    weights = {WEIGHTS: manifest["files"][WEIGHTS]}
    others = {name: spec for name, spec in manifest["files"].items() if name not in weights}
    with ThreadPoolExecutor(1) as pool:  # the hash of the weights while the device gets ready
        checked = pool.submit(check_files, root, weights, verify)
        gpu = Gpu(open_driver(driver), device)
        files = check_files(root, others, verify)
        files.update(check_files(root, weights, verify=False))
        model = Model(gpu, manifest, read_plan(files[PLAN], manifest), streams)
        try:
            try:
                model._start(files)
            finally:  # changed weights explain more than what came of them
                checked.result()
        except BaseException:
            model.close()
            raise
    model.loaded_by = functools.partial(
        load, root.absolute(), device, driver, verify=verify, streams=streams
    )
    return model


class Model(Bundled):
    """A bundle on a GPU. Any number of threads may call it; up to `streams` run at once.

    Each shape of a request is one CUDA graph, made when the shape is first seen.
    """

    def __init__(
        self, gpu: Gpu, manifest: dict[str, Any], plan: Plan, streams: int = STREAMS
    ) -> None:
        if type(streams) is not int or streams < 1:
            raise InputError(f"streams is {streams!r}", "give a whole number from 1")
        self.manifest, self.gpu = manifest, gpu
        self.inputs = tuple(spec["name"] for spec in manifest["inputs"])
        self.outputs = tuple(spec["name"] for spec in manifest["outputs"])
        self.max_length = manifest["model"]["max_length"]
        self.pass_blocks = PASS_BLOCKS  # of tokens; what is more takes several passes
        self.loaded_by = None
        self._plan, self._streams = plan, streams
        self._code: Code | None = None
        self._results = Results(gpu)
        self._turn = threading.Condition()
        self._idle: list[Workspace] = []
        self._workspaces = self._busy = 0
        self._closed = False

    def _start(self, files: Mapping[str, Path]) -> None:
        with self.gpu:
            self._code = Code(self.gpu, self.manifest, self._plan, files)

    def __call__(self, /, *, stream: Any = None, **inputs: Any) -> dict[str, Any]:
        """Run the model on arrays or nested lists of integers, each (batch, length).

        As for a model on a CPU, a missing attention_mask is all ones, missing token_type_ids are
        all zeros, and positions behind the last token of a sequence cost nothing and are zero in
        the outputs. Raises InputError for a wrong name, rank, type or shape, for ids that the model
        does not have and for too many tokens.

        Arrays that are on this GPU (torch, cupy: whatever exports DLPack) are read in place, and
        the outputs are DeviceArrays, without a copy and without waiting: all of it is put on
        `stream` (an integer, or an object of torch or cupy; default: the legacy default stream).
        What such ids hold is not looked at: they must be below the model's limits, the mask is
        applied, and positions behind the last token are computed like all others.
        """
        if any(on_device(value) for value in inputs.values()):
            return self._call_on_device(inputs, stream_handle(stream))
        request = self._request(inputs)
        pieces = [
            self._run(request, chosen, None if stream is None else stream_handle(stream))
            for chosen in request.passes
        ]
        return {
            spec["name"]: cut(
                spec["axes"], [piece[index] for piece in pieces], request.length, request.ends
            )
            for index, spec in enumerate(self.manifest["outputs"])
        }

    def time(
        self, *, repeats: int = 100, warm: int = 10, copies: bool = False, **inputs: Any
    ) -> np.ndarray:
        """Return how many milliseconds each of `repeats` runs on `inputs` takes on the GPU.

        Measured by an event before and one behind each launch of the graph, without waiting in
        between, after `warm` runs; with `copies` the graph also brings the inputs up and the
        outputs down. The inputs are arrays as for a call, of at most one pass.
        """
        request = self._request(inputs)
        if len(request.passes) > 1:
            raise InputError("the batch takes several passes", "time a smaller one")
        if type(repeats) is not int or repeats < 1 or type(warm) is not int or warm < 0:
            raise InputError("repeats or warm is no count", "give repeats from 1 and warm from 0")
        (chosen,) = request.passes
        kind = "full" if copies else "bare"
        with self._workspace(None, key := (kind, *chosen.room, len(chosen.table))) as at:
            graph = self._graph(at, key)
            request.fill(graph.up, chosen)
            if not copies:
                at.bring_up(graph.layout)
            return at.time(graph, repeats, warm)

    def close(self) -> None:
        """Give back weights, kernels and workspaces, once the calls under way have ended.

        A later call raises BertileError. DeviceArrays stay valid.
        """
        with self._turn:
            self._closed = True
            self._turn.notify_all()
            self._turn.wait_for(lambda: not self._busy)
            idle, self._idle = self._idle, []
            code, self._code = self._code, None
        for workspace in idle:
            workspace.close()
        self._results.close()
        if code is not None:
            code.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle or a copy is the directory, which is loaded again where it is opened."""
        return load_again(self.loaded_by, self.manifest, closed=self._closed)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def _place(self) -> str:
        return self.gpu.name

    def __del__(self):
        if getattr(self, "_turn", None) is not None and not sys.is_finalizing():
            self.close()

    def _request(self, inputs: dict) -> Request:
        return Request(inputs, self.manifest, self.max_length)

    def _run(self, request: Request, chosen: Pass, stream: int | None) -> list:
        key = ("full", *chosen.room, len(chosen.table))
        with self._workspace(stream, key) as at:
            graph = self._graph(at, key)
            request.fill(graph.up, chosen)
            at.launch(graph, at.stream if stream is None else stream)
            at.wait()
            outputs = [np.array(view) for view in graph.down]
        check_outputs(outputs, self.manifest["outputs"], chosen.room)
        return outputs

    def _call_on_device(self, inputs: dict, stream: int) -> dict:
        specs, static = self.manifest["inputs"], self.manifest["static"]
        borrowed = borrow_all(inputs, specs, self.gpu, stream)
        names = tuple(spec["name"] for spec in specs if spec["name"] in borrowed)
        batch, length = borrowed[names[0]].shape
        wanted = (static.get("batch") or batch, static.get("length") or length)
        if (batch, length) != wanted:
            raise InputError(f"the input is {(batch, length)}, this bundle takes exactly {wanted}")
        check_length(length, self.max_length)
        blocks = batch * -(-length // BLOCK_TOKENS)
        key = ("device", batch, length, blocks, names)
        with self._workspace(stream, key) as at:
            graph = self._graph(at, key)
            outputs = [self._results.take(array, stream) for array in graph.layout.outputs]
            graph.point(
                [borrowed[name].pointer if name in borrowed else None for name in self.inputs],
                [output.pointer for output in outputs],
            )
            at.launch(graph, stream)
        return dict(zip(self.outputs, outputs))

    def _graph(self, workspace: Workspace, key: tuple) -> Graph:
        """The workspace's graph; where memory is short, after the others gave theirs back."""
        try:
            return workspace.graph(key)
        except OutOfMemory:
            with self._turn:
                idle, self._idle = self._idle, []
                self._workspaces -= len(idle)
            for other in idle:
                other.close()
            self._results.clear()
            return workspace.graph(key)

    @contextlib.contextmanager
    def _workspace(self, stream: int | None, key: tuple):
        """Lend a workspace: one where nothing runs on another stream, and that has the graph."""
        with self._turn:
            self.gpu.check()
            self._turn.wait_for(
                lambda: self._closed or self._idle or self._workspaces < self._streams
            )
            if self._closed:
                raise BertileError("the model is closed", "load the bundle again")
            self._busy += 1
            order = [
                (candidate.is_free(stream), key in candidate.graphs) for candidate in self._idle
            ]
            best = max(range(len(order)), key=order.__getitem__, default=None)
            workspace = None
            if self._workspaces < self._streams and (best is None or not order[best][0]):
                self._workspaces += 1
            else:
                workspace = self._idle.pop(best)
        try:
            with self.gpu:
                if workspace is None:
                    workspace = Workspace(self.gpu, self._plan, self._code, self.manifest)
                yield workspace
        finally:
            with self._turn:
                self._busy -= 1
                if workspace is None:
                    self._workspaces -= 1
                else:
                    self._idle.append(workspace)
                self._turn.notify_all()
