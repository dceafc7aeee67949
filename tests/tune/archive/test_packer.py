"""A round over a device that no network reaches: pack, bertile-run --measure, ingest, pack on."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import arm_code

from bertile.base.errors import UsageError
from bertile.base.progress import Progress
from bertile.bundle import native_build, runtime_libraries
from bertile.cli import main
from bertile.config import Config
from bertile.run import qemu
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.task import Task
from bertile.targets.rows import native, resolve
from bertile.tune.archive import ingester, packer
from bertile.tune.archive.cpu_packer import CpuPack
from bertile.tune.archive.proposer import propose
from bertile.tune.log.tuning_log import Record, TuningLog

DENSE = Task("dense", {"inputs": 32, "outputs": 24, "activation": "gelu", "residual": False})
NORM = Task("layer_norm", {"channels": 32, "epsilon": 1e-12})
ROW, QUIET = resolve(native().name, 1), Progress(verbosity=-1)
TASKS = Counter({DENSE: 2})

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="this machine has no cc")


def open_log(directory: Path) -> TuningLog:
    return TuningLog([directory], lambda text: None)


def packed(path: Path, log: TuningLog, trials: int = 2) -> dict:
    return packer.pack(TASKS, [NORM], log, ROW, Config(trials=trials), path, QUIET, CpuPack)


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("command")
    native_build.build(native(), place, ("cc",))
    (place / "runtime").mkdir()
    runtime_libraries.copy_installed(place / "runtime")
    return place / native_build.COMMAND


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Two candidates of a dense layer and one of a layer norm, for an empty log."""
    path = tmp_path_factory.mktemp("pack") / "round1.tar"
    counts = packed(path, open_log(path.parent / "log"))
    assert (counts["tasks"], counts["candidates"]) == (2, 3)
    return path


@pytest.fixture
def unpacked(archive, tmp_path) -> Path:
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    return tmp_path / "unpacked"


def measure(command: Path, place: Path, result: Path) -> subprocess.CompletedProcess:
    line = [command, "--measure", place, "--output", result]
    return subprocess.run(list(map(str, line)), capture_output=True, text=True, check=False)


@needs_cc
def test_times_come_home_once_and_the_next_round_goes_on(command, archive, tmp_path, capsys):
    done = measure(command, archive, tmp_path / "result")
    assert done.returncode == 0, done.stderr
    log = open_log(tmp_path / "log")
    counts = ingester.ingest(tmp_path / "result", log, QUIET)
    assert (counts["added"], counts["known"], counts["failed"]) == (3, 0, 0)
    again = ["tune", "--ingest", str(tmp_path / "result"), "--log-dir", str(tmp_path / "log")]
    assert main.main([*again, "--json"]) == 0
    (counts,) = json.loads(capsys.readouterr().out)
    assert (counts["added"], counts["known"]) == (0, 3)
    records = log.records(DENSE, ROW)
    assert dict(records[0].knobs) == SCHEDULES["dense"].default(DENSE, ROW)
    for record in (*records, *log.records(NORM, ROW)):
        assert record.error is None and not record.estimated and record.threads == 1
        assert len(record.microseconds) == 3 and sorted(record.also) == ["16", "384"]
        assert record.machine["row"] == ROW.name and record.machine["cpu"]
    again = packed(tmp_path / "round2.tar", log)
    assert (again["tasks"], again["candidates"]) == (1, 2)  # the layer norm is known
    with tarfile.open(tmp_path / "round2.tar") as file:
        manifest = json.load(file.extractfile("manifest.json"))
    assert all(
        candidate["knobs"] not in [dict(r.knobs) for r in records]
        for candidate in manifest["candidates"]
    )


