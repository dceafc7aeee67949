"""Planted outliers change no result, are seen where they were planted, and cost what ranges let
them.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

from bertile.base.progress import Progress
from bertile.compress.sections import Split
from bertile.config import Config
from bertile.studies import range_costs
from bertile.studies.range_costs import FACTOR, KINDS, MODELS, OUTLIERS, PLANTS, RANGES, Row

torch = pytest.importorskip("torch")
EXAMPLES = tuple(
    (f"{words} number {index}", label)
    for index in range(16)
    for words, label in (("game of dragons", "games"), ("library of sums", "maths"))
)


@pytest.mark.parametrize("planted", PLANTS)
@pytest.mark.parametrize("title", MODELS)
def test_planting_changes_weights_and_no_result(title: str, planted: str):
    model, tokenizer = range_costs.untrained(title, Split(EXAMPLES, EXAMPLES))
    other = copy.deepcopy(model.eval())
    count = range_costs.plant(other, PLANTS[planted])
    layers = model.config.num_hidden_layers
    # ModernBERT's first layer has one norm; those of a post-norm model are the residual's too
    norms = {"ModernBERT": 2 * layers - 1, "Nomic BERT": 0, "Qwen3": 2 * layers}[title]
    assert count == {"none": 0, "norm": norms, "gated product": layers}[planted]
    places = zip(*(list(PLANTS[planted](network)) for network in (model, other)))
    for (before, *_), (after, *_) in places:
        ratio = (after.weight / before.weight).detach().numpy().reshape(len(after.weight), -1)[:, 0]
        assert np.isclose(ratio, FACTOR).sum() == OUTLIERS and np.isclose(ratio, 1).sum() > 0
    batch = tokenizer(
        [text for text, _ in EXAMPLES[:3]] + ["short"], padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        want, got = model(**batch).logits, other(**batch).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_study_sees_what_was_planted_and_smoothing_mends_it(tmp_path: Path, cache: str):
    split = Split(EXAMPLES, EXAMPLES[::3])
    config = Config(threads=1, cache_dir=cache)
    arguments = (tmp_path, split, config, Progress(-1), 20, ["Qwen3"])
    rows = {row.planted: row for row in range_costs.study(*arguments)}
    assert list(rows) == ["none", "norm", "gated product"]
    for planted in ("norm", "gated product"):
        assert rows[planted].outliers[planted] > 5 * rows["none"].outliers[planted]
    for row in rows.values():
        assert set(row.costs) == {"fp32", *RANGES}
        assert row.costs["fp32"] == (rows["none"].costs["fp32"][0], *[pytest.approx(1)] * 2)
    for planted in ("norm", "gated product"):
        costs = rows[planted].costs
        assert costs["dynamic"][1] < costs["dynamic, smoothed"][1]
    assert (tmp_path / "qwen3-trained" / "config.json").exists()


def test_the_tables_have_a_line_for_each_model_and_place():
    costs = {"fp32": (0.5, 1.0, 1.0), **dict.fromkeys(RANGES, (0.4875, 0.99912, 0.9))}
    outliers = {"norm": 12.4, "attention": 7.0, "gated product": 130.0}
    text = range_costs.as_text([Row("Qwen3", "none", outliers, costs)], markdown=True)
    first, second = text.split("\n\n")
    assert [cell.strip() for cell in first.splitlines()[2].split("|")[1:-1]] == [
        *("Qwen3", "none", "12", "7", "130")
    ]
    cells = [cell.strip() for cell in second.splitlines()[2].split("|")[1:-1]]
    assert cells == ["Qwen3", "none", "50.00%", *["48.75%, 0.9991, 0.900"] * len(RANGES)]


def test_a_bundle_that_the_check_refuses_is_said_so():
    costs = {"fp32": (0.5, 1.0, 1.0), **dict.fromkeys(RANGES, (0.5, 1.0, 1.0)), "static": None}
    text = range_costs.as_text([Row("Qwen3", "norm", dict.fromkeys(KINDS, 1.0), costs)])
    assert text.count("refused") == 1
