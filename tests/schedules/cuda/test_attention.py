"""Attention for GPUs, in the emulator, against numpy in float64; what its code takes of a GPU."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from helpers import cuda_kernels
from helpers.attention_variants import VARIANTS
from helpers.cuda_kernels import slow

from bertile.base.errors import ModelError
from bertile.cuda_loader import evaluate
from bertile.run.cuda import emulator
from bertile.schedules.attention_spec import AttentionSpec
from bertile.schedules.cuda.attention import attention
from bertile.schedules.cuda.attention_samples import sequences_sample
from bertile.schedules.cuda.forms import LOWEST, from_rows
from bertile.schedules.task import Task
from bertile.tune.log.chooser import must_fit

MIXED = [100, 1, 33, 16, 70]  # groups of four blocks that span up to four sequences


def task_of(heads=2, size=64, precision="fp16", bias=False, **more):
    shape = {"heads": heads, "head_size": size, "scale": size**-0.5, "bias": bias}
    return Task("attention", {**shape, "precision": precision, **more})


def variant_of(spec, precision="fp16", **more):
    return Task("attention", {**spec.shape(), "precision": precision, **more})


def sample_of(task, lengths, **more):
    return sequences_sample(task, lengths, np.random.default_rng(0), **more)


def mistakes(task, sample, row="cuda-sm90", knobs=None):
    """What is wrong with the entry for few blocks, and with that for many."""
    results = [cuda_kernels.run(task, sample, row, knobs, entry=i) for i in range(2)]
    return [mistake for mistake in map(sample.mistake, results) if mistake]


@pytest.mark.parametrize(
    "heads, size, precision",
    [
        *itertools.product([2], [64], ["fp16", "bf16", "int8", "tf32", "fp32"]),
        *itertools.product([3], [13], ["bf16", "fp32"]),
        *itertools.starmap(slow, [(3, 13, "tf32"), (3, 32, "fp16"), (1, 40, "bf16")]),
    ],
)
def test_attention_of_unequal_sequences_equals_numpy(heads, size, precision):
    task = task_of(heads, size, precision)
    assert not mistakes(task, sample_of(task, MIXED))


@pytest.mark.parametrize("size, precision", [(128, "fp16"), slow(256, "bf16"), (256, "fp32")])
def test_attention_of_wide_heads_equals_numpy(size, precision):
    task = task_of(1, size, precision)
    assert not mistakes(task, sample_of(task, [50, 17]))


@pytest.mark.parametrize("blocks", [1, 3, 8, 19])
def test_attention_equals_its_sample(blocks):
    assert cuda_kernels.mistake(task_of(1, 32), blocks=blocks) is None


@pytest.mark.parametrize("lengths", [[1], [16], [128], [129, 128]])
def test_attention_of_few_sequences_equals_numpy(lengths):
    task = task_of()
    assert not mistakes(task, sample_of(task, lengths))


@pytest.mark.parametrize("planes", [(False, False), (False, True), (True, False), (True, True)])
def test_attention_adds_a_bias(planes):
    task = task_of(3, 24, "bf16", bias=True)
    sample = sample_of(task, [40, 7, 19], planes=planes)
    assert sample.activations[3].shape == (3 if planes[0] else 1, 3 if planes[1] else 1, 40, 40)
    assert not mistakes(task, sample)


@pytest.mark.parametrize(
    ("precision", "row"),
    [
        ("fp16", "cuda-sm75"),
        ("tf32", "cuda-sm86"),
        *itertools.starmap(slow, [("tf32", "cuda-sm75"), ("fp16", "cuda-sm86")]),
    ],
)
def test_attention_for_other_rows_equals_numpy(precision, row):
    task = task_of(precision=precision)
    assert not mistakes(task, sample_of(task, MIXED), row)


@pytest.mark.parametrize("heads, size", [slow(2, 64), (3, 13)])
def test_attention_writes_bytes(heads, size):
    task = task_of(heads, size, "int8_static", writes="to_int8")
    assert not mistakes(task, sample_of(task, [33, 16, 70]))


def test_attention_of_a_row_that_is_masked_whole_is_finite():
    task = task_of()
    for added in (-10000.0, LOWEST):
        sample = sample_of(task, [20, 40])
        sample.activations[1][:32] = added
        result = from_rows(cuda_kernels.run(task, sample)[0], 128)
        assert np.isfinite(result).all()
        assert np.abs(result[32:72] - sample.expected[32:72]).max() < 1e-2


def test_attention_survives_the_least_float_as_a_bias():
    task = task_of(bias=True)
    sample = sample_of(task, [40])
    bias = sample.activations[3]
    bias[..., 30:] = 0.0
    sample.activations[1][30:40] = LOWEST
    by_keys = cuda_kernels.run(task, sample)[0]
    sample.activations[1][30:40] = 0.0
    bias[..., 30:] = np.finfo("float32").min
    np.testing.assert_array_equal(cuda_kernels.run(task, sample)[0][:40], by_keys[:40])
    sample = sample_of(task, [48])
    sample.activations[3][...] = np.finfo("float32").min
    assert np.isfinite(from_rows(cuda_kernels.run(task, sample)[0], 128)).all()


def test_attention_subtracts_the_maximum():
    task = task_of()
    sample = sample_of(task, [48])
    qkv = sample.activations[0]
    qkv[:, :256] *= 30  # scores of thousands
    values = from_rows(qkv, 384)[:48].astype("float64")
    q, k, v = (values[:, 128 * i :][:, :64] for i in range(3))
    scores = q @ k.T / 8 + sample.activations[1][:48]
    expected = v[scores.argmax(1)]
    assert np.abs(scores).max() > 3000
    result = from_rows(cuda_kernels.run(task, sample)[0], 128)[:48, :64]
    clear = np.diff(np.sort(scores, 1)[:, -2:], axis=1)[:, 0] > 15
    assert clear.sum() > 20
    assert np.abs(result - expected)[clear].max() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "fp32", "tf32"])
@pytest.mark.parametrize("row", cuda_kernels.ROWS)
def test_attention_equals_numpy_at_points_of_its_space(precision, row):
    task = task_of(2, 40, precision)
    for knobs in cuda_kernels.points(task, row, 6):
        knobs["few"] = 32
        assert not mistakes(task, sample_of(task, MIXED), row, knobs)


@pytest.mark.parametrize("warps, keys, stages", [(1, 16, 3), slow(2, 128, 2), (8, 32, 3)])
def test_attention_of_many_blocks_equals_numpy_at_other_knobs(warps, keys, stages):
    task = task_of()
    knobs = {"few": 0, "warps": warps, "keys": keys, "stages": stages}
    knobs = {**attention.default(task, cuda_kernels.row_of("cuda-sm90")), **knobs}
    assert cuda_kernels.mistake(task, knobs=knobs, sample=sample_of(task, MIXED)) is None


@pytest.mark.parametrize("warps, keys, split", [slow(4, 64, 4), (8, 128, 4), (4, 128, 1)])
def test_attention_of_few_blocks_equals_numpy_at_other_knobs(warps, keys, split):
    task = task_of()
    knobs = {"few": 32, "few_warps": warps, "few_keys": keys, "split": split}
    knobs = {**attention.default(task, cuda_kernels.row_of("cuda-sm90")), **knobs}
    assert cuda_kernels.mistake(task, knobs=knobs, sample=sample_of(task, MIXED)) is None


@pytest.mark.parametrize("blocks", [1, 31, 32])
def test_blocks_are_few_or_many(blocks):
    row = cuda_kernels.row_of("cuda-sm90")
    knobs = {**attention.default(task_of(), row), "few": 32}
    launches = attention.kernel(task_of(), knobs, row).launches
    launched = [evaluate(launch.when, {"blocks": blocks}) for launch in launches]
    assert launched == ([0, 1] if blocks == 32 else [1, 0])


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("row", cuda_kernels.ROWS)
def test_default_lies_in_its_own_space(size, row):
    for precision in ("fp16", "tf32", "fp32"):
        task, target = task_of(12, size, precision), cuda_kernels.row_of(row)
        assert attention.valid(task, target, attention.default(task, target))


def test_attention_uses_tensor_cores_and_spills_nothing():
    for taken in cuda_kernels.assert_fits(task_of(12), "cuda-sm90"):
        assert taken.tensor >= 128 and taken.instructions["LDGSTS"]
    for taken in cuda_kernels.assert_fits(task_of(12), "cuda-sm75"):
        assert taken.tensor >= 64 and not taken.instructions["LDGSTS"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("row", cuda_kernels.ROWS)
def test_attention_of_every_row_spills_nothing(size, row):
    precisions = ["fp16", "fp32", "tf32"] + ["bf16"] * cuda_kernels.row_of(row).gpu.bf16
    for precision, bias in itertools.product(precisions, (False, True)):
        floats = precision == "fp32" or (precision == "tf32" and row == "cuda-sm75")
        for taken in cuda_kernels.assert_fits(task_of(12, size, precision, bias), row):
            assert (taken.tensor == 0) == floats


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_attention_at_the_largest_knobs_spills_nothing(precision, size):
    task, row = task_of(12, size, precision), cuda_kernels.row_of("cuda-sm90")
    largest = {knob: max(values) for knob, values in attention.space(task, row).items()}
    cuda_kernels.assert_fits(task, "cuda-sm90", largest)


@pytest.mark.parametrize(
    ("variant", "size", "precision"),
    [
        *((variant, 24, "bf16") for variant in VARIANTS if variant != "all"),
        ("by_distance", 13, "fp32"),
        ("by_distance", 32, "tf32"),
        ("window", 13, "fp32"),
        *(
            slow(variant, size, precision)
            for variant in VARIANTS
            for size in (13, 64, 128)
            for precision in ("fp16", "int8", "tf32", "fp32")
        ),
    ],
)
def test_every_variant_equals_numpy(variant, size, precision):
    task = variant_of(VARIANTS[variant].spec(2, size), precision)
    assert not mistakes(task, sample_of(task, MIXED))


@pytest.mark.parametrize("group", [2, *map(slow, (4, 6, 8))])
def test_heads_that_share_keys_equal_numpy(group):
    """Warps of one thread block have as many of them as divide both."""
    spec = AttentionSpec(2 * group, 2, 24, 24**-0.5, keys="causal")
    task = variant_of(spec)
    assert not mistakes(task, sample_of(task, MIXED))


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_bound_on_scores_equals_numpy(precision):
    spec = AttentionSpec(2, 1, 24, 0.5, keys="causal_window", window=30, softcap=1.5)
    task = variant_of(spec, precision)
    assert not mistakes(task, sample_of(task, [50, 17]))


@pytest.mark.parametrize(
    ("relative", "last"), [("keys", 3), slow("queries", 40), slow("both", 1), slow("both", 500)]
)
def test_tables_of_any_reach_equal_numpy(relative, last):
    task = variant_of(AttentionSpec(2, 2, 24, 24**-0.5, relative=relative, last=last))
    assert not mistakes(task, sample_of(task, MIXED))


def test_a_variant_with_a_bias_that_writes_bytes_equals_numpy():
    spec = AttentionSpec(4, 2, 24, 24**-0.5, keys="window", window=20, bias="tensor")
    task = variant_of(spec, "int8_static", writes="to_int8")
    assert not mistakes(task, sample_of(task, [33, 16, 70]))


@pytest.mark.slow
def test_attention_by_distance_that_writes_bytes_equals_numpy():
    task = variant_of(VARIANTS["by_distance"].spec(2, 24), "int8_static", writes="to_int8")
    assert not mistakes(task, sample_of(task, [33, 16, 70]))


def test_a_query_that_sees_masked_keys_alone_takes_their_mean():
    task = variant_of(VARIANTS["window"].spec(2, 32))
    sample = sample_of(task, [48])
    sample.activations[1][...] = 0.0
    sample.activations[1][:24] = LOWEST
    result = from_rows(cuda_kernels.run(task, sample)[0], 64)
    values = from_rows(sample.activations[0], 192)[:, 128:]
    assert np.abs(result[10] - values[5:16].mean(0)).max() < 2e-3


@pytest.mark.parametrize(
    ("row", "variant"),
    [
        ("cuda-sm75", "grouped"),
        *(slow(row, name) for row in cuda_kernels.ROWS for name in VARIANTS),
    ],
)
def test_variants_at_points_of_their_space_equal_numpy(row, variant):
    task = variant_of(VARIANTS[variant].spec(2, 40))
    for knobs in cuda_kernels.points(task, row, 2, seed=len(variant)):
        knobs["few"] = 32
        assert not mistakes(task, sample_of(task, MIXED), row, knobs), knobs


def work_of(spec, length):
    """Bytes that are asked for, and multiply-adds of tensor cores, of one sequence."""
    task, row = variant_of(spec), cuda_kernels.row_of("cuda-sm80")
    knobs = {**attention.default(task, row), "few": 0}
    sample = sample_of(task, [length])
    arrays = [*sample.activations, *sample.weights, *sample.buffers()]
    kernel = attention.kernel(task, knobs, row)
    moved, multiplied = emulator.count_traffic(kernel, arrays, sample.symbols)
    return moved["copy_async read"].bytes, multiplied


def test_keys_outside_of_a_window_cost_nothing():
    window = AttentionSpec(1, 1, 64, 0.125, keys="window", window=32)
    (short, few), (long, many) = (work_of(window, length) for length in (512, 1024))
    assert long <= 2.15 * short and many <= 2.15 * few
    assert many <= 0.3 * work_of(dataclasses.replace(window, keys="all", window=0), 1024)[1]


def test_keys_behind_a_causal_query_cost_nothing():
    everything = AttentionSpec(1, 1, 64, 0.125)
    causal = dataclasses.replace(everything, keys="causal")
    assert work_of(causal, 512)[1] <= 0.6 * work_of(everything, 512)[1]


def test_heads_of_a_group_read_their_keys_once():
    grouped = work_of(AttentionSpec(4, 1, 64, 0.125), 16)
    own = work_of(AttentionSpec(4, 4, 64, 0.125), 16)
    assert grouped[0] <= 0.6 * own[0]


@pytest.mark.slow
@pytest.mark.parametrize("row", cuda_kernels.ROWS)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "all"])
def test_variants_of_every_row_spill_nothing(variant, row):
    precisions = ["fp16", "fp32", "tf32"] + ["bf16"] * cuda_kernels.row_of(row).gpu.bf16
    for precision in precisions:
        cuda_kernels.assert_fits(variant_of(VARIANTS[variant].spec(4, 64), precision), row)


def test_a_bias_by_distance_is_refused_by_name():
    task = variant_of(AttentionSpec(2, 2, 24, 0.2, bias="by_distance"))
    row = cuda_kernels.row_of("cuda-sm90")
    with pytest.raises(ModelError, match="cuda-sm90 has no kernel for a bias by distance"):
        must_fit(task, row)
    with pytest.raises(ValueError, match="a bias by distance"):
        attention.kernel(task, attention.default(task, row), row)
