"""A loaded model travels by pickle: its directory is loaded again at the other end."""

from __future__ import annotations

import copy
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_bundle
from helpers.tiny_bundle import assert_same, expected

from bertile import cuda_loader, loader
from bertile.base import errors
from bertile.base.errors import BertileError, BundleError
from bertile.bundle import writer


def python(folder: Path, *command: object) -> str:
    run = subprocess.run(
        [*map(str, command)], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


IDS = [[1, 2, 3], [4, 5, 6]]
WAYS = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "oldest pickle": lambda model: pickle.loads(pickle.dumps(model, 0)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "within a list": lambda model: copy.deepcopy([{"model": model}])[0]["model"],
}


@pytest.fixture(scope="module")
def directory(stages, tmp_path_factory) -> Path:
    parts = (tiny_bundle.MANIFEST, tiny_bundle.library(stages), tiny_bundle.PARAMS, [])
    place = tmp_path_factory.mktemp("bundles") / "tiny"
    return writer.write(*parts, place, add=writer.include_runtime)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_is_pickled_or_copied_is_another_one_of_its_directory(directory, way):
    with loader.load(directory, 1) as model:
        model(input_ids=IDS)
        with WAYS[way](model) as other:
            assert other is not model and other.threads == 1
            assert_same(other(input_ids=IDS), expected(IDS))
            model.close()
            assert_same(other(input_ids=IDS), expected(IDS))


def test_a_pickle_is_small_and_finds_its_directory_from_anywhere(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(directory.parent)
    with loader.load(directory.name, 1) as model:
        pickled = pickle.dumps(model)
    monkeypatch.chdir(tmp_path)
    assert len(pickled) < 1000
    with pickle.loads(pickled) as other:
        assert_same(other(input_ids=IDS), expected(IDS))


def test_a_pickle_without_threads_takes_the_cores_of_where_it_is_opened(directory, monkeypatch):
    with loader.load(directory) as model:
        pickled = pickle.dumps(model)
    monkeypatch.setattr("bertile.loading.dispatch.thread_count", lambda wish: wish or 1)
    with pickle.loads(pickled) as other:
        assert other.threads == 1


def test_whether_hashes_are_compared_travels_too(directory, tmp_path):
    place = shutil.copytree(directory, tmp_path / "copy")
    with loader.load(place, 1) as checked, loader.load(place, 1, verify=False) as trusting:
        pickles = pickle.dumps(checked), pickle.dumps(trusting)
    with open(place / "loader.py", "r+b") as file:
        file.write(b"#")
    with pytest.raises(BundleError, match="has changed since it was compiled"):
        pickle.loads(pickles[0])
    pickle.loads(pickles[1]).close()


def test_a_closed_model_is_not_pickled(directory):
    model = loader.load(directory, 1)
    model.close()
    for way in WAYS.values():
        with pytest.raises(BertileError, match="the model is closed; load the bundle again"):
            way(model)


def test_a_pickle_of_another_bundle_is_refused(directory, tmp_path):
    place = shutil.copytree(directory, tmp_path / "copy")
    with loader.load(place, 1) as model:
        pickled = pickle.dumps(model)
    tiny_bundle.change_manifest(place, lambda m: m["model"].update(source="another"))
    with pytest.raises(BundleError, match="is not the bundle that was pickled"):
        pickle.loads(pickled)
    shutil.rmtree(place)
    with pytest.raises(BundleError, match="is not a bundle"):
        pickle.loads(pickled)


def test_a_model_of_no_directory_says_so(directory):
    with loader.load(directory, 1) as model:
        model.loaded_by = None
        with pytest.raises(BertileError, match="was not loaded from a directory"):
            pickle.dumps(model)


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_models_are_arguments_of_other_processes(directory, tmp_path, method):
    (tmp_path / "worker.py").write_text(
        "import numpy as np\ndef ask(model, ids):\n    return model(input_ids=ids)['pooled']\n"
    )
    (tmp_path / "main.py").write_text(
        f"""
import multiprocessing, numpy as np
from bertile import loader
from worker import ask
if __name__ == "__main__":
    model = loader.load({str(directory)!r}, 1)
    wanted = model(input_ids={IDS})["pooled"]
    with multiprocessing.get_context({method!r}).Pool(1) as pool:
        print((pool.apply(ask, (model, {IDS})) == wanted).all())
"""
    )
    assert python(tmp_path, sys.executable, "main.py") == "True\n"


def test_the_loader_in_a_bundle_pickles_too(directory, bare):
    code = f"""
import loader, pickle
model = loader.load(".", 1)
other = pickle.loads(pickle.dumps(model))
print((other(input_ids={IDS})["pooled"] == model(input_ids={IDS})["pooled"]).all())
"""
    assert python(directory, bare, "-c", code) == "True\n"


ERRORS = [
    *(getattr(errors, name)("what", "do") for name in errors.__all__ if name.endswith("Error")),
    cuda_loader.DriverError("what", 7, "do"),
    cuda_loader.OutOfMemory("what", "do"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_travel_between_processes(error):
    other = pickle.loads(pickle.dumps(error))
    assert (type(other), str(other), vars(other)) == (type(error), str(error), vars(error))
