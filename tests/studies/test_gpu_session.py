"""The script for a machine with a GPU: its steps in order, what they are given, and its verdict."""

from __future__ import annotations

import lzma
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "gpu_session.sh"
STUB = "import sys\nprint({name!r}, *(word for word in sys.argv[1:] if not word.startswith('/')))\n"


@pytest.fixture
def place(tmp_path):
    """What `make pack-cuda` writes, with scripts that only say how they were called."""
    for archive, script in (("checks", "cuda_checks"), ("bench", "cuda_bench")):
        file = tmp_path / f"{script}.py"
        file.write_text(STUB.format(name=script))
        with lzma.open(tmp_path / f"{archive}.tar.xz", "wb") as packed:
            with tarfile.open(fileobj=packed, mode="w") as tar:
                tar.add(file, file.name)
    with zipfile.ZipFile(tmp_path / "round-fp16.pyz", "w") as round_archive:
        round_archive.writestr("__main__.py", STUB.format(name="round"))
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho a card\n")
    smi.chmod(0o755)
    return tmp_path


def run(place: Path, *steps: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "TUNE_SECONDS": "7"}
    line = ["sh", str(SCRIPT), str(place), str(place / "results"), *steps]
    return subprocess.run(line, capture_output=True, text=True, env=env, check=False)


def test_every_step_runs_on_what_was_carried(place):
    done = run(place)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if " s, so far " not in line]
    assert said == [
        "a card",
        "cuda_checks",
        "cuda_bench --fp16 --int8 --model -o --no-compile",
        "round --rates",
        "round --output --seconds 7",
        "cuda_bench --fp16 --int8 --model -o",
    ]


def test_a_step_that_fails_is_no_end_and_is_said(place):
    (place / "checks.tar.xz").unlink()
    done = run(place, "checks", "eager")
    assert done.returncode == 1 and "cuda_bench --fp16" in done.stdout
    assert "so far failed" in done.stdout


def test_without_a_card_nothing_runs(place):
    (place / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    done = run(place)
    assert done.returncode == 3 and "cuda" not in done.stdout
