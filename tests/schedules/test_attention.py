"""Fused attention against numpy: several sequences, online softmax over many tiles, hard masks."""

from __future__ import annotations

import dataclasses
import itertools
import re

import numpy as np
import pytest
from helpers.attention_variants import CLOSING, VARIANTS
from helpers.spread import spread

from bertile.base.errors import ModelError
from bertile.loader import token_blocks
from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.attention_spec import AttentionSpec
from bertile.schedules.cpu import arithmetic, distances, lanes
from bertile.schedules.cpu.attention import attention
from bertile.schedules.cpu.attention_parts import LOWEST
from bertile.schedules.task import Task
from bertile.targets import rows as targets
from bertile.tune.log.chooser import must_fit

# A softmax and a sum of up to 496 values of the size of 1 in float32.
TOLERANCE = 5e-6
FINFO_MIN = float(np.finfo("float32").min)
MASKED = -1e29  # what a canonical mask adds: beside it a rounding error is a huge number


@pytest.fixture(scope="module", params=["x86-avx512", "x86-avx2"])
def kernels(request, kernels_of):
    """Of the two widths of vectors, or of the row that a test names."""
    return kernels_of(request.param)


def task_of(heads, size, bias=False, variant="all"):
    return Task("attention", VARIANTS[variant].spec(heads, size, bias).shape())


SLOW = pytest.mark.slow
ALL = pytest.mark.parametrize("variant", VARIANTS)
OTHERS = pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "all"])
BERT = [task_of(12, 64), task_of(16, 64), task_of(12, 32), task_of(12, 26), task_of(2, 64)]


# BERT-large's and MiniLM's: the same code as that of the others.
OTHERS_OF_BERT = BERT[1:3]


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(task, marks=[SLOW] if task in OTHERS_OF_BERT else [], id=task.name)
        for task in (*BERT, task_of(12, 64, bias=True))
    ],
)
def test_attention_equals_numpy_on_bert_shapes(kernels, task):
    assert kernels.difference(task, blocks=4) < TOLERANCE


@pytest.mark.parametrize(
    ("size", "bias"),
    [
        pytest.param(size, bias, marks=[SLOW] if (number + bias) % 2 else [])
        for number, size in enumerate((1, 7, 26, 33))
        for bias in (False, True)
    ],
)
def test_attention_equals_numpy_on_odd_head_sizes(kernels, size, bias):
    assert kernels.difference(task_of(3, size, bias), blocks=5) < TOLERANCE


@ALL
@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 8, 31])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_takes_any_number_of_blocks(kernels, blocks, bias, variant):
    assert kernels.difference(task_of(2, 26, bias, variant), blocks) < TOLERANCE


@pytest.mark.parametrize("changed", [{"key_tile": 2}, {"key_tile": 32}, {"keys": 2}], ids=str)
def test_attention_equals_numpy_at_edges_of_its_space(kernels, changed):
    task = task_of(2, 26)
    knobs = {**attention.default(task, kernels.row), **changed}
    for blocks in (1, 9, 31):
        assert kernels.difference(task, blocks, knobs) < TOLERANCE


@ALL
def test_attention_equals_numpy_at_random_points(kernels, variant):
    task = task_of(2, 26, True, variant)
    for knobs in kernels.points(task, 4 if variant == "all" else 2):
        assert kernels.difference(task, 7, knobs) < TOLERANCE, knobs


@pytest.mark.slow
@pytest.mark.parametrize("task", [*BERT, task_of(3, 26, bias=True)], ids=lambda task: task.name)
def test_attention_equals_numpy_at_many_random_points(kernels, task):
    for knobs in kernels.points(task, 20, seed=1):
        assert kernels.difference(task, 13, knobs) < TOLERANCE, knobs


