"""The two files that load a bundle run with Python and numpy alone, and do what the modules do."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_bundle

from bertile.bundle import writer


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """The bundle of test_loader.py, with the runtime and both files."""
    place = tmp_path_factory.mktemp("joined")
    built = f"spec_from_file_location('built', {tiny_bundle.__file__!r})"
    tiny_bundle.python(
        f"import importlib.util as u; s = u.{built}; m = u.module_from_spec(s);"
        f" s.loader.exec_module(m); m.build_library({str(place / 'lib.so')!r})"
    )

    def add(folder: Path) -> None:
        writer.include_runtime(folder)
        writer.include_loaders(folder)

    return writer.write(
        tiny_bundle.MANIFEST, place / "lib.so", tiny_bundle.PARAMS, [], place / "tiny", add
    )


def run(python: Path, code: str, *arguments: object, cwd: Path | None = None) -> str:
    """What `code` prints, without anything of this environment."""
    done = subprocess.run(
        [python, "-I", "-c", code, *map(str, arguments)],
        cwd=cwd,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ALONE = """
import json, sys
from importlib.util import find_spec
sys.path.insert(0, sys.argv[1])
assert not [name for name in ("bertile", "tvm", "tvm_ffi", "torch") if find_spec(name)]
import numpy as np
import loader
assert loader.__file__.startswith(sys.argv[1])
with loader.load(sys.argv[1]) as model:
    for case in json.load(open(sys.argv[2])):
        outputs = model(**case["inputs"])
        for name, wanted in case["outputs"].items():
            np.testing.assert_allclose(outputs[name], wanted, rtol=1e-5, atol=1e-5)
    for inputs, message in json.load(open(sys.argv[3])):
        try:
            model(**inputs)
        except loader.InputError as error:
            assert message in str(error), (message, str(error))
        else:
            raise AssertionError(message)
tops = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(sorted(top for top in tops if not top.startswith("_")))
"""


def test_joined_loader_runs_and_refuses_as_the_modules_do_with_numpy_alone(
    bare, directory, tmp_path
):
    cases = []
    for number, (batch, length) in enumerate([(1, 1), (3, 17), (40, 60)]):
        ids = tiny_bundle.random_ids(batch, length, number)
        mask = np.random.default_rng(number).integers(0, 2, ids.shape)
        wanted = tiny_bundle.expected(ids, mask)
        del wanted["blocks"]  # those are of one pass, and the last of these takes several
        inputs = {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}
        outputs = {name: array.tolist() for name, array in wanted.items()}
        cases.append({"inputs": inputs, "outputs": outputs})
    plain = [
        (inputs, message)
        for inputs, message in tiny_bundle.WRONG_INPUTS.values()
        if not any(isinstance(value, np.ndarray) for value in inputs.values())
    ]
    assert len(plain) > 10
    (tmp_path / "cases").write_text(json.dumps(cases))
    (tmp_path / "wrong").write_text(json.dumps(plain))
    modules = run(bare, ALONE, directory, tmp_path / "cases", tmp_path / "wrong")
    assert ast.literal_eval(modules) == ["loader", "numpy"]


BOTH = """
import sys
from importlib.util import find_spec
sys.path.insert(0, sys.argv[1])
assert not [name for name in ("bertile", "tvm", "tvm_ffi", "torch") if find_spec(name)]
import cuda_loader, loader
assert cuda_loader.InputError is loader.InputError and cuda_loader.Model is not loader.Model
assert cuda_loader.evaluate("16*blocks", {"blocks": 3}) == 48
assert cuda_loader.place_buffers([300, 100], [(0, 1), (1, 2)]) == ([0, 512], 768)
try:
    cuda_loader.load(sys.argv[1])
except loader.PlatformError as error:
    print(error)
tops = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(sorted(top for top in tops if not top.startswith("_")))
"""


def test_joined_cuda_loader_needs_numpy_and_the_loader_beside_it(bare, directory):
    """What it does with a driver is in cuda/test_cuda_loader.py: there it is typed, alone, too."""
    sentence, tops = run(bare, BOTH, directory).splitlines()
    assert sentence.endswith("not for a GPU; load it with bertile.load")
    assert ast.literal_eval(tops) == ["cuda_loader", "loader", "numpy"]


def test_joined_loader_is_typed_alone_as_a_command(bare, directory):
    line = [bare, "-I", "loader.py", "--ids", "1,2,3"]
    done = subprocess.run(line, cwd=directory, capture_output=True, text=True, env={}, timeout=60)
    assert done.returncode == 0, done.stderr
    first = ", ".join(
        f"{number:.4f}" for number in tiny_bundle.expected([[1, 2, 3]])["pooled"][0, :4]
    )
    assert f"output   pooled (1, 8): {first}, …" in done.stdout


@pytest.mark.parametrize("module", ["bertile.loader", "bertile.loading.command"])
def test_module_is_typed_as_a_command(module, directory):
    line = [sys.executable, "-m", module, str(directory)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "output   hidden (2, 8, 8): " in done.stdout, done.stderr
