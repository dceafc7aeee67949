"""The seven layout conversions against numpy, on lengths that are no multiple of a block."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.loader import token_blocks
from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import SCHEDULES, lanes, layout
from bertile.schedules.cpu.attention_parts import LOWEST
from bertile.schedules.task import Task

SEVEN = ["tokens_in", "tokens_out", "rows_in", "rows_out", "first_token", "key_mask", "query_bias"]
LENGTHS = [50, 1, 16, 17, 33, 49, 2]


def task_of(operation, channels=26):
    sized = operation not in ("key_mask", "query_bias")
    return Task(operation, {"channels": channels} if sized else {})


def table_of(lengths):
    return token_blocks(np.arange(max(lengths)) < np.array(lengths)[:, None], BLOCK_TOKENS)


def test_every_conversion_is_tested_here():
    conversions = {
        name for name, schedule in SCHEDULES.items() if schedule in vars(layout).values()
    }
    assert conversions == set(SEVEN)


@pytest.mark.parametrize("operation", SEVEN)
@pytest.mark.parametrize("channels", [768, 2, 13])
def test_conversion_is_exact(kernels, operation, channels):
    for blocks in (1, 2, 5):
        assert kernels.difference(task_of(operation, channels), blocks) == 0


@pytest.mark.parametrize("operation", SEVEN)
def test_conversion_has_no_knobs(kernels, operation):
    schedule, task = SCHEDULES[operation], task_of(operation)
    assert schedule.space(task, kernels.row) == schedule.default(task, kernels.row) == {}
    assert schedule.flops(task, 128) == 0


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


def test_tokens_in_reads_each_block_from_its_own_row(kernels):
    x, table = random(7, 50, 26), table_of(LENGTHS)
    packed = kernels.call(
        kernels.build(task_of("tokens_in")), [x, table], (len(table), 26, BLOCK_TOKENS)
    )
    padded = np.pad(x, ((0, 0), (0, BLOCK_TOKENS), (0, 0)))
    for block, (row, start, _, _) in enumerate(table):
        assert np.array_equal(packed[block].T, padded[row, start : start + BLOCK_TOKENS])


def test_tokens_out_writes_zeros_where_no_block_lies(kernels):
    table = table_of(LENGTHS)
    x = random(len(table), 26, BLOCK_TOKENS)
    for length in (50, 64, 100):  # the batch may be wider than its longest sequence
        tokens = kernels.call(kernels.build(task_of("tokens_out")), [x, table], (7, length, 26))
        expected = np.zeros((7, length + BLOCK_TOKENS, 26), "float32")
        for block, (row, start, _, _) in enumerate(table):
            expected[row, start : start + BLOCK_TOKENS] = x[block].T
        assert np.array_equal(tokens, expected[:, :length])


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 1000])
def test_rows_in_and_rows_out_are_inverse(kernels, rows):
    x = random(rows, 26)
    blocks = -(-rows // BLOCK_TOKENS)
    inside = kernels.call(kernels.build(task_of("rows_in")), [x], (blocks, 26, BLOCK_TOKENS))
    assert np.array_equal(inside, lanes.to_lanes(x))
    outside = kernels.call(kernels.build(task_of("rows_out")), [inside], (rows, 26))
    assert np.array_equal(outside, x)


def test_first_token_takes_the_first_lane_of_each_sequence(kernels):
    table = table_of(LENGTHS)
    x = random(len(table), 26, BLOCK_TOKENS)
    first_tokens = kernels.call(kernels.build(task_of("first_token")), [x, table], (7, 26))
    assert np.array_equal(first_tokens, x[np.flatnonzero(table[:, 1] == 0), :, 0])


@pytest.mark.parametrize("rows", [1, 7])
def test_key_mask_closes_keys_past_the_end(kernels, rows):
    table, mask = table_of(LENGTHS), random(rows, 1, 1, 50)
    packed = kernels.call(
        kernels.build(task_of("key_mask")), [mask, table], (len(table), BLOCK_TOKENS)
    )
    for block, (row, start, _, _) in enumerate(table):
        expected = np.full(BLOCK_TOKENS, LOWEST, "float32")
        inside = mask[min(row, rows - 1), 0, 0, start : start + BLOCK_TOKENS]
        expected[: len(inside)] = inside
        assert np.array_equal(packed[block], expected)


@pytest.mark.parametrize("rows,heads,length", [(1, 1, 1), (2, 3, 17), (1, 12, 32), (3, 1, 50)])
def test_query_bias_puts_queries_in_lanes(kernels, rows, heads, length):
    bias = random(rows, heads, length, length)
    tiles = -(-length // BLOCK_TOKENS)
    shape = (rows, heads, tiles, tiles * BLOCK_TOKENS, BLOCK_TOKENS)
    packed = kernels.call(kernels.build(task_of("query_bias")), [bias], shape)
    # (B, H, tile, key, lane) → (B, H, query, key)
    queries = packed.transpose(0, 1, 2, 4, 3).reshape(
        rows, heads, tiles * BLOCK_TOKENS, tiles * BLOCK_TOKENS
    )
    assert np.array_equal(queries[:, :, :length, :length], bias)
    assert not queries[:, :, length:].any() and not queries[:, :, :, length:].any()
