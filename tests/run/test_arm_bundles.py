"""Bundles for the ARM rows, run as ARM code by their own bertile-run, against this machine's."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import arm_code

from bertile import driver, loader
from bertile.base.errors import PlatformError, UsageError
from bertile.bundle import runtime_libraries, safetensors
from bertile.config import Config
from bertile.export import cached
from bertile.families.table import FAMILIES
from bertile.onnx.exported import InputSpec
from bertile.onnx.samples import run_onnx, sample
from bertile.run import qemu
from bertile.schedules.cpu import vector_math
from bertile.targets import linker
from bertile.targets import rows as targets
from bertile.verify import verifier

TINY, MINILM = "synthetic:bert-tiny", "minilm"
SPARSE = "synthetic:bert-tiny@0.9:4x1"
SIZE_LIMIT = 8e6  # bytes of a bundle with its runtime, without its weights
NEEDS_I8MM = (TINY, "arm-v1", "int8")
# Those with kernels of their own: rotary positions, gates, windows, vectors by distance, heads that
# share keys, norms of each.
KINDS = [family.name for family in FAMILIES if family.kernels_of is None]
# Of the outputs, relative to the largest. Float32 sums have another order on each machine; the sums
# of int8 products are equal to the bit, or a difference of the first rounding to 8 bits would show.
TOLERANCES = {"fp32": 1e-4, "int8": 1e-4, "bf16": 0.02}
# MiniLM in int8: over six layers some activation lies at the edge between two bytes, and what it is
# rounded to changes every later one: the last bits of one LayerNorm's gains move the answers by a
# quarter of what int8 costs (a test below). What is compared is how far from float32 the answers of
# both machines are, on average over so many texts: at most so many times as far. The integer parts
# are equal to the bit, kernel by kernel (test_sums_of_bytes_are_exact in schedules/test_arm.py).
# So it is where attention is in bfloat16: what is rounded to that shows the last bits of sums, the
# order of which is each machine's, and its log's.
TEXTS, TIMES = 8, 1.5

QUICK = [(TINY, "arm-v1", "int8")]
ROWS = ("arm-a72", "arm-a76", "arm-v1", "arm-v2", "aarch64")
SLOW = [
    *((model, row, "fp32") for model in (TINY, SPARSE) for row in ROWS),
    *((model, row, "int8") for model in (TINY, SPARSE, MINILM) for row in ROWS),
    *((TINY, row, "bf16") for row in ("arm-v1", "arm-v2")),
    *((MINILM, row, "fp32") for row in ("arm-a72", "arm-v2")),
]
CASES = [
    *(pytest.param(*case, id="-".join(case)) for case in QUICK),
    *(
        pytest.param(*case, marks=pytest.mark.slow, id="-".join(case))
        for case in SLOW
        if case not in QUICK
    ),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, stages):
    """A function that gives the bundle of a model for a row, compiled once."""
    bundles: dict[tuple[str, ...], Path] = {}

    def compile_for(*case: str) -> Path:
        if case not in bundles:
            output = tmp_path_factory.mktemp("arm") / "bundle"
            model, row, precision = case
            bundles[case] = arm_code.compile(model, output, stages, row, precision)
        return bundles[case]

    arm_code.need_emulator()
    return compile_for


def like(row: targets.Target, precision: str) -> str:
    """The target of this machine with whose answers the row's can be compared.

    In int8 the products of attention are in bfloat16 where the row has it, else in float32.
    """
    if precision == "fp32":
        return "native"
    features = loader.cpu_features()
    known = [
        target for target in targets.TABLE if targets.fits(target, features) and target.dot_product
    ]
    name = next((target.name for target in known if target.bf16 == row.bf16), None)
    return name or pytest.skip(f"no target of this machine computes as {row.name} does")


@pytest.fixture(scope="module")
def compiled_natively(tmp_path_factory, stages):
    """A function that gives the bundle of a model for a target of this machine, compiled once, with
    the powers of two of ARM: what is rounded to bfloat16 shows their last bits.
    """
    bundles: dict[tuple[str, ...], Path] = {}

    def compile_for(model: str, target: str, precision: str) -> Path:
        case = (model, target, precision)
        if case not in bundles:
            config = Config(target=target, precision=precision, cache_dir=stages)
            bundles[case] = tmp_path_factory.mktemp("here") / "bundle"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(vector_math, "powers", lambda row: vector_math.PLAIN)
                driver.compile(model, bundles[case], config)
        return bundles[case]

    return compile_for


@pytest.fixture(scope="module")
def float32(stages):
    """A function that gives ONNX Runtime's answer of a model."""

    def answer(model: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        exported = cached.export_cached(model, Config(cache_dir=stages))
        return run_onnx(exported.onnx_path, arrays)

    return answer


def requests(bundle: Path, count: int) -> dict[str, np.ndarray]:
    specs = [InputSpec(**spec) for spec in loader.read_manifest(bundle)["inputs"]]
    return sample(specs, count, 18, 0, seed=1)


def answer(bundle: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with loader.load(bundle, verify=False) as opened:
        return opened(**arrays)


def distance(vectors: np.ndarray, wanted: np.ndarray) -> float:
    """One less the cosine of vectors (N, C) to those that were wanted, the mean of all."""
    lengths = np.linalg.norm(vectors, axis=-1) * np.linalg.norm(wanted, axis=-1)
    return float((1 - (vectors * wanted).sum(-1) / lengths).mean())


@pytest.mark.parametrize(("model", "row", "precision"), CASES)
def test_bundle_run_as_arm_code_gives_this_machines_numbers(
    compiled, compiled_natively, float32, tmp_path, model, row, precision
):
    target = like(targets.resolve(row), precision)
    bundle = compiled(model, row, precision)
    rounded = precision == "int8" and (model == MINILM or targets.resolve(row).bf16)
    arrays = requests(bundle, TEXTS if rounded else 2)
    np.savez(tmp_path / "in.npz", **arrays)
    cpu = qemu.processor(targets.resolve(row))
    files = ("--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz")
    done = arm_code.run(bundle, cpu, *files)
    assert (done.returncode, done.stderr) == (0, "")
    wanted = answer(compiled_natively(model, target, precision), arrays)
    exact = float32(model, arrays) if rounded else {}
    with np.load(tmp_path / "out.npz") as outputs:
        assert sorted(outputs.files) == sorted(wanted)
        for name, array in wanted.items():
            if rounded:
                there = array.any(-1)  # not padding, of which nothing is computed
                np.testing.assert_array_equal(outputs[name].any(-1), there)
                own = distance(array[there], exact[name][there])
                assert distance(outputs[name][there], exact[name][there]) <= TIMES * own
                continue
            limit = TOLERANCES[precision] * max(1.0, float(np.abs(array).max()))
            np.testing.assert_allclose(outputs[name], array, rtol=0, atol=limit)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("row", ["arm-a72", "arm-v1"])
@pytest.mark.parametrize("family", KINDS)
def test_every_family_run_as_arm_code_answers_as_onnx_runtime(compiled, family, row, precision):
    bundle = compiled(f"synthetic:{family}-tiny", row, precision)  # which holds its check
    assert loader.read_manifest(bundle)["check"]["precision"] == precision


@pytest.mark.slow
def test_last_bits_of_one_layer_move_answers_in_int8_but_not_away_from_float32(
    compiled_natively, float32, tmp_path
):
    bundle = compiled_natively(MINILM, like(targets.resolve("arm-a76"), "int8"), "int8")
    changed = tmp_path / "changed"
    shutil.copytree(bundle, changed)
    params = safetensors.read(bundle / loader.WEIGHTS)
    (name,) = (param for param in params if param.startswith("model.embeddings.LayerNorm.weight@"))
    params[name] = np.nextafter(params[name], np.float32(np.inf))
    safetensors.write(changed / loader.WEIGHTS, params)
    arrays = requests(bundle, TEXTS)
    (exact,), (before,), (after,) = (
        outputs.values()
        for outputs in (float32(MINILM, arrays), answer(bundle, arrays), answer(changed, arrays))
    )
    assert np.abs(after - before).max() > 10 * TOLERANCES["int8"]
    own = distance(before, exact)
    assert own / 10 < distance(after, before) < own
    assert own / TIMES < distance(after, exact) < TIMES * own


def test_bundle_with_its_runtime_is_small(compiled):
    bundle = compiled(*QUICK[0])
    sizes = {path.name: path.stat().st_size for path in bundle.rglob("*") if path.is_file()}
    assert {"libtvm_ffi.so", "libtvm_runtime.so", "bertile-run", "libbertile.so"} <= set(sizes)
    assert sum(sizes.values()) - sizes["params.safetensors"] <= SIZE_LIMIT


def test_bundle_is_refused_by_name_where_the_processor_lacks_a_feature(compiled):
    done = arm_code.run(compiled(*NEEDS_I8MM), "cortex-a76", "--ids", "1 2 3")
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.startswith("bertile-run: this CPU lacks i8mm, bf16, sve, which the bundle")
    assert "(target arm-v1); compile the model with a --target that fits" in done.stderr


def test_bundle_without_sve_in_the_processor_is_refused(compiled):
    done = arm_code.run(compiled(*NEEDS_I8MM), "max,sve=off", "--ids", "1 2 3")
    assert done.returncode == 3 and "this CPU lacks sve, which" in done.stderr


def test_bundle_for_arm_is_refused_by_this_machines_loader(compiled):
    with pytest.raises(PlatformError, match="the bundle is for aarch64, this machine is"):
        loader.load(compiled(*QUICK[0]))


@pytest.fixture(scope="module")
def counter(tmp_path_factory) -> Path:
    """A plugin of QEMU that counts instructions."""
    library = tmp_path_factory.mktemp("counter") / "counter.so"
    source = Path(arm_code.__file__).with_name("native") / "count_instructions.c"
    line = [*linker.link_command(targets.native()), "-O2", "-shared", "-fPIC", str(source)]
    subprocess.run([*line, "-o", str(library)], check=True)
    return library


@pytest.mark.slow
@pytest.mark.parametrize(("row", "share"), [("arm-a76", 0.35), ("arm-v1", 0.25)])
def test_int8_takes_a_share_of_the_instructions_of_float32(compiled, counter, row, share):
    cpu = qemu.processor(targets.resolve(row))
    fp32, int8 = (
        arm_code.instructions(compiled(MINILM, row, precision), cpu, counter, 128)
        for precision in ("fp32", "int8")
    )
    assert int8 <= share * fp32, f"{int8 / fp32:.3f}"


# -- without an emulator, without a network


@pytest.mark.parametrize("libc", ["glibc", pytest.param("musl", marks=pytest.mark.slow)])
def test_bundle_that_cannot_be_run_here_says_so(tmp_path, stages, monkeypatch, libc):
    monkeypatch.setattr(qemu, "_qemu", lambda arch: None)
    head = "embedding" if libc == "glibc" else None  # test_opener.py compiles the same
    config = Config(target="arm-a76", libc=libc, head=head, runtime="none", cache_dir=stages)
    summary = driver.compile(TINY, tmp_path / "out", config)
    reason = "qemu-aarch64 is not installed" if libc == "glibc" else "it is linked for musl"
    assert summary["check"] == f"not executed here: {reason}"
    assert summary["milliseconds"] is None and summary["max_abs_difference"] is None
    check = json.loads((tmp_path / "out" / "manifest.json").read_text())["check"]
    assert (check["executed"], check["reason"]) == (False, reason)
    library = (tmp_path / "out" / "lib.so").read_bytes()
    assert library[18:20] == (183).to_bytes(2, "little")  # EM_AARCH64
    assert (b"libc.so.6" in library) == (libc == "glibc")


def test_runtime_of_another_machine_needs_a_network_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(PlatformError) as caught:
        runtime_libraries.find(targets.resolve("arm-a76"), None, str(tmp_path))
    assert str(caught.value).startswith("cannot fetch the TVM runtime for aarch64: ERROR: ")
    assert "connect to a package index once, give the wheels with --runtime-from, or leave" in str(
        caught.value
    )


def test_runtime_from_refuses_what_it_cannot_use(tmp_path):
    row, cache = targets.resolve("arm-a76"), str(tmp_path / "cache")
    with pytest.raises(UsageError, match="--runtime-from /nothing does not exist"):
        runtime_libraries.find(row, "/nothing", cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PlatformError, match=r"names has no libtvm_ffi\.so; give a directory with"):
        runtime_libraries.find(row, str(tmp_path / "empty"), cache)
    own = runtime_libraries.find(targets.native(), None, cache)
    assert {path.name for path in own.iterdir()} >= {*loader.RUNTIME, "LICENSE"}
    with pytest.raises(PlatformError, match=r"libtvm_ffi\.so is for x86_64, not for aarch64"):
        runtime_libraries.find(row, str(own), cache)


def test_musl_needs_a_runtime_of_its_own(tmp_path):
    row = targets.with_libc(targets.resolve("arm-a76"), "musl")
    with pytest.raises(PlatformError, match="no TVM runtime libraries for musl; build them"):
        runtime_libraries.find(row, None, str(tmp_path))


@pytest.mark.parametrize("name", ["armv7", "armv7l", "armhf"])
def test_32_bit_arm_is_refused_with_the_reason(name):
    with pytest.raises(UsageError, match="no release of TVM has a runtime for 32-bit ARM"):
        Config(target=name)


def test_emulated_processors_have_what_the_rows_ask_for():
    rows = [row for row in targets.TABLE if row.arch == "aarch64"]
    assert rows and all(qemu.processor(row) for row in rows)
    assert qemu.missing(targets.native()) == "this machine cannot emulate x86_64"


def test_check_in_words():
    done = {"max_abs_difference": 2e-6, "tolerance": 1e-4, "precision": "fp32", "cosine": 0.99998}
    assert verifier.as_text({**done, "emulator": "qemu-aarch64 -cpu max"}) == (
        "largest error 2e-06 against ONNX Runtime, run by qemu-aarch64 -cpu max:"
        " within fp32's bound of 0.0001 (cosine 1.0000)"
    )
    assert ": ABOVE fp32's bound of 1e-06" in verifier.as_text({**done, "tolerance": 1e-6})