@needs_cc
def test_wrong_result_and_crash_cost_their_candidates_alone(command, unpacked, tmp_path):
    manifest = json.loads((unpacked / "manifest.json").read_text())
    weights = unpacked / manifest["candidates"][1]["weights"]["file"]
    weights.write_bytes(bytes(len(weights.read_bytes())))
    crash = "#include <stdlib.h>\nint __tvm_ffi_kernel(void) { abort(); }\n"
    cc = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(unpacked / "c2.so")]
    subprocess.run(cc, input=crash, text=True, check=True)
    assert measure(command, unpacked, tmp_path / "result").returncode == 0
    log = open_log(tmp_path / "log")
    assert ingester.ingest(tmp_path / "result", log, QUIET)["failed"] == 2
    good, wrong = log.records(DENSE, ROW)
    (crashed,) = log.records(NORM, ROW)
    assert good.microseconds and "wrong result" in wrong.error and wrong.microseconds == ()
    assert "ended by signal 6" in crashed.error


@needs_cc
def test_archive_for_another_machine_is_refused_by_feature(command, unpacked, tmp_path):
    text = (unpacked / "manifest.json").read_text()
    changed = text.replace('"features": [', '"features": ["telepathy", ')
    (unpacked / "manifest.json").write_text(changed)
    done = measure(command, unpacked, tmp_path / "result")
    assert done.returncode == 3 and "lacks telepathy" in done.stderr
    assert measure(command, tmp_path / "none.tar", tmp_path / "result").returncode == 2
    (tmp_path / "damaged.tar").write_bytes(b"no tar" * 200)
    done = measure(command, tmp_path / "damaged.tar", tmp_path / "result")
    assert done.returncode == 2 and "not one that bertile wrote" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_round_for_an_arm_row_runs_as_arm_code(tmp_path, precision):
    """Packed for a Cortex-A76, measured under QEMU, checked when it is home."""
    arm_code.need_emulator()
    row = resolve("arm-a76", 1)
    shape = DENSE.shape if precision == "fp32" else {**DENSE.shape, "precision": precision}
    task, log = Task("dense", shape), open_log(tmp_path / "log")
    config = Config(trials=3)
    packer.pack(Counter({task: 1}), [], log, row, config, tmp_path / "pack.tar", QUIET, CpuPack)
    native_build.build(row, tmp_path / "command")
    line = [*qemu.command("aarch64", "cortex-a76"), tmp_path / "command" / "bertile-run"]
    line += ["--measure", tmp_path / "pack.tar", "--output", tmp_path / "result"]
    line += ["--runtime", arm_code.RUNTIME]
    subprocess.run(list(map(str, line)), check=True)
    counts = ingester.ingest(tmp_path / "result", log, QUIET)
    assert (counts["added"], counts["failed"]) == (3, 0)
    assert log.best(task, row).target == "arm-a76"


def test_what_is_no_result_is_refused(tmp_path):
    (tmp_path / "result").write_text('{"candidate": 0}\n')
    with pytest.raises(UsageError, match="not a result of bertile-run --measure"):
        ingester.ingest(tmp_path / "result", open_log(tmp_path / "log"), QUIET)


def record(knobs: dict, microseconds: float) -> Record:
    return Record(
        operation=DENSE.operation,
        shape=dict(DENSE.shape),
        target=ROW.log,
        threads=1,
        tokens=128,
        knobs=knobs,
        microseconds=(microseconds,),
        machine={},
        versions={},
        time="2026-01-01T00:00:00+00:00",
    )


def test_candidates_begin_with_the_default_and_are_new():
    default = SCHEDULES["dense"].default(DENSE, ROW)
    first, second, third = propose(DENSE, ROW, [], 3)
    assert first == default and second != third
    candidates = propose(DENSE, ROW, [record(first, 5.0), record(second, 6.0)], 50)
    assert first not in candidates and second not in candidates
    failed = replace(record(third, 1.0), microseconds=())
    assert third not in propose(DENSE, ROW, [failed], 50)


def test_model_learns_which_candidates_are_fast():
    """Times that grow with the chunk: small chunks are proposed, but for the share of chance."""
    default = SCHEDULES["dense"].default(DENSE, ROW)
    known = [
        record({**default, "chunk": chunk, "accumulators": wide}, 10.0 * chunk)
        for chunk in (4, 8, 16, 32)
        for wide in (8, 12, 16, 20)
    ]
    proposed = propose(DENSE, ROW, known, 16)
    assert sum(knobs["chunk"] == 4 for knobs in proposed[:12]) >= 10
