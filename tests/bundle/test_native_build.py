"""The C loader does what loader.py does, refuses with its sentences, and has no memory faults."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import tiny_bundle
from helpers.lookups import VOCABULARY, lookups
from onnx import TensorProto

import bertile
from bertile import loader
from bertile.base.errors import BertileError
from bertile.bundle import native_build, writer
from bertile.config import Config
from bertile.targets.rows import native

SANITIZED = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RACES = ("-g", "-O1", "-fsanitize=thread")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror")
CHECKS = Path(tiny_bundle.__file__).with_name("native")

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="this machine has no cc")


@pytest.fixture(scope="module")
def directory(stages, tmp_path_factory) -> Path:
    """The bundle of the tiny model, with the runtime libraries."""
    library, place = tiny_bundle.library(stages), tmp_path_factory.mktemp("native") / "tiny"
    parts = (tiny_bundle.MANIFEST, library, tiny_bundle.PARAMS, [], place)
    return writer.write(*parts, add=writer.include_runtime)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """bertile-run and libbertile.so that report every fault of memory and end with it."""
    place = tmp_path_factory.mktemp("built")
    try:
        native_build.build(native(), place, ("cc",), *SANITIZED, *WARNINGS)
    except BertileError as error:
        if "asan" not in str(error):
            raise
        pytest.skip("this cc has no address sanitizer")
    return place


@pytest.fixture
def damaged(directory, tmp_path) -> Path:
    """A copy of the bundle, to be changed."""
    return Path(shutil.copytree(directory, tmp_path / "copy"))


@pytest.fixture(scope="module")
def model(directory):
    with loader.load(directory) as loaded:
        yield loaded


def start(program: Path, *arguments: object) -> subprocess.CompletedProcess:
    line = [str(program), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def run(built: Path, directory: Path, folder: Path, inputs: dict, *options: str) -> dict:
    """The outputs of bertile-run on those inputs."""
    np.savez(folder / "in.npz", **inputs)
    files = ("--input", folder / "in.npz", "--output", folder / "out.npz")
    done = start(built / "bertile-run", directory, *files, *options)
    assert (done.returncode, done.stderr) == (0, "")
    with np.load(folder / "out.npz") as arrays:
        return dict(arrays)


def refusal(built: Path, *arguments: object) -> tuple[int, str]:
    done = start(built / "bertile-run", *arguments)
    assert done.stderr.startswith("bertile-run: ") and done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr.removeprefix("bertile-run: ").strip()


def compile_check(
    source: str, built: Path, compiler: str = "cc", flags: Sequence[str] = SANITIZED
) -> Path:
    program = built / Path(source).stem
    headers = f"-I{native_build.SOURCES}"
    line = [compiler, *flags, headers, str(CHECKS / source), "-o", str(program)]
    if source == "check_json.c":
        line.append(str(native_build.SOURCES / "json.c"))
    else:
        line += [f"-L{built}", "-lbertile", f"-Wl,-rpath,{built}", "-lpthread"]
    subprocess.run(line, check=True)
    return program


# -- running


@pytest.mark.parametrize("batch, length", [(1, 1), (3, 17), (30, 64)])
def test_outputs_are_those_of_the_tiny_bundle(built, directory, model, tmp_path, batch, length):
    random = np.random.default_rng(length)
    inputs = {
        "input_ids": random.integers(0, 50, (batch, length)).astype(np.int32),
        "attention_mask": random.random((batch, length)) < 0.5,
        "token_type_ids": random.integers(0, 2, (batch, length), dtype=np.uint8),
    }
    outputs = run(built, directory, tmp_path, inputs)
    tiny_bundle.assert_same(outputs, model(**inputs))
    for name, array in model(**inputs).items():
        np.testing.assert_array_equal(outputs[name], array)


def test_missing_inputs_are_filled_in(built, directory, tmp_path):
    ids = tiny_bundle.random_ids(2, 5)
    outputs = run(built, directory, tmp_path, {"input_ids": ids}, "--threads", "1")
    tiny_bundle.assert_same(outputs, tiny_bundle.expected(ids))


def test_static_shapes_are_padded_to_and_cut_back(built, damaged, tmp_path):
    static = {"batch": 2, "length": 16}
    tiny_bundle.change_manifest(damaged, lambda m: m.update(static=static))
    ids = tiny_bundle.random_ids(5, 7)
    mask = np.ones_like(ids)
    mask[1, 3:] = 0
    outputs = run(built, damaged, tmp_path, {"input_ids": ids, "attention_mask": mask})
    with loader.load(damaged) as model:
        tiny_bundle.assert_same(outputs, model(input_ids=ids, attention_mask=mask))


@pytest.mark.parametrize("static", [{"together": True}, {"padded": True}], ids=str)
def test_how_far_outputs_see_is_read_as_in_python(built, damaged, tmp_path, static):
    tiny_bundle.change_manifest(damaged, lambda m: m.update(static=static))
    ids = tiny_bundle.random_ids(40, 33)
    mask = (np.arange(33) < 1 + np.arange(40)[:, None] % 33).astype("int64")
    outputs = run(built, damaged, tmp_path, {"input_ids": ids, "attention_mask": mask})
    with loader.load(damaged) as model:
        for name, array in model(input_ids=ids, attention_mask=mask).items():
            np.testing.assert_array_equal(outputs[name], array)


def test_rows_that_go_together_are_not_filled_up(built, damaged, tmp_path):
    static = {"batch": 4, "together": True}
    tiny_bundle.change_manifest(damaged, lambda m: m.update(static=static))
    np.savez(tmp_path / "in.npz", input_ids=tiny_bundle.random_ids(3, 5))
    with loader.load(damaged) as model, pytest.raises(BertileError) as caught:
        model(input_ids=tiny_bundle.random_ids(3, 5))
    refused = refusal(built, damaged, "--input", tmp_path / "in.npz")
    assert refused == (2, str(caught.value))


def test_ids_on_the_command_line_print_the_lines_of_loader_py(built, directory):
    done = start(built / "bertile-run", directory, "--ids", "1, 2 3", "--repeat", "3")
    first = tiny_bundle.expected([[1, 2, 3]])["pooled"][0, :4]
    numbers = ", ".join(f"{value:.4f}" for value in first)
    assert done.returncode == 0
    assert "model    tiny (bert, encoder, at most 64 tokens)\n" in done.stdout
    assert f"output   pooled (1, 8): {numbers}, …\n" in done.stdout
    assert " of 3 runs\n" in done.stdout


def test_without_inputs_it_runs_the_bundle_it_lies_in(built, damaged):
    shutil.copy(built / "bertile-run", damaged / "bertile-run")
    done = start(damaged / "bertile-run")
    assert done.returncode == 0, done.stderr
    assert "input    input_ids (2, 8)\noutput   hidden (2, 8, 8): " in done.stdout


def test_compressed_arrays_and_single_arrays_are_read(built, directory, tmp_path):
    ids = tiny_bundle.random_ids(40, 60)
    wanted = tiny_bundle.expected(ids)
    np.savez_compressed(tmp_path / "packed.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    np.save(tmp_path / "single.npy", ids)
    for name in ("packed.npz", "single.npy"):
        files = ("--input", tmp_path / name, "--output", tmp_path / "out.npy")
        assert start(built / "bertile-run", directory, *files).returncode == 0
        tiny_bundle.assert_same(
            {"hidden": np.load(tmp_path / "out.npy")}, {"hidden": wanted["hidden"]}
        )


def test_damaged_arrays_are_refused(built, directory, tmp_path):
    np.savez_compressed(tmp_path / "in.npz", input_ids=tiny_bundle.random_ids(4, 60))
    data = (tmp_path / "in.npz").read_bytes()
    random, codes = np.random.default_rng(0), set()
    for number in range(12):
        changed = bytearray(data[: len(data) - 40 * (number % 2)])
        for place in random.integers(0, len(data) - 80, 6):
            changed[place] = random.integers(0, 256)
        (tmp_path / "bad.npz").write_bytes(changed)
        done = start(built / "bertile-run", directory, "--input", tmp_path / "bad.npz")
        assert "ERROR: " not in done.stderr and "runtime error" not in done.stderr, done.stderr
        codes.add(done.returncode)
    assert 2 in codes and codes <= {0, 2}


def test_missing_positions_count_from_0(built, tmp_path):
    kinds = {"input_ids": TensorProto.INT64, "position_ids": TensorProto.INT32}
    onnx.save(lookups(**kinds), tmp_path / "m.onnx")
    config = Config(cache_dir=str(tmp_path / "cache"), runtime="include")
    bertile.compile(tmp_path / "m.onnx", tmp_path / "out", config)
    ids = np.random.default_rng(2).integers(0, VOCABULARY, (3, 21))
    counted = np.broadcast_to(np.arange(21), (3, 21))
    with loader.load(tmp_path / "out") as model:
        for places in (None, counted, counted[:, ::-1]):
            inputs = {"input_ids": ids, "position_ids": places}
            np.savez(tmp_path / "in.npz", **{k: v for k, v in inputs.items() if v is not None})
            files = ("--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz")
            done = start(built / "bertile-run", tmp_path / "out", *files)
            assert done.returncode == 0, done.stderr
            name = "last_hidden_state"
            assert np.array_equal(np.load(tmp_path / "out.npz")[name], model(**inputs)[name])


# -- refusing

# What no .npz file can hold, or what its reader says in its own words.
NOT_IN_FILES = {
    *("a row of none", "uneven", "text", "huge"),
    *("nothing", "floats", "float mask", "unknown name"),
}
WRONG = {name: case for name, case in tiny_bundle.WRONG_INPUTS.items() if name not in NOT_IN_FILES}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_with_the_same_sentence(built, directory, model, tmp_path, case):
    inputs = {
        name: np.asarray(value, None if np.size(value) else np.int64)
        for name, value in WRONG[case][0].items()
    }
    with pytest.raises(BertileError) as caught:
        model(**inputs)
    np.savez(tmp_path / "in.npz", **inputs)
    refused = refusal(built, directory, "--input", tmp_path / "in.npz")
    assert refused == (2, str(caught.value))


def test_unknown_names_and_floats_are_refused(built, directory, tmp_path):
    np.savez(tmp_path / "in.npz", input_idz=np.ones((1, 1), int))
    code, text = refusal(built, directory, "--input", tmp_path / "in.npz")
    known = "input_ids, attention_mask, token_type_ids"
    assert (code, text) == (2, f"the model has no input 'input_idz'; known: {known}")
    np.savez(tmp_path / "in.npz", input_ids=np.ones((1, 1)))
    refused = refusal(built, directory, "--input", tmp_path / "in.npz")
    assert refused == (2, "input_ids does not hold integers; give integers")


OPTIONS = {
    "ids": (["--ids", "1 x"], "'1 x' is not a list of ids; write them as 101 7592 102"),
    "threads": (["--threads", "0"], "--threads is '0'; give a whole number from 1"),
    "cores": (["--threads", "9999"], "threads is 9999, but this process may use "),
    "option": (["--idz", "1"], "option '--idz' is unknown; see: bertile-run --help"),
    "no value": (["--ids"], "option '--ids' lacks its value"),
    "both": (["--ids", "1", "--input", "x"], "--ids and --input were both given"),
    "no file": (["--input", "/nothing"], "cannot read /nothing: No such file or directory"),
    "ending": (["--ids", "1", "--output", "/tmp/x.txt"], "is neither .npz nor .npy"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_wrong_options_are_refused(built, directory, case):
    options, sentence = OPTIONS[case]
    code, text = refusal(built, directory, *options)
    assert code == 2 and sentence in text


def change(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def edit(**changes: object):
    return lambda path: tiny_bundle.change_manifest(path, lambda m: m.update(changes))


def outside(path: Path) -> None:
    (path.parent / "secret").write_text("s")
    (path / "link").symlink_to("../secret")
    entry = {"bytes": 1, "sha256": ""}
    tiny_bundle.change_manifest(path, lambda m: m["files"].update({"link": entry}))


DAMAGE = {
    "missing file": lambda path: (path / "lib.so").unlink(),
    "truncated file": lambda path: os.truncate(path / "params.safetensors", 100),
    "changed weights": lambda path: change(path / "params.safetensors", -1),
    "changed library": lambda path: change(path / "lib.so", 1000),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "no schema": lambda path: (path / "manifest.json").write_text("{}"),
    "outside": outside,
    "lanes": edit(lanes=0),
    "inputs": edit(inputs=[]),
    "no architecture": edit(target={"features": []}),
    "riscv": edit(target={"arch": "riscv64", "features": []}),
    "feature": edit(target={"name": "x", "arch": platform.machine(), "features": ["sve9"]}),
    "entry": edit(entry="absent"),
}
SAME = {"missing file", "truncated file", "changed weights", "changed library", "no manifest"}
SAME |= {"no schema", "outside", "riscv", "feature"}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_bundles_are_refused_as_python_does(built, damaged, case):
    DAMAGE[case](damaged)
    with pytest.raises(BertileError) as caught:
        loader.load(damaged)
    code, text = refusal(built, damaged)
    assert code == caught.value.exit_code
    assert text == str(caught.value) if case in SAME else text.startswith(str(caught.value)[:25])


@pytest.mark.parametrize("case", tiny_bundle.DAMAGED_WEIGHTS)
def test_damaged_weights_are_refused(built, damaged, case):
    path = damaged / "params.safetensors"
    path.write_bytes(tiny_bundle.DAMAGED_WEIGHTS[case](path.read_bytes()))
    size = path.stat().st_size
    tiny_bundle.change_manifest(damaged, lambda m: m["files"][path.name].update(bytes=size))
    code, text = refusal(built, damaged, "--skip-hashes")
    assert code == 1 and text.startswith(f"{path} is damaged: ")


def test_a_bundle_for_a_gpu_is_refused_by_name(built, damaged):
    def change(manifest: dict) -> None:
        manifest["target"] = {"name": "cuda-sm90", "arch": "cuda", "features": ["sm_90"]}
        del manifest["files"]["lib.so"]

    tiny_bundle.change_manifest(damaged, change)
    code, text = refusal(built, damaged)
    assert code == 3
    assert text == (
        "the bundle is for a GPU, which only the Python loader uses; run it with loader.py"
    )


def test_a_bundle_without_runtime_says_what_is_missing(built, damaged):
    shutil.rmtree(damaged / "runtime")

    def without(manifest: dict) -> None:
        manifest["files"] = {k: v for k, v in manifest["files"].items() if "/" not in k}

    tiny_bundle.change_manifest(damaged, without)
    code, text = refusal(built, damaged)
    assert code == 3 and text.endswith("compile without --no-runtime, or give its directory")
    libraries = Path(loader.find_runtime()[1]).parent
    done = start(built / "bertile-run", damaged, "--runtime", libraries)
    assert done.returncode == 3 and "libtvm_ffi.so" in done.stderr


# -- the parts


def test_json_is_read_strictly_and_without_faults(built, directory):
    program = compile_check("check_json.c", built)
    whole, cut, damaged = start(program, directory / "manifest.json").stdout.split()
    assert (whole, cut) == ("1", "0")
    assert 0 < int(damaged) < 20000
    texts = [
        "[]",
        "{",
        "[1,]",
        '{"a":1,}',
        '"\\ud83d\\ude00"',
        '"\\ud83d"',
        "01",
        "-",
        "1.",
        "1e+2",
    ]
    texts += ["nul", "truefalse", "[1 2]", '{"a" 1}', '"\t"', "[" * 300, "1e400", "", " null "]
    answers = start(program, "-", *texts).stdout.split()
    assert answers == [("yes" if _is_json(text) else "no") for text in texts]


def _is_json(text: str) -> bool:
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


def test_threads_and_forks_get_the_same_numbers(built, directory):
    done = start(compile_check("check_threads.c", built), directory)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 wrong\n", "")


@pytest.mark.slow
def test_threads_do_not_race_in_the_loader(directory, tmp_path):
    """By ThreadSanitizer, which sees the loader and not the TVM runtime behind it."""
    try:
        native_build.build(native(), tmp_path, ("cc",), *RACES)
    except BertileError as error:
        if "tsan" not in str(error):
            raise
        pytest.skip("this cc has no thread sanitizer")
    program = compile_check("check_threads.c", tmp_path, flags=RACES)
    # the check forks, and the child has a thread of its own
    environment = {**os.environ, "TSAN_OPTIONS": "die_after_fork=0"}
    done = subprocess.run(
        [program, directory], capture_output=True, text=True, timeout=60, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 wrong\n", "")
    # a child that starts a thread beside the ones that it lacks is more than the sanitizer follows
    forks = compile_check("check_forks.c", tmp_path, flags=RACES)
    done = subprocess.run(
        [forks, directory, "only exits"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 wrong\n", "")


def test_cpp_header_runs_a_model_and_throws(built, directory):
    done = start(compile_check("check_cpp.cpp", built, "c++"), directory)
    pooled = tiny_bundle.expected([[1, 2, 3]])["pooled"][0]
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"pooled {' '.join(f'{value:.4f}' for value in pooled)}",
        "2 input_ids[0, 0] is 50, the model takes 0 to 49",
        "1 /nothing is not a bundle: it has no manifest.json",
    ]


@pytest.fixture(scope="module")
def whole(directory, tmp_path_factory) -> Path:
    """A bundle with both loaders, as a compile writes it."""
    folder = tmp_path_factory.mktemp("whole")
    native_build.build(native(), folder / "native")
    add = partial(writer.include_runtime, native=folder / "native")
    library = directory / "lib.so"
    parts = (tiny_bundle.MANIFEST, library, tiny_bundle.PARAMS, [], folder / "tiny")
    return writer.write(*parts, add=add)


@pytest.fixture(scope="module")
def forks(whole, tmp_path_factory) -> Path:
    """Not by AddressSanitizer: its memory may be locked for ever in a child of several threads."""
    program, library = tmp_path_factory.mktemp("forks") / "check_forks", whole / "runtime"
    line = ["cc", "-g", "-O1", f"-I{native_build.SOURCES}", CHECKS / "check_forks.c", "-o", program]
    line += [f"-L{library}", "-lbertile", f"-Wl,-rpath,{library}", "-lpthread"]
    subprocess.run(line, check=True)
    return program


CHILDREN = (
    "only exits",
    "calls",
    "closes",
    "calls and closes",
    "changes threads",
    "opens",
    "forks",
)


@pytest.mark.parametrize("child", [*CHILDREN, "forks"])
def test_a_process_may_fork_while_other_threads_call_and_open(forks, whole, child):
    done = start(forks, whole, child)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 wrong\n", "")


def test_a_process_may_fork_in_python_while_the_c_loader_is_in_a_call(whole):
    """By ctypes, which lets other threads of Python go on, one of them to os.fork."""
    code = f"""
