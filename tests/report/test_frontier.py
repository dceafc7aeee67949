"""Accuracy against latency: intervals, the frontier, and the page of a whole small run."""

from __future__ import annotations

import csv
import itertools
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from helpers import text_models, tiny_training

from bertile.base.progress import Progress
from bertile.cli import main
from bertile.config import Config
from bertile.errors import UsageError
from bertile.export import checkpoints, early_heads
from bertile.families import table
from bertile.report import (
    frontier,
    frontier_page,
    frontier_scores,
    frontier_times,
    trained_points,
)


def row(model: str, ms: float, score: float, **more: object) -> dict[str, object]:
    return {
        "model": model,
        "engine": "bertile",
        "precision": "fp32",
        "median_ms": ms,
        "p90_ms": ms,
        "score": score,
        "low": score - 0.01,
        "high": score + 0.01,
        "joules": None,
        "multiply_adds": 1e6,
        "weight_bytes": 2_000_000,
        "instructions": None,
        "left": "",
        "command": f"bertile compile {model}",
        **more,
    }


ROWS = [
    row("slow & best", 9.0, 0.9),
    row("beaten", 9.5, 0.85),
    row("fast", 1.0, 0.8, instructions=34e6, left="layer 2: 75.0%, layer 6: 25.0%"),
    row("as fast, worse", 1.0, 0.7, engine="onnxruntime"),
    row("middle", 3.0, 0.88, joules=0.125, engine="openvino"),
]
CONTENT = {
    "rows": ROWS,
    "data": "a <b> file",
    "texts": 200,
    "metric": "accuracy",
    "length": 128,
    "threads": 2,
    "cpu": "a processor",
    "versions": {"bertile": "Bertile 1", "openvino": "OpenVINO 2"},
    "notes": ["joules are not known"],
    "time": "2026-01-01",
}


def test_frontier_is_what_nothing_beats_in_both():
    assert [ROWS[place]["model"] for place in frontier_page.best(ROWS)] == [
        "fast",
        "middle",
        "slow & best",
    ]


def test_interval_is_that_of_the_normal_approximation():
    chance = np.random.default_rng(1)
    right = (chance.random(800) < 0.8).astype(float)
    low, high = frontier_scores.bootstrap(right)
    mean, deviation = right.mean(), right.std() / np.sqrt(len(right))
    assert low == pytest.approx(mean - 1.96 * deviation, abs=0.003)
    assert high == pytest.approx(mean + 1.96 * deviation, abs=0.003)
    assert frontier_scores.bootstrap(np.ones(50)) == (1.0, 1.0)


def test_page_is_whole_and_shows_every_point():
    page = frontier_page.html(CONTENT)
    tree = ElementTree.fromstring(page.partition("\n")[2])
    text = " ".join(tree.itertext())
    assert all(str(entry["model"]) in text for entry in ROWS)
    assert "75.0%" in text and " 34" in " ".join(cell.text or "" for cell in tree.iter("td"))
    assert "0.8900 … 0.9100" in text and "joules are not known" in text and "0.125" in text
    assert len(list(tree.iter("circle"))) == 3 + 1, "of Bertile, and the legend's"
    assert len(list(tree.iter("polygon"))) == 2 and len(list(tree.iter("rect"))) == 2
    assert "http" not in page.replace("http-equiv", ""), "nothing is fetched"
    bold = [item for item in tree.iter("tr") if item.get("class") == "best"]
    assert len(bold) == 3


def test_columns_that_no_row_knows_are_left_out():
    unknown = {"joules": None, "instructions": None, "left": ""}
    page = frontier_page.html({**CONTENT, "rows": [{**entry, **unknown} for entry in ROWS]})
    heads = [cell.text for cell in ElementTree.fromstring(page.partition("\n")[2]).iter("th")]
    assert "MB of weights" in heads and not {"joules", "million instructions"} & {*heads}


