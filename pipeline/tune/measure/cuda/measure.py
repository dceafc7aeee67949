"""Measures an archive of candidates on the machine that it was carried to (see
``archive.cuda_packer``).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bertile.base import scratch
from bertile.base.errors import BertileError
from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.task import Task
from bertile.targets.rows import resolve
from bertile.tune.measure.cuda import rates
from bertile.tune.measure.cuda.card import Card
from bertile.tune.measure.cuda.trial import check
from bertile.tune.measure.trial_runner import TrialRunner

SCHEMA = 1
TRIAL_SECONDS = 60.0  # the first trial of a task computes its reference


def main(archive: str, arguments: Sequence[str]) -> int:
    """Measure the candidates of an archive; the exit code is 3 where no GPU can run them."""
    parser = argparse.ArgumentParser(
        prog=f"python3 {archive}", description="Time candidate kernels on this machine's GPU."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", metavar="RESULT", help="file to write")
    what.add_argument("--rates", action="store_true", help="measure the tensor cores instead")
    parser.add_argument("--seconds", type=float, help="begin no candidate after this time")
    options = parser.parse_args(arguments)
    try:
        if options.rates:
            with zipfile.ZipFile(archive) as file:
                print(json.dumps(rates.measure(Card(), file.read(rates.NAME))))
            return 0
        count = measure(Path(archive), Path(options.output), options.seconds)
    except BertileError as error:
        print(f"{archive}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{count}; at home: bertile tune --ingest {options.output}", file=sys.stderr)
    return 0


def measure(archive: Path, output: Path, seconds: float | None = None) -> str:
    """Write a line of times for each candidate; says how many there are."""
    end = time.monotonic() + seconds if seconds else float("inf")
    with scratch.directory("measure-") as place:
        with zipfile.ZipFile(archive) as file:
            names = [name for name in file.namelist() if name.endswith(".cubin")]
            file.extractall(place, names)
            manifest = json.loads(file.read("manifest.json"))
        row = resolve(manifest["target"]["name"], manifest["threads"])
        card = Card()
        check(card, row)
        machine = {**card.facts(), "cores": os.cpu_count()}
        done = failed = 0
        with open(output, "w", encoding="utf-8") as lines:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
            header = {"schema": SCHEMA, "machine": machine, "time": stamp, "pack": manifest}
            lines.write(json.dumps(header) + "\n")
            for answer in _answers(manifest, row, Path(place), end):
                lines.write(json.dumps(answer) + "\n")
                lines.flush()
                done, failed = done + 1, failed + ("error" in answer)
                of = len(manifest["candidates"])
                print(f"\rmeasured {done} of {of}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return f"{done} candidates measured, {failed} of them failed"


def _answers(
    manifest: dict[str, Any], row: Any, place: Path, end: float
) -> Iterator[dict[str, Any]]:
    blocks, *also = manifest["blocks"]
    with TrialRunner(row, TRIAL_SECONDS, ("bertile.tune.measure.cuda.trial",)) as trials:
        for candidate in manifest["candidates"]:
            if time.monotonic() > end:
                return
            task = Task(**manifest["tasks"][candidate["task"]])
            image = str(place / candidate["image"])
            outcome = trials.run(task, candidate["knobs"], blocks, also, image=image)
            if "error" in outcome:
                yield {"candidate": candidate["id"], "error": outcome["error"]}
                continue
            times = {blocks * BLOCK_TOKENS: outcome["microseconds"], **outcome["also"]}
            sets = [{"tokens": int(tokens), "microseconds": us} for tokens, us in times.items()]
            yield {"candidate": candidate["id"], "sets": sets}
