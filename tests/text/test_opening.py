"""A bundle opens as what its head can answer, and says what is wrong where it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_bundle
from helpers.text_models import Counting

import bertile
from bertile import loader
from bertile.base.errors import BertileError, BundleError, InputError, PlatformError
from bertile.bundle import writer
from bertile.text.opening import KINDS

TEXTS = ["a b c", "", "c", "a a a a a a a a a a a a a a a a a a a b", "b unknown"]


@pytest.fixture(scope="module")
def directory(stages: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real bundle of an encoder that numpy can compute too, with a tokenizer of words."""
    tokenizers = pytest.importorskip("tokenizers", reason="texts need a tokenizer")
    path = tmp_path_factory.mktemp("opening") / "tiny"
    writer.write(tiny_bundle.MANIFEST, tiny_bundle.library(stages), tiny_bundle.PARAMS, [], path)
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5, "c": 49}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def vectors(text: str) -> np.ndarray:
    """What numpy makes of a text."""
    ids = {"a": 4, "b": 5, "c": 49}
    row = [2, *(ids.get(word, 1) for word in text.split()), 3]
    return tiny_bundle.expected([row])["hidden"][0]


@pytest.mark.parametrize("streams", [None, 1])
def test_texts_have_the_vectors_that_numpy_computes(directory: Path, streams) -> None:
    with bertile.open(directory, threads=2, streams=streams) as model:
        assert type(model) is KINDS["encoder"]
        assert repr(model).startswith("<bertile.text.Featurizer of <bertile.Model tiny (bert, enc")
        assert model.max_seq_length == 64
        texts = TEXTS * 120  # several windows
        for text, rows in zip(texts, model.features(texts), strict=True):
            np.testing.assert_allclose(rows, vectors(text), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(model.features("a b c"), vectors("a b c"), rtol=1e-5, atol=1e-5)
        assert not model.model.closed
    assert model.model.closed
    for texts in ("a", ["a"], ["a"] * 600):
        with pytest.raises(BertileError, match="the model is closed"):
            model.features(texts)


def test_stream_whose_model_is_closed_meanwhile_is_told(directory: Path) -> None:
    model = bertile.open(directory, threads=2)
    rows = model.features_iter(["a b c"] * 5000)
    next(rows)
    model.close()
    with pytest.raises(BertileError, match="the model is closed"):
        list(rows)


def test_opening_and_asking_need_numpy_and_tokenizers_alone(directory: Path) -> None:
    code = (
        "import sys, bertile\n"
        f"model = bertile.open({str(directory)!r})\n"
        "model.features(['a'] * 600), model.features('a')\n"
        "print({'torch', 'transformers', 'tvm', 'onnx', 'scipy'} & set(sys.modules))"
    )
    assert tiny_bundle.python(code).strip() == "set()"


class Headed(Counting):
    """Stands in for a bundle of any head."""

    closed = False

    def __init__(self, head: str) -> None:
        super().__init__()
        self.manifest["model"]["head"] = head

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    def use(model: Headed) -> Headed:
        monkeypatch.setattr(loader, "load", lambda directory, threads, **_: model)
        return model

    return use


@pytest.mark.parametrize("head", KINDS)
def test_each_head_has_its_class(words: Path, load, head) -> None:
    load(Headed(head))
    with bertile.open(words) as model:
        assert type(model) is KINDS[head]
        assert type(model).__name__ in bertile.text.__all__


def test_head_without_an_answer_is_refused_and_closed(words: Path, load) -> None:
    model = load(Headed("next-sentence"))
    with pytest.raises(InputError) as caught:
        bertile.open(words)
    assert "has the head 'next-sentence', which gives no answer to a text" in str(caught.value)
    assert "--head of embedding, encoder, " in str(caught.value)
    assert model.closed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no tokenizer.json; call bertile.load with token ids"),
        (json.dumps({"model": 1}), "tokenizer.json cannot be read: "),
        ("", "tokenizer.json cannot be read: "),
    ],
)
def test_tokenizer_that_is_missing_or_damaged_is_named_and_the_model_closed(
    tmp_path: Path, load, content, message
) -> None:
    model = load(Headed("embedding"))
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BundleError) as caught:
        bertile.open(tmp_path)
    assert message in str(caught.value)
    assert model.closed


def test_settings_of_a_newer_version_are_named(words: Path, load) -> None:
    model = load(Headed("embedding"))
    model.manifest["text"]["voice"] = "low"
    with pytest.raises(BundleError, match="the settings of texts are unknown here: voice"):
        bertile.open(words)
    assert model.closed


def test_bundle_of_another_machine_is_named(directory: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(directory, tmp_path / "other"))
    tiny_bundle.change_manifest(other, lambda m: m["target"].update(arch="riscv64"))
    with pytest.raises(PlatformError, match="the bundle is for riscv64, this machine is"):
        bertile.open(other)
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json"):
        bertile.open(tmp_path)
