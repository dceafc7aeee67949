"""Type checkers follow the package: a client that is right passes, one that is wrong does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import package

CLIENT = '''"""Compiles a model, asks it, and says how far off it is."""

from pathlib import Path

import numpy as np

import bertile


def main(out: Path) -> float:
    bertile.compile("minilm", out, precision="int8", calibrate=Path("texts.txt"), lengths=[16, 128])
    with bertile.load(out, threads=2) as model:
        ids = np.array([[101, 7592, 2088, 102]])
        vectors = model(input_ids=ids)["sentence_embedding"]
        print(model, model.labels, model.inputs, model.max_length, vectors.shape[0] + 1)
    try:
        check = bertile.verify(out)
        report = bertile.bench(str(out), against=["onnxruntime"], lengths=[16])
    except bertile.BertileError as error:
        raise SystemExit(error.exit_code) from error
    config = bertile.Config(precision="fp32", threads=1)
    bertile.compile("minilm", out, config, threads=2)
    print(report["rows"], config.to_json())
    return float(check["max_abs_difference"])
'''
WRONG = {
    'precision="int8"': "precison='int8'",
    "threads=2) as model": "threads='2') as model",
    "model.labels": "model.label",
    "bertile.BertileError": "bertile.BertilError",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return package.linked(tmp_path_factory.mktemp("site"))


def mypy(site: Path, folder: Path) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "client.py"]
    cache = ["--cache-dir", str(site.parent / "mypy")]
    environment = {**os.environ, "MYPYPATH": str(site)}
    return subprocess.run(
        [*line, *cache], cwd=folder, env=environment, capture_output=True, text=True
    )


def pyright(site: Path, folder: Path) -> subprocess.CompletedProcess:
    """basedpyright is pyright in a wheel of its own: pyright's would fetch node when it runs."""
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(site)], "include": ["client.py"]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    line = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True)


CHECKERS = {"mypy": mypy, "basedpyright": pyright}


@pytest.fixture(params=CHECKERS)
def check(request, site, tmp_path):
    pytest.importorskip(request.param)

    def run(client: str) -> subprocess.CompletedProcess:
        (tmp_path / "client.py").write_text(client)
        return CHECKERS[request.param](site, tmp_path)

    return run


@pytest.mark.slow
def test_client_that_is_right_passes(check, site):
    assert (site / "bertile" / "py.typed").is_file()
    done = check(CLIENT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("right", WRONG)
def test_client_that_is_wrong_does_not(check, right):
    assert right in CLIENT
    done = check(CLIENT.replace(right, WRONG[right]))
    assert done.returncode == 1, done.stdout + done.stderr
    assert (
        WRONG[right].strip("'\"").split("=")[0].split(".")[-1] in done.stdout
        or "str" in done.stdout
    )
