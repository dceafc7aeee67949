"""Matrix products of bfloat16 and of bytes against numpy, in every form of their results."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers.spread import spread

from bertile.schedules.cpu import arithmetic, lanes, peak, precisions
from bertile.schedules.cpu.dense import dense
from bertile.schedules.task import Task

BOUNDED = ("int8_bounded", "int8_bounded_static")
PRECISIONS = ("fp16", "bf16", "int8", "int8_static", "int4", *BOUNDED)


def product(inputs, outputs, activation="none", residual=False, **more):
    shape = {"inputs": inputs, "outputs": outputs, "activation": activation, "residual": residual}
    groups = {"group": 32} if more.get("precision") == "int4" else {}
    return Task("dense", {**shape, **groups, **more})


ROWS = ("x86-avx512-bf16", "x86-avx2", "x86-avx512", "x86-amx")
SHAPES = [(768, 768), (13, 17), (26, 26), (312, 100), (97, 2), (1, 5)]


def on_rows(cases, share=2):
    """Kernels that are those of another row too are for the slow tests."""
    same = {("x86-avx512", "fp16"), ("x86-amx", "fp16")}
    same |= {(row, precision) for row in ("x86-avx512-bf16", "x86-amx") for precision in BOUNDED}
    return spread("precision case", ROWS, PRECISIONS, cases, share, late=same)


@pytest.fixture
def kernels(request, kernels_of):
    return kernels_of(request.param)


@on_rows(SHAPES, share=4)
def test_product_equals_numpy(kernels, precision, case):
    assert kernels.mistake(product(*case, precision=precision), blocks=3) is None


@pytest.mark.parametrize("kernels", ROWS, indirect=True)
@pytest.mark.parametrize("case", [(768, 40), (96, 17), (130, 3)])
def test_groups_of_64_inputs_share_a_scale_too(kernels, case):
    """The last one may be short."""
    task = product(*case, precision="int4", group=64)
    assert kernels.mistake(task, blocks=2) is None


@on_rows([1, 2, 3, 7, 8, 33], share=1)
def test_product_takes_any_number_of_blocks(kernels, precision, case):
    task = product(64, 40, "relu", residual=True, precision=precision)
    assert kernels.mistake(task, blocks=case) is None


RESULTS = [("to_bf16", "none"), ("to_bf16", "gelu"), ("to_int8", "gelu"), ("to_int8", "none")]


@on_rows(RESULTS, share=3)
def test_product_writes_what_the_next_layer_reads(kernels, precision, case):
    writes, activation = case
    task = product(52, 44, activation, precision=precision, writes=writes)
    assert kernels.mistake(task, blocks=3) is None


@on_rows([24], share=1)
def test_values_are_written_in_pairs_of_tokens(kernels, precision, case):
    task = product(52, 36, precision=precision, writes="to_bf16", values_from=case)
    assert kernels.mistake(task, blocks=5) is None


@on_rows(range(4), share=5)
def test_any_point_of_the_space_is_right(kernels, precision, case):
    task = product(96, 84, "gelu", precision=precision, writes="to_bf16")
    (knobs,) = kernels.points(task, 1, seed=case)
    assert kernels.mistake(task, 5, knobs) is None, knobs


def sums_of(kernels, task, w):
    """What a kernel makes of inputs of 255 and weights (K, N)."""
    knobs = dense.default(task, kernels.row)
    inputs, outputs = w.shape
    ones, zeros = np.ones(outputs, "float32"), np.zeros(outputs, "float32")
    x = arithmetic.grouped(np.full((16, inputs), 255, "uint8"), 4)
    weights = dense.pack(task, knobs, [w.astype("int8"), ones, zeros], kernels.row)
    return kernels.call(kernels.build(task, knobs), [x, *weights], (1, outputs, 16))[0, :, 0]


@pytest.mark.parametrize("kernels", ROWS, indirect=True)
def test_bytes_at_their_limits_do_not_overflow(kernels):
    """255 × ±127 in every place: vpmaddubsw would saturate."""
    signs = np.where(np.arange(8) % 2, 1, -1)
    w = np.broadcast_to(127 * signs, (64, 8))
    sums = sums_of(kernels, product(*w.shape, precision="int8_static"), w)
    assert np.array_equal(sums, 255.0 * 127 * len(w) * signs)


@pytest.mark.parametrize("kernels", ["x86-avx2", "x86-avx512"], indirect=True)
@pytest.mark.parametrize("inputs", [64, 61, 6])
def test_bounded_weights_at_their_bound_do_not_overflow(kernels, inputs):
    """255 times as much as four neighbours may be: all of one, halves of two, quarters of all."""
    four = [[127, 1, 0, 0], [1, 0, 0, 127], [64, 64, 0, 0], [0, 64, 64, 0], [32, 32, 32, 32]]
    places = np.arange(inputs) // 4 % 2 * 2 + np.arange(inputs) % 2  # in its run of eight
    w = np.array(four)[:, places].T
    w = np.concatenate([w, -w], 1)
    task = product(*w.shape, precision="int8_bounded_static")
    assert np.array_equal(sums_of(kernels, task, w), 255.0 * w.sum(0))
    w[0, 0] += 1 if w[0, 0] < 127 else 0
    w[1, 0] += 1
    with pytest.raises(ValueError, match="not bounded"):
        sums_of(kernels, task, w)


@pytest.mark.parametrize(
    ("name", "precision", "instruction"),
    [
        ("x86-avx512-bf16", "bf16", "vdpbf16ps"),
        ("x86-avx512-vnni", "int8", "vpdpbusd"),
        ("x86-avx512", "int8", "vpmaddwd"),
        ("x86-avx2", "int8", "vpmaddwd"),
        ("x86-avx512", "int8_bounded", "vpmaddubsw"),
        ("x86-avx2", "int8_bounded", "vpmaddubsw"),
    ],
)
def test_inner_loop_keeps_its_sums_in_registers(kernels_of, name, precision, instruction):
    library = kernels_of(name).build(product(768, 768, precision=precision))
    text = library.inspect_source("asm")
    loops = [block for block in re.split(r"\n\.L\w+:", text) if block.count(instruction) >= 12]
    assert loops, f"no {instruction}"
    busiest = max(loops, key=lambda block: block.count(instruction))
    # a spilled sum would be loaded and stored around each of its multiply-adds
    assert len(re.findall(r"%[yz]mm\d+, .*\(%r[sb]p\)", busiest)) < busiest.count(instruction) / 4


@pytest.mark.parametrize(
    ("name", "instruction", "precision"),
    [
        ("x86-avx512-bf16", "vpdpbusd", "int8"),
        *(
            (row, "vpmaddubsw", precision)
            for row in ("x86-avx512", "x86-avx2")
            for precision in ("int8", "int8_bounded", "int4")
        ),
    ],
)
def test_peak_multiplies_in_each_step(kernels_of, name, instruction, precision):
    """A product that does not change would be taken out of the loop, and the peak be of sums."""
    kernels = kernels_of(name)
    math = precisions.arithmetic(precision, kernels.row)
    asm = kernels.compile(peak._multiply_adds(math, 4, 1)).inspect_source("asm")
    products = 4 * math.run * 16 * 32 // kernels.row.vector_bits
    assert len(re.findall(rf"\s{instruction}\s", asm)) >= products


@pytest.mark.parametrize(("precision", "word"), [("bf16", "tdpbf16ps"), ("int8", "tdpbsud")])
def test_tiles_are_multiplied_without_leaving_them(kernels_of, precision, word):
    library = kernels_of("x86-amx").build(product(768, 768, precision=precision))
    loops = re.split(r"\n\.L\w+:", library.inspect_source("asm"))
    busiest = max(loops, key=lambda block: block.count(f"\t{word}"))
    words = [line.split()[0] for line in busiest.splitlines() if line.strip()]
    # two tiles of outputs by two of tokens, and by the one that may be left
    assert words.count(word) >= 4 and words.count("tileloadd") <= 1.5 * words.count(word)
    assert words.count("tilestored") <= 6


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_sums_of_tiles_are_those_of_registers(kernels_of, precision):
    """Of bytes to the last bit."""
    task = product(200, 64, precision=precision)
    tiles, registers = (
        kernels_of(name).run(task, blocks=3, seed=5)[1][0]
        for name in ("x86-amx", "x86-avx512-bf16")
    )
    np.testing.assert_allclose(tiles, registers, rtol=0, atol=0 if precision == "int8" else 1e-5)


def test_groups_of_any_scale_lose_little_where_they_are_rescaled(kernels_of):
    """Tiles multiply bytes of the output's own scale: what that rounds is little beside 4 bits."""
    kernels, random = kernels_of("x86-amx"), np.random.default_rng(4)
    task = product(256, 48, precision="int4")
    levels = random.integers(-8, 8, (256, 48)).astype("int8")
    scales = np.exp(random.normal(-4, 0.3, (8, 48))) * random.choice([-1, 1], (8, 48))
    scales = scales.astype("float16")
    w = levels * scales.astype("float32").repeat(32, 0)
    x = random.integers(0, 256, (16, 256)).astype("uint8")
    # a scale of 1, and a low end of -128: values of both signs
    range_ = np.stack([np.ones((1, 16)), np.full((1, 16), -128.0)], 1).astype("float32")
    vectors = [w.sum(0), np.zeros(48, "float32")]
    knobs = dense.default(task, kernels.row)
    weights = dense.pack(task, knobs, [levels, scales, *vectors], kernels.row)
    operands = [arithmetic.grouped(x, 4), range_, *weights]
    got = lanes.from_lanes(kernels.call(kernels.build(task), operands, (1, 48, 16)))
    want = (x.astype("float64") - 128) @ w
    assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)