def test_a_point_far_below_all_others_is_an_arrow_at_the_edge():
    assert frontier_page.shown_on_axis(ROWS) == sorted(ROWS, key=lambda entry: -entry["score"])
    near, far = [entry for entry in ROWS if entry["score"] > 0.75], row("one-shot", 1.1, 0.1)
    assert far not in frontier_page.shown_on_axis([*near, far])
    page = frontier_page.html({**CONTENT, "rows": [*near, far]})
    tree = ElementTree.fromstring(page.partition("\n")[2])
    arrows = [path for path in tree.iter("path") if "below" in path.get("class")]
    assert len(arrows) == 1 and "0.1000" in arrows[0].find("title").text
    numbers = [text.text for text in tree.iter("text")]
    assert "0.78" in numbers and "0.2" not in numbers, "the axis is that of the others"


@pytest.mark.parametrize("count", [2, 9])
def test_names_of_points_do_not_overlap(count):
    near = [row(f"a rather long name {n}", 2.0 + 0.01 * n, 0.8 + 1e-4 * n) for n in range(count)]
    tree = ElementTree.fromstring(frontier_page.svg({**CONTENT, "rows": near}))
    names = [text for text in tree.iter() if text.get("class") == "name"]
    heights = sorted(float(text.get("y")) for text in names)
    assert len(names) == count
    assert all(below - above >= 13 for above, below in itertools.pairwise(heights))
    assert 0 < heights[0] and heights[-1] < frontier_page.HEIGHT - frontier_page.BOTTOM


def test_picture_is_a_file_of_its_own():
    picture = frontier_page.svg(CONTENT)
    tree = ElementTree.fromstring(picture)
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(list(tree.iter("{http://www.w3.org/2000/svg}circle"))) == 3 + 1
    assert "slow &amp; best" in picture


def test_points_are_named_by_model_and_precision():
    assert frontier.parse("out/p90@int8") == frontier.Point("p90 int8", "out/p90", "int8")
    assert frontier.parse("a b=out/p90") == frontier.Point("a b", "out/p90", "fp32")
    pruned = frontier.parse("synthetic:bert-base@0.9:4x1")
    assert (pruned.model, pruned.precision) == ("synthetic:bert-base@0.9:4x1", "fp32")
    early = frontier.parse("out/early@int8:0.9")
    assert early == frontier.Point("early int8, exit at 0.9", "out/early", "int8", 0.9)
    with pytest.raises(UsageError, match="names no model"):
        frontier.parse("x=@int8")


def test_time_of_texts_is_that_of_where_they_left():
    times = [[1.0, 2.0, 3.0], [10.0, 10.0, 10.0]]
    assert frontier_times.of_texts(times, np.array([0.75, 0.25])) == {
        "median_ms": 4.0,
        "p90_ms": 10,
    }
    assert frontier_times.of_texts(times[:1], np.ones(1)) == {"median_ms": 2.0, "p90_ms": 3.0}
    left = frontier_scores.left_at(np.array([2, 6, 2, 2]), {"layers": [2, 4, 6]})
    np.testing.assert_array_equal(left, [0.75, 0, 0.25])
    assert frontier_scores.in_words(left, {"layers": [2, 4, 6]}).startswith(
        "layer 2: 75.0%, layer 4: "
    )


