"""A model with early heads, from its training to a library whose texts leave early: compared with
torch's heads.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import text_models, tiny_training
from helpers.text_models import WORDS

from bertile import driver, loader, text
from bertile.base.errors import ModelError, UsageError
from bertile.bundle import writer
from bertile.cli import main
from bertile.compress import tasks, trainer
from bertile.compress.recipe import EarlyExit, Recipe
from bertile.config import Config
from bertile.export import checkpoints, early_heads
from bertile.families import table
from bertile.loading.exits import leaving_at

LAYERS = (1, 3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, of which three steps have made heads behind two, each sure of other texts."""
    directory = tmp_path_factory.mktemp("early")
    options = {"labels": tiny_training.LABELS, "initializer_range": 0.3, "num_hidden_layers": 4}
    untrained = text_models.save(directory / "untrained", "SequenceClassification", **options)
    layers = f"early_exit.layers={list(LAYERS)}"
    tiny_training.compress(directory, untrained, ("early-exit",), layers, "train.steps=3")
    return directory / "out"


@pytest.fixture(scope="module", params=["fp32", pytest.param("int8", marks=pytest.mark.slow)])
def bundle(request, trained, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundle") / request.param
    options = {"precision": request.param, "exit_threshold": 0.6, "tune": "none"}
    with text_models.single_thread():
        driver.compile(str(trained), directory, **options)
    return directory


def test_a_text_counts_as_much_with_a_label_as_without():
    """Eight texts, of which one has a label: its loss is an eighth of what it is alone."""
    task, chance = tasks.TASKS["text"], torch.Generator().manual_seed(0)
    early, final = (torch.randn(8, 3, generator=chance) for _ in range(2))
    lesson = SimpleNamespace(recipe=Recipe(early_exit=EarlyExit((1,))), task=task)

    def loss(labels: list[int]) -> float:
        whole = {"input_ids": torch.ones(8, 4), "attention_mask": torch.ones(8, 4)}
        whole["wanted_labels"] = torch.tensor(labels)
        mine = {"logits": final, "exits": [early]}
        return float(trainer._Training._exits(SimpleNamespace(lesson=lesson), mine, whole, whole))

    without = loss([tasks.IGNORED] * 8)
    alone = torch.nn.functional.cross_entropy(early[:1], torch.tensor([2]))
    assert loss([2, *[tasks.IGNORED] * 7]) - without == pytest.approx(float(alone) / 8, rel=1e-5)


def batch(rows: int = 9, length: int = 37) -> dict[str, np.ndarray]:
    """Rows of unequal lengths, from one token on."""
    chance = np.random.default_rng(rows)
    ends = chance.integers(1, length + 1, (rows, 1))
    return {
        "input_ids": chance.integers(5, len(WORDS), (rows, length)),
        "attention_mask": (np.arange(length) < ends).astype(np.int64),
    }


def of_torch(trained: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The logits of both heads and of the whole model, (3, rows, labels)."""
    model = checkpoints.load(trained).model
    exits = early_heads.read(model, table.of_type("bert"), trained)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        results = model(**tensors, output_hidden_states=True)
        heads = [head(results.hidden_states, tensors) for head in exits]
    return np.stack([logits.numpy() for logits in (*heads, results.logits)])


def left(logits: np.ndarray, thresholds: tuple[float, ...]) -> np.ndarray:
    """The stage at which torch's probabilities say that each text leaves."""
    sure = (
        torch.from_numpy(logits).softmax(-1).amax(-1).numpy()[:-1] > np.array(thresholds)[:, None]
    )
    return np.where(sure.any(0), sure.argmax(0), len(sure))


def test_texts_leave_where_torchs_heads_are_sure(bundle, trained):
    """The heads are torch's; in int8 which text is surer than another is the bundle's to say."""
    inputs = batch()
    logits = of_torch(trained, inputs)
    close = {"fp32": 1e-4, "int8": 0.15}[bundle.name]
    if bundle.name == "int8":
        with loader.load(bundle, threads=1) as model:
            model.exit_thresholds = None
            whole = model(**inputs)
        rounded = np.stack([whole[name] for name in ("exits.1", "exits.3", "logits")])
        np.testing.assert_allclose(rounded, logits, atol=close)
        logits = rounded
    sure = np.sort(torch.from_numpy(logits).softmax(-1).amax(-1).numpy(), 1)
    middle = tuple(float(row[3:5].mean()) for row in sure[:2])  # between two texts
    with loader.load(bundle, threads=1, exit_threshold=middle) as model:
        assert model.outputs == ("logits", "layers")
        answers = model(**inputs)
    stages = left(logits, middle)
    assert set(stages) == {0, 1, 2}, "some leave at every head"
    np.testing.assert_array_equal(answers["layers"], np.array([*LAYERS, 4])[stages])
    np.testing.assert_allclose(answers["logits"], logits[stages, range(9)], atol=close)


@pytest.mark.parametrize("rows", [1, 3, 40])  # the last takes more than one pass
def test_threshold_of_one_gives_what_the_whole_model_gives(bundle, rows):
    with loader.load(bundle, threads=1, exit_threshold=1.0) as model:
        staged = model(**batch(rows))
        model.exit_thresholds = None
        assert model.outputs == ("logits", "exits.1", "exits.3")
        whole = model(**batch(rows))
    assert (staged["layers"] == 4).all()
    np.testing.assert_array_equal(staged["logits"], whole["logits"])


def test_every_head_answers_as_in_the_whole_model(bundle):
    inputs, exits = batch(), loader.read_manifest(bundle)["exits"]
    with loader.load(bundle, threads=1) as model:
        assert model.exit_thresholds == (0.6, 0.6)
        model.exit_thresholds = None
        whole = model(**inputs)
        for stage, name in enumerate(("exits.1", "exits.3", "logits")):
            model.exit_thresholds = leaving_at(stage, exits)
            np.testing.assert_array_equal(model(**inputs)["logits"], whole[name])


def test_weights_are_stored_once(bundle):
    manifest = loader.read_manifest(bundle)
    data, places = loader.map_tensors(bundle / loader.WEIGHTS, manifest["params"])
    contents = [data[place.begin : place.end].tobytes() for place in places]
    large = [content for content in contents if len(content) > 256]  # norms begin alike
    assert len(set(large)) == len(large) > 12
    read = [set(stage["params"]) for stage in manifest["exits"]["stages"]]
    assert set.union(*read) == set(range(len(places)))
    assert all(len(stage) < len(places) / 2 for stage in read)


def test_streams_pickles_and_texts_leave_alike(bundle, capsys):
    sentences = [" ".join(words) for words in np.array(WORDS[5:45]).reshape(8, 5)]
    with text.open(bundle, threads=1, streams=2, exit_threshold=0.55) as model:
        want = model.predict(sentences)
        counts = model.layers
        assert sum(counts.values()) == 8 and set(counts) <= {1, 3, 4}
        again = pickle.loads(pickle.dumps(model.model))
        with again:
            assert again.exit_thresholds == model.model.exit_thresholds
    with text.open(bundle, threads=1, exit_threshold=1.0) as model:
        model.predict(sentences[0])
        assert model.layers == {4: 1}
    code = main.main(["run", str(bundle), "--exit-threshold", "0.55", "--json", *sentences])
    captured = capsys.readouterr()
    assert code == 0 and "texts left behind" in captured.err
    best = [json.loads(line)["label"] for line in captured.out.splitlines()]
    assert best == [tiny_training.LABELS[row.argmax()] for row in want]


def test_damaged_stages_are_refused(bundle, tmp_path):
    manifest = loader.read_manifest(bundle)
    for damage, message in (
        ({"layers": [1, 3]}, "'exits' are not described"),
        ({"stages": [{**s, "params": [10**6]} for s in manifest["exits"]["stages"]]}, "weights"),
        ({"stages": [{**s, "states": 2} for s in manifest["exits"]["stages"]]}, "takes"),
    ):
        copy = writer.copy(bundle, tmp_path / message.split()[0])
        writer.write_manifest(copy, {**manifest, "exits": {**manifest["exits"], **damage}})
        with pytest.raises(loader.BundleError, match=message):
            loader.load(copy, threads=1)


def test_a_model_without_early_heads_has_no_threshold(trained, tmp_path, teacher):
    config = Config(exit_threshold=0.9)
    with pytest.raises(UsageError, match="--recipe early-exit"):
        driver.compile(str(teacher), tmp_path / "out", config)
    with pytest.raises(UsageError, match="not for the head 'encoder'"):
        driver.compile(str(trained), tmp_path / "out", config, head="encoder")
    several = shutil.copytree(trained, tmp_path / "several")
    labels = json.loads((several / "config.json").read_text())
    labels["problem_type"] = "multi_label_classification"
    (several / "config.json").write_text(json.dumps(labels))
    with pytest.raises(UsageError, match="labels of which one is right"):
        driver.compile(str(several), tmp_path / "out", config)
    with pytest.raises(UsageError, match="for processors"):
        driver.compile(str(trained), tmp_path / "out", config, target="cuda-sm90")


def test_heads_of_another_model_are_refused(trained, teacher):
    model = checkpoints.load(teacher).model
    with pytest.raises(ModelError, match="no early heads of its model"):
        early_heads.read(model, table.of_type("bert"), trained)