class Batch:
    """Sequences of the given lengths, packed into blocks, with the additive mask of their keys."""

    def __init__(self, lengths, heads=2, size=26, scale=1.0, variant="all", **fields):
        rng = np.random.default_rng(0)
        spec = VARIANTS[variant].spec(heads, size)
        self.spec = dataclasses.replace(spec, **fields)
        self.task = Task("attention", self.spec.shape())
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        self.table = token_blocks(mask, BLOCK_TOKENS)
        tokens, channels = len(self.table) * BLOCK_TOKENS, sum(self.spec.channels())
        self.qkv = rng.standard_normal((tokens, channels)) * scale
        self.qkv = self.qkv.astype("float32")
        self.tables = distances.sample(self.spec, rng, halves=False)
        self.keys = np.full((len(self.table), BLOCK_TOKENS), LOWEST, "float32")
        for block, (row, start, _, _) in enumerate(self.table):
            self.keys[block, : max(0, lengths[row] - start)] = 0

    def run(self, kernels, knobs=None):
        """The result per sequence and head, (H, tokens, D)."""
        operands = [lanes.to_lanes(self.qkv), self.keys, self.table]
        operands += distances.pack(self.task, {}, list(self.tables.values()), kernels.row)
        width, _, _ = self.spec.channels()
        library = kernels.build(self.task, knobs)
        return lanes.from_lanes(
            kernels.call(library, operands, (len(self.table), width, BLOCK_TOKENS))
        )

    def expected(self):
        """The same by numpy in float64."""
        size, splits = self.spec.head_size, np.cumsum(self.spec.channels())[:2]
        parts = []
        for first, count in dict.fromkeys((int(f), int(n)) for _, _, f, n in self.table):
            rows = slice(first * BLOCK_TOKENS, (first + count) * BLOCK_TOKENS)
            q, k, v = (
                part.reshape(len(part), -1, size).transpose(1, 0, 2)
                for part in np.split(self.qkv[rows], splits, axis=1)
            )
            mask = np.maximum(self.keys[first : first + count].reshape(-1), LOWEST)
            context = self.spec.reference(q, k, v, mask, **self.tables)
            parts.append(context.transpose(1, 0, 2).reshape(context.shape[1], -1))
        return np.concatenate(parts)


@ALL
def test_attention_keeps_sequences_of_unequal_lengths_apart(kernels, variant):
    batch = Batch([50, 1, 16, 17, 33, 49, 2], variant=variant)
    assert np.abs(batch.run(kernels) - batch.expected()).max() < TOLERANCE


# Around the blocks of 16 on which loops begin and end, and wider than the sequence.
@pytest.mark.parametrize(
    "window", [1, pytest.param(16, marks=SLOW), 17, pytest.param(200, marks=SLOW)]
)
def test_attention_sees_windows_of_any_width(kernels, window):
    batch = Batch([150, 1, 40, 16, 17], keys="window", window=window)
    assert np.abs(batch.run(kernels) - batch.expected()).max() < TOLERANCE


