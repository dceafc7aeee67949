"""Makes Python environments, installs into them, and runs what a user would type there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def make(directory: Path, python: str | Path = sys.executable) -> Path:
    """The bin directory of a new environment with pip and nothing else."""
    typed(python, "-m", "venv", directory)
    return directory / "bin"


def typed(*words: object, cwd: Path | None = None) -> str:
    """What a command that must succeed prints."""
    run = subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def pip(programs: Path, *words: object) -> subprocess.CompletedProcess:
    """`pip install WORDS` in an environment."""
    line = [programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return subprocess.run([*map(str, line), *map(str, words)], capture_output=True, text=True)


def install(programs: Path, *words: object) -> None:
    """The same; the test is skipped where no package index is reached."""
    done = pip(programs, *words)
    if done.returncode and "connection broken" in done.stderr:  # pip's words when it tries again
        pytest.skip("no package index is reached")
    assert done.returncode == 0, done.stderr


def interpreter(version: str) -> Path:
    """A Python of this version ("3.12"), on PATH or among pyenv's; the test is skipped without."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    names = [shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python{version}")]
    for name in filter(None, names):
        line = [str(name), "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
        run = subprocess.run(line, capture_output=True, text=True, check=False)
        if run.stdout.strip() == version:
            return Path(name)
    pytest.skip(f"there is no python{version}, on PATH or among pyenv's")
