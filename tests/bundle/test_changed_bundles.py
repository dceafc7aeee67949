"""A changed bundle gives one clear sentence or the right answer: in Python, and in C without a
memory fault.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import changed_bundles, tiny_bundle
from helpers.changed_bundles import INPUTS

from bertile import loader
from bertile.base.errors import BertileError, BundleError
from bertile.bundle import native_build, writer

# Of bundles and arrays that are always tried; a seed that fails in `make test-slow` is added there.
SEEDS = [int(line) for line in Path(__file__).with_name("seeds.txt").read_text().split()]
SANITIZED = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CHECKS = Path(tiny_bundle.__file__).with_name("native")
FUZZ_SECONDS = 60
PYTHON_BUNDLES = 2000


def build(folder: Path, interface: str | None) -> Path:
    tiny_bundle.python(
        f"import sys; sys.path.insert(0, {str(Path(tiny_bundle.__file__).parents[1])!r});"
        " from helpers import tiny_bundle;"
        f" tiny_bundle.build_library({str(folder / 'lib.so')!r}, {interface!r})"
    )
    parts = (tiny_bundle.MANIFEST, folder / "lib.so", tiny_bundle.PARAMS, [])
    return writer.write(*parts, folder / "tiny")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """The bundle of the tiny model, whose library says what it was compiled for."""
    return build(tmp_path_factory.mktemp("new"), changed_bundles.text())


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> Path:
    """A bundle as it was before manifests had a hash, and libraries said anything of themselves."""
    path = build(tmp_path_factory.mktemp("old"), None)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    changed_bundles.write_manifest(path, manifest, sealed=False)
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """check_bundles with the whole loader in it, by AddressSanitizer and UBSan."""
    command = native_build.SOURCES / "command"
    sources = [*native_build.library_sources(), CHECKS / "check_bundles.c"]
    sources += [command / name for name in ("npz.c", "npy.c", "inflate.c")]
    path = tmp_path_factory.mktemp("program") / "check_bundles"
    line = ["cc", *SANITIZED, "-std=c11", f"-I{native_build.SOURCES}", *sources, "-o", path]
    done = subprocess.run([*map(str, line), "-ldl", "-lpthread", "-lm"], capture_output=True)
    if b"asan" in done.stderr:
        pytest.skip("this cc has no address sanitizer")
    assert done.returncode == 0, done.stderr
    return path


def in_python(path: Path) -> tuple[int, str | dict]:
    """The exit code with a sentence, or 0 with the outputs."""
    try:
        with loader.load(path, 1) as model:
            return 0, model(**INPUTS)
    except BertileError as error:
        return error.exit_code, str(error)


def in_c(program: Path, paths: list[Path], kind: str = "bundle") -> list[tuple[int, str | dict]]:
    """The same of the C loader, of many bundles in one process."""
    runtime = program.parent / "runtime"
    if not runtime.exists():
        runtime.mkdir()
        for library in loader.find_runtime():
            (runtime / Path(library).name).symlink_to(library)
    lines = "".join(f"{kind} {path}\n" for path in paths)
    done = subprocess.run([program, runtime], input=lines, capture_output=True, text=True)
    answers = done.stdout.split("\n")[:-1]
    assert done.returncode == 0 and not done.stderr, (paths[len(answers)], done.stderr[-4000:])
    return [_answer(line) for line in answers]


def _answer(line: str) -> tuple[int, str | dict]:
    code, _, rest = line.partition(" ")
    if int(code):
        return int(code), rest
    outputs = [part.split() for part in rest.split(" | ")]
    return 0, {words[0]: np.array(words[1:], np.float32) for words in outputs}


def is_right(answer: tuple[int, str | dict]) -> bool:
    """Whether an answer is a sentence, or the right one."""
    code, said = answer
    if code:
        return code in (1, 2, 3) and len(said) > 10 and "\n" not in said
    wanted = tiny_bundle.expected(INPUTS["input_ids"], INPUTS["attention_mask"])
    return list(said) == list(wanted) and all(
        np.allclose(said[name].reshape(-1), wanted[name].reshape(-1), 1e-5, 1e-5) for name in wanted
    )


def variants(directory: Path, folder: Path, sealed: bool) -> dict[tuple, Path]:
    """A bundle for each number of the manifest and each of several others in its place."""
    manifest = json.loads((directory / "manifest.json").read_text())
    paths = {}
    for place in changed_bundles.numbers(manifest):
        number = changed_bundles.at(manifest, place)
        for new in {0, -1, 1, number - 1, number + 1, 1 << 31, 1 << 61, 1 << 64} - {number}:
            path = changed_bundles.link(directory, folder / str(len(paths)))
            changed_bundles.write_manifest(
                path, changed_bundles.changed(manifest, place, new), sealed=sealed
            )
            paths[(*place, new)] = path
    return paths


# -- a manifest that was changed


def test_unchanged_bundles_are_answered_rightly(directory, older, program):
    for path in (directory, older):
        assert is_right(in_python(path)) and in_python(path)[0] == 0
        (answer,) = in_c(program, [path])
        assert is_right(answer) and answer[0] == 0, answer


def test_hash_is_that_of_the_file_with_zeros_in_its_place(directory):
    data = (directory / "manifest.json").read_bytes()
    digest = json.loads(data)["sha256"]
    blank = data.replace(digest.encode(), b"0" * 64)
    (directory.parent / "blank").write_bytes(blank)
    done = subprocess.run(["sha256sum", directory.parent / "blank"], capture_output=True, text=True)
    assert done.stdout.split()[0] == digest


def test_every_changed_number_is_seen_by_the_hash(directory, tmp_path, program):
    paths = variants(directory, tmp_path, sealed=False)
    assert len(paths) > 80
    for (place, path), answer in zip(paths.items(), in_c(program, list(paths.values()))):
        assert answer == in_python(path) or place[0] == "schema", place
        if place[0] != "schema":
            what = f"{path / 'manifest.json'} has changed since it was compiled"
            assert answer == (1, f"{what}; copy or compile the bundle again"), place
        assert answer[0] == 1 and in_python(path)[0] == 1


def test_every_number_is_compared_with_the_library_and_the_weights(directory, tmp_path, program):
    """Whoever changes a number can also write the hash anew."""
    paths = variants(directory, tmp_path, sealed=True)
    for (place, path), answer in zip(paths.items(), in_c(program, list(paths.values()))):
        with pytest.raises(BundleError) as caught:
            loader.load(path)
        assert "\n" not in str(caught.value) and answer[0] == 1, (place, answer)


WRONG = {
    "fewer ids": lambda m: m["inputs"][0].update(below=49),
    "any id": lambda m: m["inputs"][0].update(below=None),
    "another dtype": lambda m: m["inputs"][0].update(dtype="int32"),
    "another default": lambda m: m["inputs"][1].update(default="zeros"),
    "inputs in another order": lambda m: m["inputs"].reverse(),
    "one input less": lambda m: m["inputs"].pop(),
    "one output less": lambda m: m["outputs"].pop(),
    "other names of outputs": lambda m: m["outputs"][0].update(name="hiddem"),
    "axes": lambda m: m["outputs"][1].update(axes=["batch", "length"]),
    "a static batch": lambda m: m["static"].update(batch=2),
    "a static length": lambda m: m["static"].update(length=16),
    "rows together": lambda m: m["static"].update(together=True),
    "no limit": lambda m: m["model"].update(max_length=None),
    "weights in another order": lambda m: m["params"].reverse(),
    "a weight less": lambda m: m["params"].pop(),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_else_a_manifest_says_is_compared_with_the_library(directory, tmp_path, program, case):
    path = changed_bundles.link(directory, tmp_path / "changed")
    manifest = json.loads((path / "manifest.json").read_text())
    WRONG[case](manifest)
    changed_bundles.write_manifest(path, manifest)
    with pytest.raises(BundleError) as caught:
        loader.load(path)
    (answer,) = in_c(program, [path])
    assert answer == (1, str(caught.value))


def test_changed_numbers_of_older_bundles_are_refused_or_do_no_harm(older, tmp_path, program):
    """Nothing tells what such a library was compiled for; what would read beyond memory is."""
    paths = variants(older, tmp_path, sealed=False)
    known = ("lanes", "outputs", "files", "schema")
    for (place, path), answer in zip(paths.items(), in_c(program, list(paths.values()))):
        answers = (answer, in_python(path))
        assert all(map(is_right, answers)), (place, answers)
        assert place[0] not in known or all(code for code, _ in answers), (place, answers)


# -- bundles that a seed changes


@pytest.mark.parametrize("seed", SEEDS)
def test_kept_seeds_give_a_sentence_or_the_right_answer(directory, tmp_path, program, seed):
    path = changed_bundles.by_seed(directory, tmp_path / "bundle", seed)
    assert is_right(in_python(path))
    (answer,) = in_c(program, [path])
    assert is_right(answer), answer
    arrays = changed_bundles.arrays_by_seed(tmp_path / "arrays.npz", seed)
    assert in_c(program, [arrays], "arrays")[0][0] in (0, 2)


@pytest.mark.slow
def test_c_loader_answers_changed_bundles_for_a_minute(directory, older, tmp_path, program):
    """A failure names a directory, whose name is the seed to be kept."""
    ends, seed = time.monotonic() + FUZZ_SECONDS, int(time.time()) * 1000
    while time.monotonic() < ends:
        seeds = range(seed, seed := seed + 100)
        paths = [changed_bundles.by_seed(directory, tmp_path / str(new), new) for new in seeds]
        for path, answer in zip(paths, in_c(program, paths), strict=True):
            assert is_right(answer), (path.name, answer)
        for path in paths:
            shutil.rmtree(path)
        # nothing tells what an older library was compiled for, so that any answer will do
        paths = [changed_bundles.by_seed(older, tmp_path / str(new), new) for new in seeds]
        assert len(in_c(program, paths)) == len(paths)
        paths = [changed_bundles.arrays_by_seed(tmp_path / f"{new}.npz", new) for new in seeds]
        for path, answer in zip(paths, in_c(program, paths, "arrays"), strict=True):
            assert answer[0] in (0, 1, 2), (path.name, answer)


@pytest.mark.slow
def test_python_loader_answers_two_thousand_changed_bundles(directory, tmp_path):
    """In a process of its own, which a fault would end; its last line is the seed that failed."""
    code = f"""
import sys, time
from pathlib import Path
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
import test_changed_bundles as test
from helpers import changed_bundles
first = int(time.time()) * 10000
bundle, folder = Path({str(directory)!r}), Path({str(tmp_path)!r})
for seed in range(first, first + {PYTHON_BUNDLES}):
    print(seed, flush=True)
    answer = test.in_python(changed_bundles.by_seed(bundle, folder / str(seed), seed))
    assert test.is_right(answer), answer
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seeds = done.stdout.split()
    assert done.returncode == 0, (seeds[-1:], done.stderr[-4000:])
    assert len(seeds) == PYTHON_BUNDLES