@pytest.mark.parametrize("variant", CLOSING)
def test_attention_never_reads_what_no_query_of_a_job_sees(kernels, variant):
    """Jobs have one block of queries, or two neighbours."""
    batch, count = Batch([10 * BLOCK_TOKENS], variant=variant), 10
    shared = batch.spec.group > 1 or "queries" not in attention.space(batch.task, kernels.row)
    together = 1 if shared else attention.default(batch.task, kernels.row)["queries"]
    i, j = np.indices((count * BLOCK_TOKENS, count * BLOCK_TOKENS))
    sees = VARIANTS[variant].sees(i, j).reshape(count // together, -1, count, BLOCK_TOKENS)
    seen = np.repeat(sees.any((1, 3)), together, 0)
    unread, (q, _, _) = batch.run(kernels), batch.spec.channels()
    block = int((~seen).sum(0).argmax())
    batch.qkv[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS, q:] = np.nan
    same = np.array_equal(
        *(lanes.to_lanes(x)[~seen[:, block]] for x in (unread, batch.run(kernels)))
    )
    assert same and not seen[:, block].all()


@pytest.mark.parametrize("keys", ["causal", "window", "causal_window"])
def test_neighbours_that_see_other_keys_share_those_of_both(kernels, keys):
    """A window that is narrower than a block: the second sees a block that the first does not."""
    batch = Batch([150, 1, 40, 16, 17], keys=keys, window=0 if keys == "causal" else 9)
    choices = attention.space(batch.task, kernels.row)
    for key_tile, queries in itertools.product((2, 16), choices.get("queries", ())):
        knobs = {**attention.default(batch.task, kernels.row), "key_tile": key_tile}
        context = batch.run(kernels, {**knobs, "queries": queries})
        assert np.abs(context - batch.expected()).max() < TOLERANCE


@ALL
@pytest.mark.parametrize("masked", [-10000.0, FINFO_MIN, -np.inf], ids=str)
def test_attention_ignores_masked_keys(kernels, masked, variant):
    batch = Batch([70, 20], variant=variant)
    batch.keys[0, 3:9] = masked
    batch.keys[2] = masked  # a whole block in the middle
    with np.errstate(invalid="ignore"):
        context = batch.run(kernels)
    # of the others some see masked keys alone, where -10000 leaves few digits of a score
    queries = batch.keys.reshape(-1) == 0 if variant in CLOSING else slice(None)
    assert np.abs(context - batch.expected())[queries].max() < TOLERANCE


@pytest.mark.parametrize("masked", [MASKED, -np.inf], ids=str)
def test_attention_forgets_a_masked_first_tile_when_real_keys_follow(kernels, masked):
    batch = Batch([160])
    batch.keys[:4] = masked  # two tiles of two blocks
    knobs = {**attention.default(batch.task, kernels.row), "key_tile": 2}
    assert np.abs(batch.run(kernels, knobs) - batch.expected()).max() < TOLERANCE


def test_attention_rescales_when_each_tile_has_a_higher_maximum(kernels):
    batch = Batch([300])
    # rising keys: every tile's maximum is above all before it, by up to e**60 in all
    batch.keys[...] = np.linspace(-60, 0, batch.keys.size).reshape(batch.keys.shape)
    knobs = {**attention.default(batch.task, kernels.row), "key_tile": 2}
    assert np.abs(batch.run(kernels, knobs) - batch.expected()).max() < TOLERANCE


# Of one kind alone; tables that end beside a query's own key, in its block, and behind all keys.
@pytest.mark.parametrize("relative", ["keys", "queries", "both"])
@pytest.mark.parametrize(
    "last", [1, pytest.param(16, marks=SLOW), 40, pytest.param(999, marks=SLOW)]
)
def test_attention_meets_vectors_by_distance(kernels, relative, last):
    batch = Batch([150, 1, 40, 16, 17], relative=relative, last=last)
    assert np.abs(batch.run(kernels) - batch.expected()).max() < TOLERANCE


def test_attention_stays_exact_for_sharp_scores(kernels):
    batch = Batch([40, 31], scale=8.0)  # scores of some hundreds: all but one weight vanish
    # products of 64 float32 values of that size are exact to 1e-4, and so are their exponentials
    assert np.abs(batch.run(kernels) - batch.expected()).max() < 5e-3


@ALL
@pytest.mark.parametrize("masked", [-10000.0, MASKED, FINFO_MIN, -np.inf], ids=str)
def test_attention_gives_finite_numbers_when_all_keys_are_masked(kernels, masked, variant):
    batch = Batch([16, 48, 5], variant=variant)
    batch.keys[...] = masked
    context = batch.run(kernels)
    assert np.isfinite(context).all()
    assert np.abs(context).max() <= np.abs(batch.qkv).max() * 1.001  # a mean of values
    if variant in CLOSING:  # of those that a query sees
        expected = batch.expected()
        assert np.abs(context - expected).max() < (2e-3 if masked == -10000.0 else TOLERANCE)


@pytest.mark.parametrize("rows,heads", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_attention_broadcasts_a_bias_of_one_row_or_one_head(kernels, rows, heads):
    batch = Batch([30, 16])
    batch.task = task_of(2, 26, bias=True)
    rng = np.random.default_rng(1)
    bias = rng.standard_normal((rows, heads, 32, 32)).astype("float32")  # (B, H, query, key)
    packed = bias.reshape(rows, heads, 2, BLOCK_TOKENS, 32).transpose(0, 1, 2, 4, 3)
    operands = [lanes.to_lanes(batch.qkv), batch.keys, batch.table, np.ascontiguousarray(packed)]
    packed_context = kernels.call(kernels.build(batch.task), operands, (3, 52, BLOCK_TOKENS))
    expected = []
    for row, (first, count) in enumerate([(0, 2), (2, 1)]):
        tokens = count * BLOCK_TOKENS
        part = batch.qkv[first * BLOCK_TOKENS : first * BLOCK_TOKENS + tokens].astype("float64")
        q, k, v = (x.reshape(-1, 2, 26).transpose(1, 0, 2) for x in np.split(part, 3, axis=1))
        mask = batch.keys[first : first + count].reshape(-1)
        spec = AttentionSpec.from_shape(batch.task.shape)
        context = spec.reference(q, k, v, mask, bias[min(row, rows - 1), :, :tokens, :tokens])
        expected.append(context.transpose(1, 0, 2).reshape(-1, 52))
    assert np.abs(lanes.from_lanes(packed_context) - np.concatenate(expected)).max() < TOLERANCE


def test_attention_never_calls_the_scalar_exponential(kernels):
    assembly = kernels.build(task_of(12, 64)).inspect_source("asm")
    assert not re.search(r"\bexpf\b", assembly)
    assert ("%zmm" in assembly) == (kernels.row.vector_bits == 512)


@pytest.mark.parametrize("task", BERT, ids=lambda task: task.name)
@pytest.mark.parametrize("row", targets.TABLE, ids=lambda row: row.name)
def test_default_lies_in_its_own_space(task, row):
    assert attention.valid(task, row, attention.default(task, row))


def test_flops_counts_both_products():
    assert attention.flops(task_of(12, 64), 128) == 2 * 2 * 128 * 128 * 768


LACKED = {
    "by distance": {"bias": "by_distance"},
}


@pytest.mark.parametrize("lacked", LACKED)
def test_what_no_kernel_has_is_refused_by_name_before_anything_is_built(lacked):
    row = targets.resolve("x86-avx2", threads=1)
    task = Task("attention", {**task_of(4, 64).shape, **LACKED[lacked]})
    with pytest.raises(ModelError, match=f"x86-avx2 has no kernel for .*{lacked}.*{task.name}"):
        must_fit(task, row)
    with pytest.raises(ValueError, match=lacked):
        attention.kernel(task, attention.default(task, row), row)


HALF = ("x86-avx512-bf16", "x86-amx")  # by registers, by tiles
WRITES = ("to_fp32", "to_bf16", "to_int8")


@spread("writes case", HALF, WRITES, [(64, False), (28, True), (4, False)])
@pytest.mark.parametrize("blocks", [1, 3, 17])
def test_bf16_products_are_near_float32(kernels, writes, case, blocks):
    size, bias = case
    task = task_of(3, size, bias)
    task = Task("attention", {**task.shape, "precision": "bf16", "writes": writes})
    assert kernels.mistake(task, blocks) is None


@pytest.mark.parametrize("name", HALF)
@OTHERS
@pytest.mark.parametrize("blocks", [1, 17])
def test_bf16_products_of_other_variants_are_near_float32(kernels_of, name, blocks, variant):
    shape = {**task_of(3, 28, True, variant).shape, "precision": "bf16", "writes": "to_bf16"}
    assert kernels_of(name).mistake(Task("attention", shape), blocks) is None


TILES = [{"key_tile": 4, "chunk": 4}, pytest.param({"key_tile": 32, "chunk": 16}, marks=SLOW)]


# Channels that fill no tile, one, some, and more than there are tiles for.
@pytest.mark.parametrize("size", [2, 30, pytest.param(32, marks=SLOW), 96, 160])
@pytest.mark.parametrize("knobs", TILES, ids=str)
def test_tiles_take_heads_of_any_size(kernels_of, size, knobs):
    kernels = kernels_of("x86-amx")
    task = Task("attention", {**task_of(2, size).shape, "precision": "bf16"})
    for blocks in (1, 9):
        assert kernels.mistake(task, blocks, knobs) is None


def in_halves(batch, kernels, knobs=None):
    """A batch in bfloat16: the result in rows, and what float64 makes of the same halves."""
    batch.qkv = arithmetic.bf16_values(arithmetic.bf16_pairs(batch.qkv))
    task = Task("attention", {**batch.task.shape, "precision": "bf16"})
    values = sum(batch.spec.channels()[:2])
    operands = [arithmetic.bf16_qkv_lanes(batch.qkv, values), batch.keys, batch.table]
    shape = (len(batch.table), batch.spec.channels()[0], BLOCK_TOKENS)
    result = kernels.call(kernels.build(task, knobs), operands, shape)
    return lanes.from_lanes(result), batch.expected()


@pytest.mark.parametrize("knobs", TILES, ids=str)
@pytest.mark.parametrize("variant", ["all", *CLOSING])
def test_tiles_keep_sequences_of_unequal_lengths_apart(kernels_of, variant, knobs):
    """Chunks of queries begin and end within sequences, and hold several."""
    batch = Batch([50, 1, 16, 17, 200, 33, 2], size=32, variant=variant)
    got, want = in_halves(batch, kernels_of("x86-amx"), knobs)
    assert np.abs(got - want).max() < 2.0**-7


@pytest.mark.parametrize("lowest", [LOWEST, FINFO_MIN, -10000.0])
def test_tiles_give_the_mean_where_every_key_is_masked(kernels_of, lowest):
    batch = Batch([40], size=32)
    batch.keys[:] = lowest
    batch.qkv[:, : 2 * batch.spec.channels()[0]] = 0  # scores of nothing, in any precision
    got, want = in_halves(batch, kernels_of("x86-amx"))
    assert np.abs(got - want).max() < 2.0**-7


@OTHERS
@pytest.mark.parametrize("writes", ["to_bf16", "to_int8"])
def test_other_variants_write_narrow_forms(kernels, writes, variant):
    shape = {**task_of(2, 28, variant=variant).shape, "writes": writes}
    assert kernels.mistake(Task("attention", shape), 5) is None


# Heads that share keys: groups that a job takes at once or in parts, and heads of one channel pair.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "keys"),
    [
        (4, 2, "causal"),
        *(pytest.param(*c, marks=SLOW) for c in ((4, 1, "all"), (6, 2, "all"), (5, 1, "causal"))),
    ],
)
def test_groups_of_any_size_share_keys_and_values(kernels, heads, kv_heads, keys):
    spec = AttentionSpec(heads, kv_heads, 18, 18**-0.5, keys=keys)
    task = Task("attention", spec.shape())
    for queries in attention.space(task, kernels.row)["queries"]:
        knobs = {**attention.default(task, kernels.row), "queries": queries}
        assert kernels.difference(task, 5, knobs) < TOLERANCE


@pytest.mark.parametrize("row", ["x86-avx512", "x86-amx"])
@pytest.mark.parametrize("softcap", [0.5, pytest.param(30.0, marks=SLOW)])
def test_scores_are_bounded(kernels_of, row, softcap):
    halves = {"precision": "bf16"} if row == "x86-amx" else {}
    shape = {**VARIANTS["grouped"].spec(2, 26).shape(), "softcap": softcap, **halves}
    assert kernels_of(row).mistake(Task("attention", shape), 5) is None


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("writes", ["to_bf16", "to_fp32"])
def test_groups_in_bf16_are_near_float32(kernels_of, name, writes):
    shape = AttentionSpec(6, 2, 28, 0.2, keys="window", window=20).shape()
    task = Task("attention", {**shape, "precision": "bf16", "writes": writes})
    assert kernels_of(name).mistake(task, 7) is None
