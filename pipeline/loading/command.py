"""Loads a bundle from the command line, runs a small batch and prints what came out."""

from __future__ import annotations

import os
import sys
import time

import numpy as np

from bertile.loading.dispatch import load
from bertile.loading.errors import BertileError, InputError
from bertile.loading.manifest import CUDA
from bertile.loading.model import Model


def main(arguments: list[str] | None = None) -> int:
    """Load the bundle that this file lies in, run a small batch and print what came out."""
    import argparse

    parser = argparse.ArgumentParser(prog="loader.py", description=main.__doc__)
    parser.add_argument("bundle", nargs="?", default=os.path.dirname(os.path.abspath(__file__)))
    parser.add_argument("--ids", help="token ids to run, with commas between: 101,7592,102")
    parser.add_argument("--threads", type=int, help="cores to use (default: all)")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU (default: 0)")
    options = parser.parse_args(arguments)
    try:
        began = time.perf_counter()
        with load(options.bundle, options.threads, device=options.device) as model:
            _print_model(model, time.perf_counter() - began)
            _print_run(model, _example(model) if options.ids is None else _parse(options.ids))
    except BertileError as error:
        print(f"loader.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _print_model(model: Model, seconds: float) -> None:
    source, target = model.manifest["model"], model.manifest["target"]
    features = " ".join(target["features"])
    limit = f", at most {model.max_length} tokens" if model.max_length else ""
    print(f"model    {source.get('source')} ({source.get('family')}, {source.get('head')}{limit})")
    print(f"target   {target.get('name')} ({target['arch']} {features})")
    place = model.gpu.name if target["arch"] == CUDA else f"{model.threads} threads"
    print(f"loaded   in {seconds * 1e3:.0f} ms, {place}")


def _print_run(model: Model, ids: list[list[int]]) -> None:
    inputs = {"input_ids": ids}
    model(**inputs)  # the first call starts the threads
    began = time.perf_counter()
    outputs = model(**inputs)
    seconds = time.perf_counter() - began
    for name in model.inputs:
        print(f"input    {name} {np.shape(ids)}")
    for name, array in outputs.items():
        first = ", ".join(f"{value:.4f}" for value in array.reshape(-1)[:4])
        print(f"output   {name} {array.shape}: {first}{', …' if array.size > 4 else ''}")
        if not np.isfinite(array).all():
            raise BertileError(f"the output {name} is not finite")
    print(f"ran      in {seconds * 1e3:.2f} ms")
    if model.manifest["target"]["arch"] == CUDA:
        alone, copied = (np.median(model.time(copies=copies, **inputs)) for copies in (False, True))
        print(f"on GPU   in {alone:.3f} ms, with copies in {copied:.3f} ms (medians of 100)")


def _parse(text: str) -> list[list[int]]:
    try:
        return [[int(part) for part in text.split(",")]]
    except ValueError as error:
        raise InputError(f"'{text}' is not a list of ids", "write them as 101,7592,102") from error


def _example(model: Model) -> list[list[int]]:
    below = next((s["below"] for s in model.manifest["inputs"] if s["name"] == "input_ids"), None)
    length = model.manifest["static"].get("length") or min(8, model.max_length or 8)
    return [[token % (below or 100) for token in range(row, row + length)] for row in (2, 3)]


if __name__ == "__main__":
    sys.exit(main())
