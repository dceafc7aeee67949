"""Engines are called in turns, and only those that answer alike are compared."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.base.errors import ModelError
from bertile.studies import small_calls
from bertile.studies.small_calls import TURN, Row


def test_engines_take_turns_and_the_first_of_each_is_not_counted():
    order: list[str] = []
    engines = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = small_calls.timed_in_turns(engines, 2 * TURN)
    assert order == [*["a"] * TURN, *["b"] * TURN] * 3
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2 * TURN, "b": 2 * TURN}
    assert all(taken > 0 for taken in times["a"])


def test_table_says_how_ours_compares():
    text = small_calls.as_text([Row("Bertile", 29, 30, 33), Row("ONNX Runtime", 38, 40, 50)])
    assert text.splitlines()[-1].split() == ["ONNX", "Runtime", "38", "40", "50", "0.75"]


def test_other_answers_are_no_comparison():
    inputs = {"attention_mask": np.ones((1, 2), np.int64)}
    ours = [np.ones((1, 2, 4), np.float32)]
    small_calls._check_same(ours, ours, inputs, "fp32")
    with pytest.raises(ModelError, match="not the same model"):
        small_calls._check_same([ours[0] + 1], ours, inputs, "fp32")


@pytest.mark.slow  # it compiles a model
def test_both_engines_are_timed(capsys):
    small_calls.main(["--repeat", "50", "--markdown"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
    names, medians = zip(*((row[1].strip(), float(row[3])) for row in rows[2:]))
    assert names == ("Bertile", "ONNX Runtime")
    assert 5 < min(medians) and max(medians) < 5000
