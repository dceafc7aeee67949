"""The embedding kernel against numpy: several tables, sequences of unequal lengths, bad ids."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.loader import token_blocks
from bertile.schedules import BLOCK_TOKENS, reference
from bertile.schedules.cpu import lanes
from bertile.schedules.cpu.embedding import embedding
from bertile.schedules.task import Task
from bertile.targets import rows as targets

TOLERANCE = 1e-5  # a sum of three values of the size of 1, and its LayerNorm


def task_of(channels, rows, ids=None):
    ids = ids or "_".join(["int64"] * len(rows.split("_")))
    return Task("embedding", {"channels": channels, "epsilon": 1e-12, "ids": ids, "rows": rows})


BERT = [
    task_of(768, "30522_2_512"),
    task_of(384, "30522_2_512", "int32_int32_int64"),
    task_of(312, "1000_2_512"),
    task_of(768, "1000_514"),
    task_of(128, "1000"),
    task_of(13, "7_1"),
]


@pytest.mark.parametrize("task", BERT, ids=lambda task: task.name)
def test_embedding_equals_numpy(kernels, task):
    assert kernels.difference(task, blocks=3) < TOLERANCE


def test_embedding_equals_numpy_at_every_point_of_its_space(kernels):
    task = task_of(312, "1000_2_512")
    for sums in embedding.space(task, kernels.row)["sums"]:
        assert kernels.difference(task, 2, {"sums": sums}) < TOLERANCE


class Lookup:
    """Words and positions for sequences of unequal lengths; positions are (1, S), as exported."""

    def __init__(self, lengths, channels=26):
        rng = np.random.default_rng(0)
        self.task = task_of(channels, "100_64", "int64_int32")
        longest = max(lengths)
        self.words = rng.integers(0, 100, (len(lengths), longest))
        self.positions = np.arange(longest, dtype="int32")[None]
        mask = np.arange(longest) < np.array(lengths)[:, None]
        self.place = token_blocks(mask, BLOCK_TOKENS)
        self.weights = [
            rng.standard_normal(shape).astype("float32")
            for shape in ((100, channels), (64, channels), (channels,), (channels,))
        ]

    def run(self, kernels):
        operands = [self.words, self.positions, self.place, *self.weights]
        shape = (len(self.place), self.task.shape["channels"], BLOCK_TOKENS)
        return lanes.from_lanes(kernels.call(kernels.build(self.task), operands, shape))

    def expected(self):
        words, positions, gamma, beta = self.weights
        rows = []
        for row, start, _, _ in self.place:  # past the end the last token is repeated
            at = np.minimum(start + np.arange(BLOCK_TOKENS), self.words.shape[1] - 1)
            ids = np.clip(self.words[row, at], 0, len(words) - 1)
            rows.append(words[ids].astype("float64") + positions[self.positions[0, at]])
        return reference.layer_norm(np.concatenate(rows), gamma, beta, 1e-12)


@pytest.mark.parametrize("lengths", [[1], [16], [17, 3], [50, 1, 16, 17, 33, 49, 2]], ids=str)
def test_embedding_reads_each_block_from_its_own_row(kernels, lengths):
    lookup = Lookup(lengths)
    assert np.abs(lookup.run(kernels) - lookup.expected()).max() < TOLERANCE


def test_embedding_stays_inside_its_table_when_ids_are_wrong(kernels):
    lookup = Lookup([20, 5])
    lookup.words[0, 3], lookup.words[1, 2] = 10**6, -5
    assert np.abs(lookup.run(kernels) - lookup.expected()).max() < TOLERANCE


@pytest.mark.parametrize("wrong", [2**31, 2**40 + 1, -(2**40), 2**63 - 1])
def test_embedding_stays_inside_its_table_when_ids_exceed_32_bits(kernels, wrong):
    lookup = Lookup([20])
    lookup.words[0, 7] = wrong
    assert np.isfinite(lookup.run(kernels)).all()


@pytest.mark.parametrize("task", BERT, ids=lambda task: task.name)
@pytest.mark.parametrize("row", targets.TABLE, ids=lambda row: row.name)
def test_default_lies_in_its_own_space(task, row):
    assert embedding.valid(task, row, embedding.default(task, row))