def test_command_makes_a_compressed_model_again(tmp_path):
    report = {
        "model": "dense",
        "task": "text",
        "teacher": "dense",
        "data": {"train": "debian", "eval": None, "unlabelled": ["debian"]},
        "recipe": {"prune": {"sparsity": 0.8, "rewind": None}},
    }
    (tmp_path / "compression.json").write_text(json.dumps(report))
    lines = frontier.command(frontier.Point("p", str(tmp_path), "int8")).splitlines()
    assert lines[0] == (
        f"bertile compress dense -o {tmp_path} --task text --data debian --unlabelled debian"
        " --set prune.sparsity=0.8"
    )
    assert lines[1] == f"bertile compile {tmp_path} -o BUNDLE --precision int8"
    second = tmp_path / "second"
    second.mkdir()
    again = {**report, "model": str(tmp_path), "teacher": str(tmp_path)}
    (second / "compression.json").write_text(json.dumps(again))
    lines = frontier.command(frontier.Point("p", str(second), "int8", 0.9)).splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["bertile", "compress", "dense"],
        ["bertile", "compress", str(tmp_path)],
        ["bertile", "compile", str(second)],
    ]
    assert lines[2].endswith(" --precision int8 --exit-threshold 0.9")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, with a head behind the first."""
    directory = text_models.save(
        tmp_path_factory.mktemp("pareto") / "tiny",
        "SequenceClassification",
        labels=tiny_training.LABELS,
    )
    loaded = checkpoints.load(directory).model
    early_heads.write(early_heads.heads(loaded, table.of_type("bert"), [1]), directory)
    return directory


@pytest.mark.slow
def test_run_measures_all_engines_of_all_points(tmp_path, model, stages):
    data = tiny_training.write(tmp_path / "texts.tsv", 60)
    points = [frontier.Point("floats", str(model)), frontier.Point("bytes", str(model), "int8")]
    points.append(frontier.Point("early", str(model), "fp32", 0.51))
    config = Config(cache_dir=stages, tune="none", threads=1)
    content = frontier.write(
        points, data, tmp_path / "out", config, Progress(-1), ("onnxruntime",), 16, 5
    )
    rows = list(csv.DictReader((tmp_path / "out" / "pareto.csv").open()))
    assert [(entry["model"], entry["engine"]) for entry in rows] == [
        ("floats", "bertile"),
        ("floats", "onnxruntime"),
        ("bytes", "bertile"),
        ("bytes", "onnxruntime"),
        ("early", "bertile"),
    ]
    by_name = {(entry["model"], entry["engine"]): entry for entry in content["rows"]}
    same = by_name["floats", "bertile"]["score"], by_name["floats", "onnxruntime"]["score"]
    assert same[0] == same[1]
    for entry in content["rows"]:
        assert entry["low"] <= entry["score"] <= entry["high"] and entry["median_ms"] > 0
    assert (
        by_name["bytes", "bertile"]["weight_bytes"]
        < 0.5 * (by_name["floats", "bertile"]["weight_bytes"])
    )
    early, whole = by_name["early", "bertile"], by_name["floats", "bertile"]
    assert early["left"].startswith("layer 1: ") and "layer 1: 0.0%" not in early["left"]
    assert early["weight_bytes"] < whole["weight_bytes"] + 10_000
    ElementTree.fromstring((tmp_path / "out" / "pareto.html").read_text().partition("\n")[2])


MISTAKES = {
    "no point": (["--data", "TEXTS"], "no point is asked for"),
    "no texts": (["a@int8", "--data", "none.tsv"], "there is no file"),
    "twice": (["x=a", "x=b", "--data", "TEXTS"], "two points have the same name"),
    "elsewhere": (
        ["a", "--data", "TEXTS", "--target", "arm-a72"],
        "a bundle for arm-a72 cannot be timed here",
    ),
    "no task": (["--recipe", "int8", "--model", "m", "--data", "TEXTS"], "--task is missing"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(tmp_path, capsys, arguments, message):
    code = 3 if "arm-a72" in arguments else 2  # 3: it would go elsewhere
    texts = tiny_training.write(tmp_path / "texts.tsv")
    words = [str(texts) if word == "TEXTS" else word for word in arguments]
    assert main.main(["pareto", *words, "-q", "-o", str(tmp_path / "out")]) == code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_recipes_are_trained_once_and_named_by_what_they_are(tmp_path, model):
    texts = tiny_training.write(tmp_path / "texts.tsv", 80)
    other = tiny_training.write(tmp_path / "other.tsv", 40, seed=7)
    arguments = (str(model), "text", str(texts), str(other), ())
    settings = ("train.steps=2", *tiny_training.QUICK[1:])
    with text_models.single_thread():
        points = [
            trained_points.trained(text, *arguments, settings, tmp_path / "models", Progress(-1))
            for text in ("prune-80+int8", "prune-80+int8@fp32", "finetune@int8")
        ]
    assert [point.name for point in points] == [
        "prune-80+int8 int8",
        "prune-80+int8 fp32",
        "finetune int8",
    ]
    assert points[0].model == points[1].model
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [
        "finetune",
        "prune-80+int8",
    ]
