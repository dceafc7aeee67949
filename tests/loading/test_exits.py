"""Texts leave when a head is sure of them, those that stay are packed, and the order is the
caller's.
"""

from __future__ import annotations

import numpy as np
import pytest

from bertile.base.errors import InputError
from bertile.loading import exits
from bertile.loading.blocks import blocks_of

EXITS = {"threshold": 0.8, "layers": [2, 4, 6], "stages": [{}, {}, {}]}
ENDS = np.array([3, 17, 33, 1, 16])


def test_confidence_is_the_largest_probability():
    logits = np.array([[0.0, 0.0], [1e4, -1e4], [-3.0, -2.0]], np.float32)
    np.testing.assert_allclose(exits.confidence(logits), [0.5, 1.0, 1 / (1 + np.exp(-1))])


@pytest.mark.parametrize("stay", [[1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
def test_blocks_of_rows_that_stay_are_those_of_a_batch_of_them(stay):
    stay = np.array(stay, bool)
    table = exits.without_others(blocks_of(ENDS, 16), stay)
    np.testing.assert_array_equal(table, blocks_of(ENDS[stay], 16))


class Stages:
    """Three heads of two labels, of which `sure[stage, row]` says how sure each is of a row.

    A state is, in every block, the number of the row that the block belongs to.
    """

    def __init__(self, sure):
        self.sure, self.rows = np.asarray(sure), []

    def __call__(self, number, values, table, rows, states):
        ids, fill = values
        assert fill == 1 and len(ids) == rows == table[:, 0].max() + 1
        if number:
            (state,) = states
            np.testing.assert_array_equal(state[:, 0, 0], ids[table[:, 0], 0])
            np.testing.assert_array_equal(state[:, 0, 1], table[:, 1])
        own = np.stack([ids[table[:, 0], 0], table[:, 1]], 1).astype(np.float32)
        self.rows.append(ids[:, 0].tolist())
        sure = self.sure[number, ids[:, 0]]
        return [own[:, None]], np.stack([np.log(sure), np.log(1 - sure)], 1)


def test_each_text_leaves_at_the_first_head_that_is_sure():
    sure = np.array(
        [[0.9, 0.6, 0.7, 0.95, 0.7], [0.5, 0.9, 0.7, 0.5, 0.7], [0.6, 0.7, 0.8, 0.9, 0.6]]
    )
    stages, ids = Stages(sure), np.arange(5)[:, None]
    left = exits.run_stages(stages, (0.8, 0.8), [ids, 1], blocks_of(ENDS, 16), 5)
    assert stages.rows == [[0, 1, 2, 3, 4], [1, 2, 4], [2, 4]]
    np.testing.assert_array_equal(left.stages, [0, 1, 2, 0, 2])
    np.testing.assert_allclose(np.exp(left.logits[:, 0]), sure[left.stages, np.arange(5)])


def test_nothing_runs_behind_the_last_text():
    stages = Stages(np.full((3, 5), 0.9))
    left = exits.run_stages(stages, (0.8, 0.8), [np.arange(5)[:, None], 1], blocks_of(ENDS, 16), 5)
    assert stages.rows == [[0, 1, 2, 3, 4]] and not left.stages.any()


def test_none_is_surer_than_one():
    stages = Stages(np.full((3, 5), 1 - 1e-12))
    left = exits.run_stages(stages, (1.0, 1.0), [np.arange(5)[:, None], 1], blocks_of(ENDS, 16), 5)
    assert (left.stages == 2).all()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_all_can_be_sent_out_at_one_head(stage):
    stages = Stages(np.full((3, 5), 0.7))
    limits = exits.leaving_at(stage, EXITS)
    left = exits.run_stages(stages, limits, [np.arange(5)[:, None], 1], blocks_of(ENDS, 16), 5)
    assert (left.stages == stage).all()


def test_thresholds_are_the_bundles_unless_others_are_asked_for():
    assert exits.thresholds(None, EXITS) == (0.8, 0.8)
    assert exits.thresholds(0.5, EXITS) == (0.5, 0.5)
    assert exits.thresholds([0.5, 1], EXITS) == (0.5, 1.0)
    assert exits.thresholds(None, {**EXITS, "threshold": None}) is None
    assert exits.thresholds(None, None) is None


@pytest.mark.parametrize("asked", [[0.1, 0.2, 0.3], "0.5", float("nan"), True, []])
def test_what_is_no_threshold_is_refused(asked):
    with pytest.raises(InputError, match="give a number from 0 to 1, or 2 of them"):
        exits.thresholds(asked, EXITS)


def test_a_bundle_without_early_heads_has_no_threshold():
    with pytest.raises(InputError, match="compile the model with --exit-threshold"):
        exits.thresholds(0.5, None)
