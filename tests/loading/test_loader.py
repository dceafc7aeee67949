"""The loader runs a bundle like numpy does, refuses what would crash, and needs only numpy."""

import ast
import gc
import os
import shutil
import subprocess
import sys
import threading
import venv
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_bundle
from helpers.tiny_bundle import (
    DAMAGED_WEIGHTS,
    MANIFEST,
    PARAMS,
    WRONG_INPUTS,
    assert_same,
    change_manifest,
    expected,
    python,
    random_ids,
)

from bertile import loader
from bertile.base.errors import BertileError, BundleError, InputError, PlatformError
from bertile.bundle import one_file, writer
from bertile.loading import platform as this_platform
from bertile.loading import runtime
from bertile.loading.batch import Planner


@pytest.fixture(scope="module")
def library(stages):
    return tiny_bundle.library(stages)


@pytest.fixture(scope="module")
def directory(library, tmp_path_factory):
    """A bundle without the runtime libraries; not to be changed."""
    return writer.write(MANIFEST, library, PARAMS, [], tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def damaged(directory, tmp_path):
    """A copy of the bundle, to be changed."""
    return Path(shutil.copytree(directory, tmp_path / "copy"))


@pytest.fixture(scope="module")
def model(directory):
    """The loaded bundle."""
    with loader.load(directory) as loaded:
        yield loaded


# -- calls


@pytest.mark.parametrize("batch, length", [(1, 1), (1, 16), (3, 17), (2, 64)])
def test_call_equals_numpy(model, batch, length):
    random = np.random.default_rng(batch * length)
    ids, types = random.integers(0, 50, (batch, length)), random.integers(0, 2, (batch, length))
    mask = random.integers(0, 2, (batch, length))
    outputs = model(input_ids=ids, attention_mask=mask, token_type_ids=types)
    assert_same(outputs, expected(ids, mask, types))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"])
def test_call_takes_any_integer(model, dtype):
    ids = random_ids(2, 5)
    assert_same(model(input_ids=ids.astype(dtype)), expected(ids))


def test_call_takes_lists_and_boolean_masks(model):
    ids, mask = [[1, 2, 3], [4, 5, 0]], [[True, True, True], [True, True, False]]
    assert_same(model(input_ids=ids, attention_mask=np.array(mask)), expected(ids, mask))


def test_call_takes_arrays_that_are_not_contiguous_or_writable(model):
    ids = random_ids(10, 6)[::2, ::-1]
    ids.flags.writeable = False
    assert_same(model(input_ids=ids), expected(ids))


def test_call_fills_in_what_is_none(model):
    ids = random_ids(2, 5)
    assert_same(model(input_ids=ids, attention_mask=None, token_type_ids=None), expected(ids))


def test_call_gives_zeros_behind_the_last_token(model):
    mask = [[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
    hidden = model(input_ids=random_ids(2, 6), attention_mask=mask)["hidden"]
    assert (hidden[0, 4:] == 0).all() and (hidden[0, :4] != 0).all() and (hidden[1] != 0).all()


def test_call_gives_arrays_that_later_calls_leave_alone(model):
    first = model(input_ids=[[1, 2]])
    kept = {name: array.copy() for name, array in first.items()}
    model(input_ids=[[3, 4]])
    for name, array in first.items():
        np.testing.assert_array_equal(array, kept[name])
        assert array.flags.owndata and array.flags.writeable
        array.fill(7)
    assert_same(model(input_ids=[[1, 2]]), kept)


def test_call_leaves_the_callers_arrays_alone(model):
    ids, mask = random_ids(2, 8), np.ones((2, 8), np.int64)
    kept = ids.copy()
    ids.flags.writeable = mask.flags.writeable = False
    for _ in range(2):
        model(input_ids=ids, attention_mask=mask)
    np.testing.assert_array_equal(ids, kept)
    assert mask.all()


def test_model_describes_itself(model):
    assert model.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert model.outputs == ("hidden", "pooled", "blocks")
    assert model.max_length == 64
    assert model.manifest["entry"] == "main"


class Raising:
    """Another library's array, which does not become numpy's."""

    def __init__(self, error, by="__array__"):
        self.error, self.by = error, by

    def __array__(self, *_, **__):
        if self.by == "__array__":
            raise self.error
        return self.by

    def __len__(self):
        raise self.error

    def __getitem__(self, index):
        raise self.error


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no text")


FOREIGN = {
    "type error": Raising(TypeError("it is on cuda:0")),
    "value error": Raising(ValueError("bad\nvalue")),
    "runtime error": Raising(RuntimeError("it requires grad")),
    "memory error": Raising(MemoryError()),
    "attribute error": Raising(AttributeError("no")),
    "own error": Raising(Unspeakable()),
    "no array": Raising(IndexError("x"), by="text"),
    "within a list": [[Raising(KeyError("x"))]],
    "objects": np.array([[1, None]], object),
    "an object": object(),
    "strings": np.array([["1", "2"]]),
    "bytes": np.array([[b"1"]]),
    "dates": np.array([["2020-01-01"]], "datetime64[D]"),
    "durations": np.array([[3]], "timedelta64[s]"),
    "complex": np.array([[1j]]),
    "records": np.array([[(1, 2)]], [("a", "i4"), ("b", "i4")]),
    "raw": np.zeros((1, 2), "V8"),
    "long doubles": np.full((1, 2), 0.5, np.longdouble),
    "empty dates": np.zeros((0, 2), "datetime64[s]"),
    "a set": {1, 2},
    "a dictionary": {"a": 1},
    "a generator": (number for number in [1]),
    "deep": [[[[[[[[]]]]]]]],
}


@pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
@pytest.mark.parametrize("case", FOREIGN)
def test_call_refuses_what_is_no_array_of_integers(model, case, name):
    inputs = {"input_ids": [[1, 2]], name: FOREIGN[case]}
    with pytest.raises(InputError, match=f"^{name} ") as caught:
        model(**inputs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert_same(model(input_ids=[[1, 2]]), expected([[1, 2]]))


def test_call_says_what_another_library_says(model):
    with pytest.raises(
        InputError, match=r"cannot be read as an array: TypeError: it is on cuda:0$"
    ):
        model(input_ids=FOREIGN["type error"])
    with pytest.raises(InputError, match=r"cannot be read as an array: ValueError: bad$"):
        model(input_ids=FOREIGN["value error"])
    with pytest.raises(KeyboardInterrupt):  # which is no fault of an array
        model(input_ids=Raising(KeyboardInterrupt()))


@pytest.mark.parametrize("dtype", [">i8", ">i4", "<u2", "u8", "i1", "?"])
def test_call_takes_integers_of_any_kind(model, dtype):
    ids = np.array([[1, 0, 1]])
    assert_same(model(input_ids=ids.astype(dtype)), expected(ids))


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_call_refuses_wrong_input(model, case):
    inputs, message = WRONG_INPUTS[case]
    with pytest.raises(InputError) as caught:
        model(**inputs)
    assert message in str(caught.value)


def test_call_raises_what_tvm_reports(model):
    tokens = [random_ids(1, 4)] * 3
    with pytest.raises(BertileError, match=r"TVM reports: .*3 vs\. 4"):
        model._run(tokens, np.zeros((1, 3), np.int32), (1, 4), (1, 4))
    assert_same(model(input_ids=[[1]]), expected([[1]]))


def test_call_on_a_closed_model_says_so(directory):
    with loader.load(directory) as closed:
        closed(input_ids=[[1]])
    closed.close()
    with pytest.raises(BertileError, match="the model is closed; load the bundle again"):
        closed(input_ids=[[1]])


# -- blocks


BLOCKS = {
    "one token": ([[1]], [[0, 0, 0, 1]]),
    "padding": ([[1, 1, 0, 0, 0]], [[0, 0, 0, 1]]),
    "a full block": ([[1, 1, 1, 1]], [[0, 0, 0, 1]]),
    "one token more": ([[1, 1, 1, 1, 1]], [[0, 0, 0, 2], [0, 4, 0, 2]]),
    "hole": ([[1, 0, 0, 0, 0, 1]], [[0, 0, 0, 2], [0, 4, 0, 2]]),
    "padding on the left": ([[0, 0, 0, 0, 0, 1]], [[0, 0, 0, 2], [0, 4, 0, 2]]),
    "a row of zeros": ([[0, 0, 0, 0, 0]], [[0, 0, 0, 1]]),
    "unequal lengths": (
        [[1] * 9, [1] * 3 + [0] * 6, [0] * 9, [1] * 5 + [0] * 4],
        [
            *([0, 0, 0, 3], [0, 4, 0, 3], [0, 8, 0, 3]),
            *([1, 0, 3, 1], [2, 0, 4, 1]),
            *([3, 0, 5, 2], [3, 4, 5, 2]),
        ],
    ),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_token_blocks_are_those_of_the_contract(case):
    mask, wanted = BLOCKS[case]
    table = loader.token_blocks(np.array(mask), 4)
    assert table.dtype == np.int32
    np.testing.assert_array_equal(table, wanted)


@pytest.mark.parametrize("seed", range(5))
def test_token_blocks_equal_a_plain_loop(seed):
    random = np.random.default_rng(seed)
    mask = random.random((random.integers(1, 9), random.integers(1, 70))) < random.random()
    wanted = []
    for row, entries in enumerate(mask):
        tokens = max(np.flatnonzero(entries), default=0) + 1
        first, count = len(wanted), -(-tokens // 16)
        wanted += [[row, 16 * block, first, count] for block in range(count)]
    np.testing.assert_array_equal(loader.token_blocks(mask, 16), wanted)


# -- passes


@pytest.mark.parametrize(
    "ends, limit, wanted",
    [
        ([5], 2, [(0, 1)]),
        ([16, 16, 16], 2, [(0, 2), (2, 1)]),
        ([17, 16, 16, 1], 2, [(0, 1), (1, 2), (3, 1)]),
        ([100, 1, 100], 2, [(0, 1), (1, 1), (2, 1)]),
    ],
)
def test_passes_have_at_most_so_many_blocks_or_one_row(ends, limit, wanted):
    assert loader.passes(np.array(ends), 16, limit, None) == wanted


@pytest.mark.parametrize("batch, length", [(3, 16), (5, 20), (9, 7)])
def test_a_long_batch_takes_several_passes(model, batch, length, monkeypatch):
    counts, run = [], model._run
    monkeypatch.setattr(model, "pass_blocks", model.threads)
    monkeypatch.setattr(model, "_run", lambda a, b, *c: counts.append(len(b)) or run(a, b, *c))
    ids = random_ids(batch, length)
    mask = np.ones_like(ids)
    mask[1, length // 2 :] = 0
    outputs, wanted = model(input_ids=ids, attention_mask=mask), expected(ids, mask)
    np.testing.assert_allclose(outputs["hidden"], wanted["hidden"], rtol=1e-5)
    np.testing.assert_allclose(outputs["pooled"], wanted["pooled"], rtol=1e-4, atol=1e-5)
    assert len(counts) > 1
    assert max(counts) <= max(model.threads, -(-length // 16))


# -- static shapes


@pytest.fixture
def static(damaged):
    """The model as if it had been compiled for batches of 2 and 16 tokens."""
    change_manifest(damaged, lambda m: m.update(static={"batch": 2, "length": 16}))
    with loader.load(damaged) as loaded:
        yield loaded


@pytest.mark.parametrize("batch, length", [(1, 5), (2, 16), (3, 7), (5, 16)])
def test_static_shapes_are_padded_to_and_cut_back(static, batch, length, monkeypatch):
    shapes, run = [], static._run
    monkeypatch.setattr(static, "_run", lambda *a: shapes.append(a[-1]) or run(*a))
    ids = random_ids(batch, length)
    outputs = static(input_ids=ids)
    wanted = expected(ids)
    np.testing.assert_allclose(outputs["hidden"], wanted["hidden"], rtol=1e-5)
    np.testing.assert_allclose(outputs["pooled"], wanted["pooled"], rtol=1e-4, atol=1e-5)
    assert outputs["blocks"].shape == (batch, 4)
    assert shapes == [(2, 16)] * -(-batch // 2)


def test_static_length_refuses_more_tokens(static):
    with pytest.raises(InputError, match="has 17 tokens, this bundle takes at most 16"):
        static(input_ids=np.ones((1, 17), int))


def test_static_length_refuses_fewer_tokens_when_there_is_no_mask(static):
    # nothing can tell a model without a mask what is padding
    static._planner = Planner(static.manifest["static"], maskless=True)
    with pytest.raises(InputError, match="has 5 tokens, this bundle takes exactly 16"):
        static(input_ids=np.ones((1, 5), int))


# -- the bundle's files


@pytest.mark.parametrize("name", ["lib.so", "params.safetensors"])
def test_load_names_a_missing_file(damaged, name):
    (damaged / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        loader.load(damaged)


@pytest.mark.parametrize("name", ["lib.so", "params.safetensors"])
def test_load_names_a_truncated_file(damaged, name):
    os.truncate(damaged / name, 100)
    with pytest.raises(BundleError, match=rf"{name} has 100 bytes, not \d+; it is truncated"):
        loader.load(damaged, verify=False)


@pytest.mark.parametrize("name", ["lib.so", "params.safetensors"])
def test_load_names_a_changed_file(damaged, name):
    data = bytearray((damaged / name).read_bytes())
    data[-1] ^= 1
    (damaged / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} has changed"):
        loader.load(damaged)


def test_load_trusts_the_hashes_when_asked(damaged):
    change_manifest(damaged, lambda m: m["files"]["lib.so"].update(sha256="0"))
    loader.load(damaged, verify=False).close()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "link", ""])
def test_load_stays_inside_the_bundle(damaged, name):
    (damaged.parent / "secret").write_text("s")
    (damaged / "link").symlink_to("../secret")
    change_manifest(damaged, lambda m: m["files"].update({name: m["files"]["lib.so"]}))
    with pytest.raises(BundleError, match=f"names '{name}', which is outside the bundle"):
        loader.load(damaged)


def test_load_takes_a_link_to_a_bundle(directory, tmp_path):
    (tmp_path / "link").symlink_to(directory)
    loader.load(tmp_path / "link").close()


@pytest.mark.parametrize("there", [False, True], ids=["no directory", "no manifest"])
def test_load_refuses_what_is_no_bundle(tmp_path, there):
    path = tmp_path if there else tmp_path / "absent"
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json"):
        loader.load(path)


def test_load_refuses_a_newer_schema(damaged):
    change_manifest(damaged, lambda m: m.update(schema=2))
    with pytest.raises(BundleError, match=r"has schema 2, this loader reads up to 1; update it"):
        loader.load(damaged)


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\xff", '{"schema": "1"}', '{"schema": 1}'])
def test_load_refuses_a_damaged_manifest(damaged, text):
    (damaged / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=r"manifest\.json is (damaged|not the manifest)"):
        loader.load(damaged)


@pytest.mark.parametrize("key", [*list(MANIFEST)[1:], "files", "params"])
@pytest.mark.parametrize("value", [None, [1], {"batch": "1"}], ids=["null", "list", "object"])
def test_load_refuses_a_manifest_with_a_wrong_value(damaged, key, value):
    change_manifest(damaged, lambda m: m.update({key: value}))
    with pytest.raises((BundleError, PlatformError), match=r"damaged|this machine is"):
        loader.load(damaged)


@pytest.mark.parametrize("case", DAMAGED_WEIGHTS)
def test_load_refuses_damaged_weights(damaged, case):
    path = damaged / "params.safetensors"
    path.write_bytes(DAMAGED_WEIGHTS[case](path.read_bytes()))
    size = path.stat().st_size
    change_manifest(damaged, lambda m: m["files"][path.name].update(bytes=size))
    with pytest.raises(BundleError, match=r"params\.safetensors is damaged"):
        loader.load(damaged, verify=False)


def test_load_refuses_a_library_that_is_none(damaged):
    (damaged / "lib.so").write_bytes(b"no library")
    change_manifest(damaged, lambda m: m["files"]["lib.so"].update(bytes=10))
    with pytest.raises(BundleError, match=r"cannot load .*lib\.so"):
        loader.load(damaged, verify=False)


def test_load_refuses_a_library_without_the_entry(damaged):
    change_manifest(damaged, lambda m: m.update(entry="absent"))
    with pytest.raises(BundleError, match=r"cannot load .*lib\.so"):
        loader.load(damaged)


# -- the machine


def test_load_names_the_architecture_before_it_opens_the_library(damaged):
    (damaged / "lib.so").write_bytes(b"no library")
    change_manifest(damaged, lambda m: m["target"].update(arch="riscv64"))
    with pytest.raises(PlatformError, match="the bundle is for riscv64, this machine is"):
        loader.load(damaged)


def test_load_names_missing_cpu_features_before_it_opens_the_library(damaged, monkeypatch):
    (damaged / "lib.so").write_bytes(b"no library")
    monkeypatch.setattr(this_platform, "cpu_features", lambda: {"sse2", "avx2"})
    features = ["avx2", "avx512f", "avx512_vnni"]
    change_manifest(damaged, lambda m: m["target"].update(features=features))
    with pytest.raises(PlatformError, match="this CPU lacks avx512_vnni, avx512f, which the"):
        loader.load(damaged)


def test_cpu_features_are_those_of_the_kernel():
    assert {"fpu"} < loader.cpu_features() or {"fp"} < loader.cpu_features()


def test_find_runtime_names_the_remedy_when_nothing_is_installed(monkeypatch):
    monkeypatch.setattr(runtime, "_mapped_libraries", dict)
    monkeypatch.setattr(runtime, "find_spec", lambda package: None)
    with pytest.raises(PlatformError, match="libraries are missing; install them with: pip"):
        loader.find_runtime()


# -- threads and processes


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_load_refuses_threads_that_are_no_count(directory, threads):
    with pytest.raises(InputError, match="threads is"):
        loader.load(directory, threads)


def test_load_refuses_more_threads_than_there_are_cores(directory):
    cores = loader.available_cores()
    with pytest.raises(InputError, match=f"threads is {cores + 1}, but .* may use {cores} cores"):
        loader.load(directory, cores + 1)


def test_threads_default_to_what_the_user_has_set(directory, monkeypatch):
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    assert loader.load(directory).threads == 1
    monkeypatch.setenv("TVM_NUM_THREADS", "many")
    with pytest.raises(InputError, match="TVM_NUM_THREADS is 'many'"):
        loader.load(directory)


def test_models_with_other_thread_counts_share_a_thread(directory):
    ids, cores = random_ids(3, 20), loader.available_cores()
    models = [loader.load(directory, count) for count in (1, cores, 1)]
    for _ in range(2):
        for each in models:
            assert_same(each(input_ids=ids), expected(ids))


@pytest.mark.parametrize("count", [1, 3], ids=["one model", "a model for each thread"])
def test_models_may_be_called_from_several_threads(directory, count):
    models = [loader.load(directory) for _ in range(count)]
    failures = []

    def ask(number):
        try:
            for step in range(50):
                ids = random_ids(1 + number, 1 + step, seed=number)
                assert_same(models[number % count](input_ids=ids), expected(ids))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


POOL = """
import os, numpy as np
from bertile import loader
model = loader.load({directory!r})
before = set(os.listdir("/proc/self/task"))  # the caller, and threads of numpy's own
model(input_ids=np.ones((8, 64), int))
tasks = set(os.listdir("/proc/self/task")) - before
status = [open(f"/proc/self/task/{{task}}/status").read() for task in tasks]
allowed = [text.split("Cpus_allowed_list:")[1].split()[0] for text in status]
"""


def test_call_starts_as_many_threads_as_cores_and_pins_none(directory):
    own = Path("/proc/self/status").read_text().split("Cpus_allowed_list:")[1].split()[0]
    cores = python(POOL.format(directory=str(directory)) + "print(*allowed)").split()
    count = loader.available_cores()
    assert len(cores) == (count if count > 1 else 0) and set(cores) <= {own}


def test_call_keeps_to_the_cores_of_its_process(directory):
    core = sorted(os.sched_getaffinity(0))[-1]
    code = f"import os; os.sched_setaffinity(0, {{{core}}})" + POOL.format(directory=str(directory))
    assert python(code + "print(model.threads, *allowed)").split() == ["1"]  # none beside it


def test_call_works_in_a_forked_process(directory):
    code = """
child = os.fork()
if child == 0:
    model(input_ids=np.ones((8, 64), int))
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(POOL.format(directory=str(directory)) + code) == "7\n"


def test_load_imports_no_compiler_and_nothing_else_of_bertile(directory):
    code = f"""
import sys, bertile
bertile.load({str(directory)!r})(input_ids=[[1, 2]])
names = {{name.split(".")[0] for name in sys.modules}}
print(names & {{"tvm", "tvm_ffi", "torch", "transformers", "onnx", "ml_dtypes", "scipy"}})
print({{".".join(name.split(".")[:2]) for name in sys.modules if name.startswith("bertile")}} ==
      {{"bertile", "bertile.loader", "bertile.loading"}}, "bertile.loading.cuda" in sys.modules)
"""
    assert python(code) == "set()\nTrue False\n"


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(order.split("-"), marks=marks, id=order)
        for order, marks in (
            ("tvm-own-bare", pytest.mark.slow),
            ("own-tvm-bare", ()),
            ("bare-tvm-own", pytest.mark.slow),
        )
    ],
)
def test_load_shares_the_libraries_of_tvm(directory, portable, order):
    """A bundle that brings its own (portable) and one that does not, whatever is loaded first."""
    code = f"""
import bertile
places = {dict(own=str(portable), bare=str(directory))!r}
models, before = [], []
for name in {order!r}:
    if name == "tvm":
        import tvm
    else:
        models.append(bertile.load(places[name]))
        before.append(models[-1](input_ids=[[1, 2]])["pooled"])
from tvm import relax
relax.VirtualMachine(tvm.runtime.load_module({str(portable / "lib.so")!r}), tvm.cpu())
for model, pooled in zip(models, before):
    assert (model(input_ids=[[1, 2]])["pooled"] == pooled).all()
mapped = {{line.split()[-1] for line in open("/proc/self/maps") if "/libtvm_" in line}}
print(sum(name.endswith(("libtvm_ffi.so", "libtvm_runtime.so")) for name in mapped))
"""
    assert python(code) == "2\n"


# -- memory


def resident():
    """Return the resident memory of this process in MiB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 / 1024


def test_calls_leak_nothing(model):
    ids = random_ids(4, 32)
    for _ in range(200):
        model(input_ids=ids)
    before = resident()
    for _ in range(2_500):
        model(input_ids=ids)
    assert resident() - before < 3  # one tensor of 4 KiB left behind by each call would be 10


def test_errors_leak_nothing(model):
    tokens = [random_ids(1, 4)] * 3

    def fail(times):
        for _ in range(times):
            with pytest.raises(BertileError):
                model._run(tokens, np.zeros((1, 3), np.int32), (1, 4), (1, 4))

    fail(100)
    before = resident()
    fail(1000)
    assert resident() - before < 3


def test_loads_leak_nothing(directory):
    def use(times):
        for _ in range(times):
            with loader.load(directory) as each:
                each(input_ids=[[1]])

    use(20)
    before = resident()
    use(100)
    assert resident() - before < 3


def test_memory_stays_small_when_every_shape_is_new(damaged):
    change_manifest(damaged, lambda m: m["model"].update(max_length=None))
    with loader.load(damaged) as each:
        each(input_ids=np.ones((32, 400), int))
        before = resident()
        for length in range(400, 600, 2):  # TVM's pool alone would keep 100 MiB
            each(input_ids=np.ones((32, length), int))
        assert resident() - before < 50


# -- loader.py by itself


@pytest.fixture(scope="module")
def portable(library, tmp_path_factory):
    """A bundle with the runtime libraries and the loader."""
    output = tmp_path_factory.mktemp("portable") / "tiny"
    return writer.write(MANIFEST, library, PARAMS, [], output, add=writer.include_runtime)


def run_bare(python, directory, *arguments):
    return subprocess.run(
        [python, "loader.py", *arguments],
        cwd=directory,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_loader_runs_a_bundle_with_numpy_alone(bare, portable):
    find = "from importlib.util import find_spec as f; print([f(n) for n in ('tvm', 'tvm_ffi')])"
    specs = subprocess.run([bare, "-c", find], capture_output=True, text=True, check=True)
    assert specs.stdout == "[None, None]\n"
    run = run_bare(bare, portable)
    assert run.returncode == 0, run.stderr
    assert "model    tiny (bert, encoder, at most 64 tokens)" in run.stdout
    assert "input    input_ids (2, 8)" in run.stdout
    assert "output   hidden (2, 8, 8): " in run.stdout
    assert " ms\n" in run.stdout


def test_loader_runs_the_ids_it_is_given(bare, portable):
    run = run_bare(bare, portable, "--ids", "1,2,3", "--threads", "1")
    assert run.returncode == 0, run.stderr
    first = ", ".join(f"{value:.4f}" for value in expected([[1, 2, 3]])["pooled"][0, :4])
    assert f"output   pooled (1, 8): {first}" in run.stdout


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--ids", "1,fifty"], 2, "loader.py: '1,fifty' is not a list of ids; write them as 101"),
        (["--ids", "1,50"], 2, "loader.py: input_ids[0, 1] is 50, the model takes 0 to 49"),
        (["--threads", "1000"], 2, "loader.py: threads is 1000, but this process may use"),
        (["elsewhere"], 1, "loader.py: elsewhere is not a bundle: it has no manifest.json"),
    ],
)
def test_loader_ends_with_one_sentence_when_it_fails(portable, arguments, code, message):
    run = run_bare(sys.executable, portable, *arguments)
    assert run.returncode == code
    assert run.stderr.startswith(message) and run.stderr.count("\n") == 1


def test_loader_says_what_is_missing_when_there_is_no_runtime(bare, directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    (Path(copy) / "loader.py").write_text(one_file.loader())
    run = run_bare(bare, copy)
    assert run.returncode == 3
    assert "the TVM runtime libraries are missing; install them with" in run.stderr


def test_loader_says_what_is_missing_when_there_is_no_numpy(portable, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    run = run_bare(tmp_path / "venv" / "bin" / "python", portable)
    assert run.returncode == 3
    assert run.stdout + run.stderr == (
        "loader.py: the package numpy is missing; install it with: pip install numpy\n"
    )


def test_loader_is_python_3_9_on_numpy_and_the_standard_library():
    tree = ast.parse(one_file.loader(), feature_version=(3, 9))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"numpy"}


def test_package_is_lazy_and_repeats_its_answers():
    code = """
import sys, bertile
print([name for name in ("numpy", "tvm") if name in sys.modules], len(dir(bertile)) > 10)
from bertile import load
import bertile.loader
assert bertile.load is load is bertile.loader.load and bertile.__version__
try:
    bertile.absent
except AttributeError as error:
    print(error)
"""
    assert python(code) == ("[] True\nmodule 'bertile' has no attribute 'absent'\n")