import ctypes, os, signal, threading
bertile = ctypes.CDLL({str(whole / "runtime/libbertile.so")!r})
class Tensor(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("dtype", ctypes.c_int), ("rank", ctypes.c_int32),
                ("shape", ctypes.c_void_p), ("data", ctypes.c_void_p)]
shape, ids = (ctypes.c_int64 * 2)(8, 60), (ctypes.c_int64 * 480)(*(n % 50 for n in range(480)))
tensor = Tensor(b"input_ids", 4, 2, ctypes.addressof(shape), ctypes.addressof(ids))
model = ctypes.c_void_p()
assert bertile.bertile_open({os.fsencode(whole)!r}, None, ctypes.byref(model)) == 0
def call():
    result = ctypes.c_void_p()
    status = bertile.bertile_run(model, ctypes.byref(tensor), 1, ctypes.byref(result))
    bertile.bertile_free(result)
    return status
stop = threading.Event()
def ask():
    while not stop.is_set(): call()
threads = [threading.Thread(target=ask) for _ in range(2)]
for thread in threads: thread.start()
children = []
for _ in range(10):
    children.append(os.fork())
    if not children[-1]:
        signal.alarm(20)
        os._exit(7 + call())
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
stop.set()
for thread in threads: thread.join()
"""
    assert tiny_bundle.python(code).split() == ["7"] * 10


def test_bundle_is_linked_with_what_pkg_config_says(whole, tmp_path):
    if shutil.which("pkg-config") is None:
        pytest.skip("this machine has no pkg-config")
    listed = start(shutil.which("pkg-config"), "--cflags", "--libs", whole / "native/bertile.pc")
    program = tmp_path / "program"
    line = ["cc", str(CHECKS / "check_threads.c"), "-o", str(program), *listed.stdout.split()]
    subprocess.run([*line, "-lpthread"], check=True)
    done = start(program, whole)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 wrong\n", "")


def test_bundle_runs_itself(whole, tmp_path):
    moved = shutil.copytree(whole, tmp_path / "moved")
    done = start(moved / "bertile-run", "--ids", "1 2 3")
    assert done.returncode == 0, done.stderr
    assert "output   hidden (1, 3, 8): " in done.stdout


@pytest.mark.slow
def test_sources_in_the_bundle_build_with_cmake(whole, tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("this machine has no cmake")
    cmake, build, prefix = shutil.which("cmake"), tmp_path / "build", tmp_path / "prefix"
    options = ("-DBUILD_SHARED_LIBS=ON", "-DBERTILE_EXAMPLE=ON")
    for arguments in (
        ("-S", whole / "native", "-B", build, *options),
        ("--build", build),
        ("--install", build, "--prefix", prefix),
    ):
        done = start(cmake, *arguments)
        assert done.returncode == 0, done.stderr
    done = start(prefix / "bin/bertile-run", whole, "--ids", "1 2 3")
    assert done.returncode == 0, done.stderr
    done = start(build / "bertile-example", whole)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "example: input_ids[0, 0] is 101, the model takes 0 to 49\n"
    (file,) = prefix.rglob("bertile.pc")
    assert f"{prefix}" not in file.read_text() and "prefix=${pcfiledir}/../.." in file.read_text()


def test_library_shows_nothing_but_its_interface(built):
    if shutil.which("nm") is None:
        pytest.skip("this machine has no nm")
    listed = start(shutil.which("nm"), "-D", "--defined-only", built / "libbertile.so").stdout
    names = {line.split()[-1] for line in listed.splitlines() if " T " in line}
    header = (native_build.SOURCES / "bertile.h").read_text()
    declared = {name for name in names if f" {name}(" in header or f"*{name}(" in header}
    assert declared == {name for name in names if not name.startswith("_")}
    assert "bertile_run" in declared
