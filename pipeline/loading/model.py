"""Runs a compiled library on the CPU: token ids become arrays, in passes that fit the caches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from bertile.loading.about import Bundled, padding_id
from bertile.loading.again import load_again
from bertile.loading.batch import Planner
from bertile.loading.errors import AGAIN, BertileError, BundleError
from bertile.loading.exits import LAYERS, Thresholds
from bertile.loading.inputs import check_inputs, filled
from bertile.loading.interface import INTERFACE
from bertile.loading.padding import check_outputs, cut
from bertile.loading.pool import outside
from bertile.loading.stream import Stream
from bertile.loading.tvm_abi import Object, Runtime

# Of a pass through the model, for each thread; a longer batch takes several. More activations fall
# out of the caches between two kernels: 8 texts of 128 tokens take up to a fifth longer at once.
PASS_BLOCKS = 8


class Model(Bundled):
    """A loaded bundle. Any number of threads may call one; as many calls as it has streams are
    answered at once, others one after the other.
    """

    def __init__(
        self,
        runtime: Runtime,
        manifest: dict[str, Any],
        library: Path,
        params: list[Object],
        threads: int,
        streams: int = 1,
        exit_thresholds: Thresholds | None = None,
    ) -> None:
        self.manifest, self._exits = manifest, manifest.get("exits")
        self.inputs = tuple(spec["name"] for spec in manifest["inputs"])
        self.max_length = manifest["model"]["max_length"]
        self.threads = threads
        self.pass_blocks = PASS_BLOCKS * threads  # of tokens; what is more takes several passes
        self.exit_thresholds = exit_thresholds
        self.loaded_by, self._padding_id = None, padding_id(manifest)
        self._planner = Planner(manifest["static"], "attention_mask" not in self.inputs)
        self._runtime, entry = runtime, manifest["entry"]
        dtypes = [spec["dtype"] for spec in manifest["inputs"]]
        try:
            module = _open_library(runtime, library)
            stages = self._stages(params)
            self._streams = [
                Stream(runtime, module, entry, dtypes, params, threads, stages)
                for _ in range(streams)
            ]
            blocks = 1  # which is an input too
            for name, weights, states in ((entry, params, 0), *stages):
                self._check_arity(name, len(dtypes) + blocks + states + len(weights))
            # what the library says of itself; None: that of an older Bertile says nothing
            self.interface: str | None = self._ask(INTERFACE)
        except BertileError as error:
            raise BundleError(f"cannot load {library}: {error.what}", error.remedy) from error
        self._held = (module, params)
        self._library = library

    def __call__(self, /, **inputs: Any) -> dict[str, np.ndarray]:
        """Run the model on arrays or nested lists of integers, each (batch, length).

        Rows may be of unequal lengths: they are padded, and the padding masked. A missing
        attention_mask is all ones, missing token_type_ids are all zeros and missing position_ids
        0, 1, 2, …; a model without these inputs takes them so. Positions behind the last token of a
        sequence are zero in the outputs. Raises InputError for a wrong name, rank, type or shape,
        for ids that the model does not have and for too many tokens; warns of padding without a
        mask.
        """
        specs = self.manifest["inputs"]
        checked = check_inputs(inputs, specs, self.max_length, self._padding_id)
        shape = next(iter(checked.values())).shape
        batch = self._planner.plan(shape, checked.get("attention_mask"), self.pass_blocks)
        values = [
            checked[s["name"]] if s["name"] in checked else filled(s["default"], shape)
            for s in specs
        ]
        specs, pieces = self._specs, []
        for first, count, room, table in batch.passes:
            rows = [v if isinstance(v, int) else v[first : first + count] for v in values]
            pieces.append(self._run(rows, table, (count, shape[1]), room))
            check_outputs(pieces[-1], specs, room)
        if batch.whole:
            return dict(zip(self.outputs, pieces[0]))
        return {
            spec["name"]: cut(spec["axes"], [piece[i] for piece in pieces], shape[1], batch.ends)
            for i, spec in enumerate(specs)
        }

    def beside(self, streams: int, threads: int = 1) -> Model:
        """The same library and weights for other calls: `streams` at once, each on `threads` cores.

        It is closed by itself.
        """
        if self.closed:
            raise BertileError("the model is closed", "load the bundle again")
        _, params = self._held
        limits = self.exit_thresholds
        with outside:
            return Model(
                self._runtime, self.manifest, self._library, params, threads, streams, limits
            )

    def close(self) -> None:
        """Give back the library and the weights; a later call raises BertileError."""
        with outside:
            for stream in self._streams:
                stream.close()
            self._held = ()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle or a copy is the directory, which is loaded again where it is opened."""
        return load_again(self.loaded_by, self.manifest, closed=self.closed)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._streams[0].closed

    @property
    def exit_thresholds(self) -> Thresholds | None:
        """The confidence above which a text leaves, of each early head; None: all run to the end.

        With it the outputs are the logits by which each text left, and LAYERS, how many encoder
        layers that took; without, the logits of every head. To be set between two calls.
        """
        return self._limits

    @exit_thresholds.setter
    def exit_thresholds(self, limits: Thresholds | None) -> None:
        outputs = self.manifest["outputs"]
        self._limits, self._specs = limits, outputs
        if limits is not None:
            taken = {"name": LAYERS, "dtype": "int64", "axes": ["batch"]}
            self._specs = [outputs[0], taken]
        self.outputs = tuple(spec["name"] for spec in self._specs)

    def _place(self) -> str:
        return f"{self.threads} thread{'s' * (self.threads != 1)}"

    def _check_arity(self, entry: str, count: int) -> None:
        takes = self._runtime.call(self._streams[0].find("get_function_arity"), entry.encode())
        if takes != count:
            what = f"'{entry}' takes {takes} arrays, the manifest names {count}"
            raise BertileError(what, AGAIN)

    def _ask(self, name: str) -> str | None:
        function = self._streams[0].find(name)
        return None if function is None else self._runtime.text(self._runtime.call(function))

    def _run(
        self, values: list, blocks: np.ndarray, shape: tuple[int, int], room: tuple[int, int]
    ) -> list[np.ndarray]:
        """Call the compiled function on a pass, see `Stream.run`, in the stream with least to do.

        A caller that packs sequences of unequal lengths builds its own table (see token_blocks).
        """
        stream = self._streams[0]
        if len(self._streams) > 1:
            stream = min(self._streams, key=Stream.backlog)
        if self.exit_thresholds is None:
            return stream.run(values, blocks, shape, room, len(self.outputs))
        left = stream.run_stages(values, blocks, shape, self.exit_thresholds)
        return [left.logits, np.take(self._exits["layers"], left.stages)]

    def _stages(self, params: list[Object]) -> list[tuple[str, list[Object], int]]:
        """Of each stage its function, its weights, and how many states it takes."""
        stages = self._exits["stages"] if self._exits else ()
        return [(s["entry"], [params[i] for i in s["params"]], s["states"]) for s in stages]


def _open_library(runtime: Runtime, path: Path) -> Object:
    return runtime.call(runtime.function("ffi.ModuleLoadFromFile"), os.fsencode(path))
