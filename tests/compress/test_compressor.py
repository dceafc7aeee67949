"""`bertile compress` as a whole: every task, every section of a recipe, and mistakes in a line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import text_models, tiny_training

from bertile.cli import main
from bertile.compress import compressor, recipe, tasks
from bertile.export import checkpoints, early_heads
from bertile.families import table

WORDS = [word for word in text_models.WORDS if word.isalpha()]


def call(capsys, *arguments):
    code = main.main(["compress", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def layer_weights(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = checkpoints.load(directory)
    layers = table.named(checkpoint.family).encoder_layers(checkpoint.model)
    return {name: linear.weight.detach() for layer in layers for name, linear in layer.items()}


def pairs() -> list[dict[str, object]]:
    """Whether both texts have the same first word."""
    chance = np.random.default_rng(1)
    rows = []
    for number in range(120):
        first, other = chance.choice(["cat", "book"], 2, replace=False)
        second = first if number % 2 else other
        label = ("different", "same")[number % 2]
        rows.append({"sentence1": f"{first} sat", "sentence2": f"the {second}", "label": label})
    return rows


def words() -> list[dict[str, object]]:
    """Cities are tagged."""
    chance = np.random.default_rng(2)
    rows = []
    for _ in range(120):
        chosen = [str(word) for word in chance.choice(WORDS[:40], 6)]
        tags = ["LOC" if word in ("paris", "london", "berlin") else "O" for word in chosen]
        rows.append({"tokens": chosen, "tags": tags})
    return rows


def questions() -> list[dict[str, object]]:
    """The word behind "in" is the answer."""
    chance = np.random.default_rng(3)
    rows = []
    for _ in range(120):
        before, city, behind = (str(word) for word in chance.choice(WORDS[:40], 3))
        context = f"{before} lives in {city} {behind}"
        start = len(f"{before} lives in ")
        answers = {"text": [city], "answer_start": [start]}
        rows.append({"question": "where ?", "context": context, "answers": answers})
    return rows


TASKS = {
    "pair": ("SequenceClassification", ("different", "same"), pairs),
    "tokens": ("TokenClassification", ("LOC", "O"), words),
    "answers": ("QuestionAnswering", (), questions),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_learns_with_all_sections_at_once(tmp_path, task):
    kind, labels, rows = TASKS[task]
    model = text_models.save(tmp_path / "model", kind, labels=labels, initializer_range=0.1)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    settings = ("train.steps=60", "prune.sparsity=0.5", "distill.labels=1", "distill.soft=0.01")
    report = tiny_training.compress(
        tmp_path, model, ("distill", "prune-90", "int8"), *settings, task=task, dataset=str(path)
    )
    assert report["metric"] == tasks.TASKS[task].metric
    losses = [
        float(line.split(",")[1])
        for line in (tmp_path / "out" / "steps.csv").read_text().splitlines()[1:]
    ]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    assert checkpoints.load(tmp_path / "out").head == tasks.TASKS[task].head
    for weight in layer_weights(tmp_path / "out").values():  # some round to zero besides
        assert 0.5 <= float((weight == 0).float().mean()) < 0.52


def test_encoder_gets_a_new_head_with_the_labels_of_the_data(tmp_path):
    model = text_models.save(tmp_path / "model", "", initializer_range=0.1)
    report = tiny_training.compress(tmp_path, model, ("finetune",), "train.steps=60")
    assert checkpoints.load(tmp_path / "out").labels == tiny_training.LABELS
    assert report["score"] > 0.8


def test_pruning_at_once_needs_no_step(tmp_path, teacher):
    for name in ("one-shot-90", "second-order-50"):
        report = tiny_training.compress(
            tmp_path / name, teacher, (name,), "train.steps=0", "prune.pattern=4x1"
        )
        assert report["steps"] == 0 and not (tmp_path / name / "out" / "steps.csv").exists()
        shares = [
            float((w == 0).float().mean()) for w in layer_weights(tmp_path / name / "out").values()
        ]
        wanted = report["recipe"]["prune"]["sparsity"]
        assert shares == pytest.approx([wanted] * 12, abs=0.01)


def test_zeros_that_were_set_at_once_stay_while_the_rest_trains(tmp_path, teacher):
    tiny_training.compress(tmp_path, teacher, ("second-order-50",), "train.steps=10")
    assert all(
        float((weight == 0).float().mean()) == 0.5
        for weight in layer_weights(tmp_path / "out").values()
    )


def test_structured_and_depth_are_told(tmp_path, teacher):
    report = tiny_training.compress(
        tmp_path, teacher, ("structured",), "depth.layers=1", "train.steps=10"
    )
    assert report["kept_layers"] == [1]
    assert report["removed"] == {"heads": 0, "neurons": 16}, "of 2 heads a quarter is none"
    assert checkpoints.load(tmp_path / "out").model.config.num_hidden_layers == 1


@pytest.mark.parametrize("form", ["k-means", "binary"])
def test_storage_says_what_it_costs(tmp_path, teacher, form):
    report = tiny_training.compress(tmp_path, teacher, (form,), "train.steps=10")
    most = {"k-means": 16, "binary": 2}[form]
    for name, weight in layer_weights(tmp_path / "out").items():
        rows = [weight] if form == "k-means" else list(weight)
        assert all(len(row.unique()) <= most for row in rows), name
    assert report["storage"]["bytes"] < report["storage"]["int8_bytes"]


def test_early_heads_learn_and_lie_beside_the_model(tmp_path, teacher):
    report = tiny_training.compress(
        tmp_path, teacher, ("early-exit",), "early_exit.layers=[1]", "train.steps=40"
    )
    assert len(report["exits"]) == 1 and report["exits"][0] > 0.8
    model = checkpoints.load(tmp_path / "out").model
    (head,) = early_heads.read(model, table.of_type("bert"), tmp_path / "out")
    assert head.layers == 1
    assert not torch.equal(head.model.classifier.weight, model.classifier.weight)


def test_report_says_everything_and_compile_reads_it(tmp_path, teacher):
    report = tiny_training.compress(tmp_path, teacher, ("int8-static",), "train.steps=3")
    written = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert {**written, "output": report["output"]} == report
    checkpoint = checkpoints.load(tmp_path / "out")
    assert checkpoint.ranges.keys() == set(report["ranges"])
    assert len(checkpoint.ranges) == 12
    low, high = checkpoint.ranges["bert.encoder.layer.0.attention.self.query"]
    assert low < 0 < high
    assert not (tmp_path / "out.work").exists()


def test_command_trains_and_says_what_to_do_next(tmp_path, capsys, teacher):
    data = tiny_training.write(tmp_path / "texts.tsv")
    code, out, err = call(
        capsys,
        teacher,
        "-o",
        tmp_path / "out",
        "--task",
        "text",
        "--data",
        data,
        "--recipe",
        "prune-80",
        "--set",
        "train.steps=8",
        "--threads",
        "1",
    )
    assert code == 0, err
    assert "% of the encoder's weights" in out
    assert f"bertile compile {tmp_path / 'out'} -o BUNDLE" in out
    code, out, _ = call(capsys, "--recipes", "--json")
    assert code == 0 and json.loads(out).keys() == set(recipe.names())


TEXT = ("--data", "DATA", "--task", "text")
MISTAKES = {
    "no task": (2, "--task is missing", ["MODEL", "--data", "DATA"]),
    "task": (2, "did you mean 'text'?", ["MODEL", "--data", "DATA", "--task", "texts"]),
    "recipe": (2, "did you mean 'int8'", ["MODEL", *TEXT, "--recipe", "int9"]),
    "data": (2, "there is no data", ["MODEL", "--data", "none.tsv", "--task", "text"]),
    "onnx": (2, "training needs a Hugging Face directory", ["model.onnx", *TEXT]),
    "no tokenizer": (2, "has no tokenizer", ["synthetic:bert-tiny", *TEXT]),
    "labels": (2, "does not know the label", ["MODEL", "--data", "OTHER", "--task", "text"]),
    "exits": (2, "from 1 to 1", ["MODEL", *TEXT, "--set", "early_exit.layers=[2]"]),
}


@pytest.mark.parametrize(("code", "message", "arguments"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(
    tmp_path, capsys, untrained, code, message, arguments
):
    data = tiny_training.write(tmp_path / "texts.tsv")
    other = tmp_path / "other.tsv"
    other.write_text(data.read_text().replace("\tgood", "\tgreat"))
    places = {"MODEL": untrained, "DATA": data, "OTHER": other}
    words = [places.get(word, word) for word in arguments]
    status, out, err = call(capsys, *words, "-q", "-o", tmp_path / "out")
    assert (status, out) == (code, "")
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_stop_leaves_nothing_half_written(tmp_path, untrained, monkeypatch):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compressor.learner, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        tiny_training.compress(tmp_path, untrained, (), "train.steps=2")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.work").exists()


def test_help_is_quick():
    began = time.process_time()
    with pytest.raises(SystemExit):
        main.main(["compress", "--help"])
    assert time.process_time() - began < 0.15
