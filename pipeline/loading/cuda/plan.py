"""Reads plan.json, which says for any shape what a bundle launches, on which memory."""

from __future__ import annotations

import json
import struct
import threading
from pathlib import Path

import numpy as np

from bertile.loading.blocks import BLOCK_TOKENS
from bertile.loading.cuda.extents import Extent, check_extent, compiled
from bertile.loading.cuda.layout import Contents, Layout, Step
from bertile.loading.errors import AGAIN, BundleError
from bertile.loading.interface import INTERFACE

PLAN = "plan.json"
SCHEMA = 1  # the newest schema of plan.json that this loader reads
GRAPHS = 128  # that each workspace keeps, one for each shape of a request
_SYMBOLS = ("batch", "length", "blocks")
_WRONG = (KeyError, TypeError, ValueError, IndexError, AttributeError, struct.error)


def read_plan(path: Path, manifest: dict) -> Plan:
    """Return the checked plan of a bundle; raises BundleError."""
    try:
        return Plan(json.loads(path.read_bytes().decode()), manifest)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    except (*_WRONG, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{path} is damaged: {what}", AGAIN) from error


class Plan:
    """plan.json, checked: inputs, weights, buffers, outputs and launches of any shape."""

    def __init__(self, plan: dict, manifest: dict):
        if plan["schema"] != SCHEMA:
            raise ValueError(f"it has schema {plan['schema']}, this loader reads {SCHEMA}")
        self._extents: dict[Extent, int] = {}
        self._rooms: dict[tuple, Layout] = {}
        self._lock = threading.RLock()
        self._contents = Contents(
            [self._array(spec) for spec in plan["inputs"]],
            [(*self._array(spec), spec["buffer"]) for spec in plan["outputs"]],
            [self._extent(spec["bytes"]) for spec in plan["buffers"]],
        )
        self.weights: list[str] = plan["weights"]
        self.steps = [self._step(spec) for spec in plan["steps"]]
        self.entries: dict[str, int] = {}  # entry: the most shared memory of its launches
        for step in self.steps:
            self.entries[step.entry] = max(step.shared, self.entries.get(step.entry, 0))
        self.interface: str | None = plan.get(INTERFACE)
        if not isinstance(self.interface, (str, type(None))):
            raise TypeError("its interface is no text")
        self._compare(plan, manifest)
        results = [buffer for _, _, buffer in self._contents.outputs]
        known = range(len(self._contents.buffers))
        if len(set(results)) < len(results) or not set(results) <= set(known):
            raise ValueError("two outputs share a buffer, or have none")
        if not self.steps:
            raise ValueError("it has no steps")

    def _compare(self, plan: dict, manifest: dict) -> None:
        """What the plan says twice, the manifest must say too."""
        static = manifest["static"]
        inputs = [(spec, ["batch", "length"]) for spec in manifest["inputs"]]
        outputs = [(spec, spec["axes"]) for spec in manifest["outputs"]]
        for key, ours, theirs in (
            ("inputs", plan["inputs"][:-1], inputs),
            ("outputs", plan["outputs"], outputs),
        ):
            names = ", ".join(spec["name"] for spec in ours)
            if names != ", ".join(spec["name"] for spec, _ in theirs):
                raise ValueError(f"its {key} are not those of the manifest: {names}")
            for spec, (other, axes) in zip(ours, theirs):
                shape = spec["shape"]
                same = len(shape) == len(axes) and all(
                    size == static.get(axis, axis) if type(size) is int else isinstance(axis, str)
                    for size, axis in zip(shape, axes)
                )
                if spec["dtype"] != other["dtype"] or not same:
                    raise ValueError(f"{spec['name']} is not as the manifest says")

    def _extent(self, extent: Extent) -> int:
        check_extent(extent, _SYMBOLS)
        return self._extents.setdefault(extent, len(self._extents))

    def _array(self, spec: dict) -> tuple[np.dtype, tuple[int, ...]]:
        return np.dtype(spec["dtype"]), tuple(map(self._extent, spec["shape"]))

    def _step(self, spec: dict) -> Step:
        limits = {
            "input": len(self._contents.inputs),
            "weight": len(self.weights),
            "buffer": len(self._contents.buffers),
        }
        entry, threads, shared = spec["entry"], spec["threads"], spec["shared"]
        if not isinstance(entry, str) or type(threads) is not int or type(shared) is not int:
            raise TypeError(f"the step {entry} is not described as it should be")
        if not 0 < threads <= 1024 or shared < 0 or len(spec["grid"]) != 3:
            raise ValueError(f"the step {entry} has {threads} threads, {shared} bytes shared")
        arguments = []
        for kind, value in spec["arguments"]:
            if kind in limits:
                if type(value) is not int or not 0 <= value < limits[kind]:
                    raise ValueError(f"the step {entry} names {kind} {value}, which does not exist")
            elif kind in ("int32", "int64"):
                value = self._extent(value)
            elif kind == "float32":
                struct.pack("<f", value)
            else:
                raise ValueError(f"the step {entry} has an argument of the kind {kind}")
            arguments.append((kind, value))
        grid = tuple(map(self._extent, spec["grid"]))
        when = self._extent(spec["when"]) if "when" in spec else None
        return Step(entry, grid, threads, shared, when, tuple(arguments))

    def layout(self, batch: int, length: int, blocks: int) -> Layout:
        """What a request of this shape needs.

        Requests of unequal lengths have the places of buffers that as many whole lengths would
        have: they are of many sizes, and finding places takes longer than all else.
        """
        values = self._values(batch, length, blocks)
        chosen = [step.when is None or values[step.when] != 0 for step in self.steps]
        steps = [step for step, used in zip(self.steps, chosen) if used]
        key = (batch, length, *chosen)
        with self._lock:
            if key not in self._rooms:
                most = self._values(batch, length, batch * -(-length // BLOCK_TOKENS))
                self._rooms[key] = Layout(self._contents, most, steps)
                while len(self._rooms) > GRAPHS:
                    del self._rooms[next(iter(self._rooms))]
            return Layout(self._contents, values, steps, self._rooms[key])

    def _values(self, batch: int, length: int, blocks: int) -> tuple[int, ...]:
        """The values of all extents."""
        try:
            values = compiled(tuple(self._extents), _SYMBOLS)(batch, length, blocks)
        except ZeroDivisionError as error:
            raise BundleError("the plan divides by zero", AGAIN) from error
        return tuple(map(int, values))
