"""A model is exported, compiled, loaded and run at both ends of pyproject.toml's ranges, and on
each Python that is named there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import environments, tiny_encoder, wheels
from helpers.environments import typed
from packaging.requirements import Requirement
from packaging.version import Version

from bertile.base import version_ranges
from bertile.config import Config
from bertile.export.exporter import export
from bertile.onnx.samples import session

tomllib = pytest.importorskip("tomllib")  # part of Python from 3.11 on
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OWN = f"{sys.version_info[0]}.{sys.version_info[1]}"
OTHERS = [version for version in version_ranges.pythons() if version != OWN]
IDS = [[2, 4, 6, 3], [2, 5, 6, 3]]
WITHIN = 1e-4  # fp32, against ONNX Runtime of our own environment; vectors have length 1
LOAD = """
import json, sys, numpy, bertile
vectors = bertile.load(sys.argv[1])(input_ids=json.loads(sys.argv[2]))["sentence_embedding"]
print(json.dumps([numpy.__version__, vectors.tolist()]))
"""
EXPORT_EVERY_FAMILY = """
import sys
from pathlib import Path
import transformers
from bertile.config import Config
from bertile.export.exporter import export
from bertile.families.table import FAMILIES
for family in FAMILIES:
    if family.model_types[0] not in transformers.CONFIG_MAPPING:
        continue  # it is newer
    export(f"synthetic:{family.name}-tiny", Path(sys.argv[1], family.name), Config())
    print(family.name)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folders = PROJECT["tool"]["setuptools"]["package-dir"].values()
    return wheels.build(tmp_path_factory.mktemp("wheel"), folders)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny sentence encoder as a Hugging Face directory, with a tokenizer."""
    return tiny_encoder.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def onnx(model, tmp_path_factory) -> Path:
    """The same, exported by our own environment."""
    directory = tmp_path_factory.mktemp("onnx")
    export(str(model), directory, Config(head="embedding"))
    return directory


@pytest.fixture(scope="module")
def want(onnx) -> np.ndarray:
    """What ONNX Runtime of our own environment answers to IDS."""
    ids = np.array(IDS)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids}
    running = session(onnx / "model.onnx")
    names = [value.name for value in running.get_inputs()]
    return running.run(["sentence_embedding"], {name: feeds[name] for name in names})[0]


def lower_ends(*extras: str) -> dict[str, str]:
    """The oldest version of each package that these extras ask for."""
    listed = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *(line for e in extras for line in listed[e])]
    bounds = [
        (Requirement(line).name, bound) for line in lines for bound in Requirement(line).specifier
    ]
    return {name: bound.version for name, bound in bounds if bound.operator == ">="}


def installed(programs: Path) -> dict[str, str]:
    """The version of each package of an environment."""
    line = [
        programs / "python",
        "-m",
        "pip",
        "list",
        "--format=json",
        "--disable-pip-version-check",
    ]
    return {row["name"].lower(): row["version"] for row in json.loads(typed(*line))}


def must_compile_and_run(programs: Path, model: Path, place: Path, want: np.ndarray) -> None:
    """As a user does it: every command succeeds, and the vectors are ONNX Runtime's."""
    bertile = programs / "bertile"
    at = ("--cache-dir", place / "stages", "--log-dir", place / "log", "--tune", "none")
    typed(bertile, "compile", model, "--head", "embedding", "-o", "out", *at, cwd=place)
    assert "movie" in typed(bertile, "run", "out", "good movie", "bad movie", cwd=place)
    assert "within" in typed(bertile, "verify", "out", cwd=place)
    must_load(programs, place / "out", want)


def must_load(programs: Path, bundle: Path, want: np.ndarray) -> str:
    """The vectors are ONNX Runtime's; numpy's version there."""
    line = [programs / "python", "-c", LOAD, bundle, json.dumps(IDS)]
    version, vectors = json.loads(typed(*line, cwd=bundle.parent))
    np.testing.assert_allclose(vectors, want, rtol=0, atol=WITHIN)
    return version


def must_be_well(programs: Path, place: Path) -> None:
    """The doctor has nothing to say against the versions."""
    rows = json.loads(typed(programs / "bertile", "doctor", "--json", cwd=place))
    status = {row["name"]: row["status"] for row in rows}
    packages = {
        tried.package for extra in ("", "compile") for tried in version_ranges.packages(extra)
    }
    assert packages <= set(status)
    assert {
        name: status[name] for name in ("python", "tvm", *packages) if status[name] != "ok"
    } == {}


@pytest.mark.parametrize("end", ["oldest", "newest"])
def test_export_compile_tune_and_run_at_the_end_of_all_ranges(end, wheel, model, want, tmp_path):
    """With this Python: of torch, only it has a build without GPU libraries."""
    programs = environments.make(tmp_path / "venv")
    oldest = lower_ends("compile", "export")
    limits = oldest if end == "oldest" else {"torch": oldest["torch"]}
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in limits.items()))
    environments.install(programs, "-c", constraints, f"{wheel}[export]")
    versions = installed(programs)
    for name, version in oldest.items():
        here = Version(Version(versions[name]).public)
        assert here == Version(version) if name in limits else here > Version(version), name
    must_compile_and_run(programs, model, tmp_path, want)
    must_be_well(programs, tmp_path)
    families = typed(programs / "python", "-c", EXPORT_EVERY_FAMILY, tmp_path / "families")
    assert "bert" in families.split()
    tune = ("tune", model, "--head", "embedding", "--tune", "quick", "--trials", "8")
    at = ("--cache-dir", "stages", "--log-dir", "log", "--no-shipped-log")
    typed(programs / "bertile", *tune, *at, cwd=tmp_path)


@pytest.mark.parametrize("version", OTHERS)
def test_compile_and_run_on_other_pythons(version, wheel, onnx, want, tmp_path):
    """An exported model, with the newest of everything that there is for that Python: torch, which
    exports, would bring gigabytes of GPU libraries along.
    """
    programs = environments.make(tmp_path / "venv", environments.interpreter(version))
    tokenizers = next(t for t in version_ranges.packages("export") if t.package == "tokenizers")
    environments.install(programs, f"{wheel}[compile]", tokenizers)
    must_compile_and_run(programs, onnx, tmp_path, want)
    must_be_well(programs, tmp_path)


def test_bundle_loads_with_the_oldest_numpy(wheel, onnx, want, tmp_path, stages):
    """On the oldest Python: numpy of that time has no build for others."""
    programs = environments.make(
        tmp_path / "venv", environments.interpreter(version_ranges.pythons()[0])
    )
    (oldest,) = lower_ends().values()
    environments.install(programs, f"numpy=={oldest}", wheel)
    bundle = tmp_path / "out"
    bertile_compile(onnx, bundle, stages)
    assert Version(must_load(programs, bundle, want)) == Version(oldest)


def bertile_compile(onnx: Path, bundle: Path, stages: str) -> None:
    """The model of `onnx`, compiled by our own environment, with its runtime beside it."""
    import bertile

    bertile.compile(str(onnx), bundle, Config(cache_dir=stages))
