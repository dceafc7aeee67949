"""Texts in, results out: batches, limits, and answers per head, on a model that only counts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bertile import loader
from bertile.base.errors import BundleError, InputError, ModelError
from bertile.families import text_settings
from bertile.run import texts

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b")


class Model:
    """Stands in for a bundle: outputs that tell which text they came from."""

    inputs = ("input_ids", "attention_mask")

    def __init__(self, head: str, labels: tuple[str, ...] = (), max_length: int | None = 8):
        self.manifest = {
            "model": {"head": head, "labels": list(labels), "max_length": max_length},
            "static": {"batch": None, "length": None},
        }
        self.shapes: list[tuple[int, int]] = []

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> dict[str, Any]:
        self.shapes.append(input_ids.shape)
        assert ((input_ids > 0) == (attention_mask > 0)).all()
        counts = np.stack([(input_ids == word).sum(1) for word in (4, 5)], axis=1)
        head = self.manifest["model"]["head"]
        if head == "embedding":
            return {"sentence_embedding": counts.astype(np.float32)}
        if head == "token-classification":
            return {"logits": np.stack([input_ids == 4, input_ids == 5], -1).astype(np.float32)}
        return {"logits": counts[:, : len(self.manifest["model"]["labels"])].astype(np.float32)}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A directory with a tokenizer of words, which would pad and cut if it were asked."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    def use(model: Model) -> Model:
        monkeypatch.setattr(loader, "load", lambda directory, threads: model)
        return model

    return use


def test_embeddings_come_in_the_order_of_the_texts(bundle: Path, load) -> None:
    model = load(Model("embedding"))
    result = texts.run(bundle, ["a a a a a", "b", "a", "a b"])
    assert result["embeddings"] == [[5, 0], [0, 1], [1, 0], [1, 1]]
    assert result["tokens"] == [7, 3, 3, 4]
    assert np.allclose(np.diag(result["cosine"]), 1)
    assert result["cosine"][0] == pytest.approx([1, 0, 1, 0.5**0.5])
    assert model.shapes == [(4, 7)]


def test_long_lists_run_in_batches_of_similar_length(
    bundle: Path, load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "BATCH", 2)
    model = load(Model("embedding"))
    result = texts.run(bundle, ["a a a a", "b", "a a a", "a"])
    assert model.shapes == [(2, 3), (2, 6)]
    assert [row[0] for row in result["embeddings"]] == [4, 0, 3, 1]


def test_classification_gives_label_and_probability(bundle: Path, load) -> None:
    load(Model("sequence-classification", ("good", "bad")))
    result = texts.run(bundle, ["a a", "b"])
    assert [answer["label"] for answer in result["labels"]] == ["good", "bad"]
    assert result["labels"][0]["score"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert "good" in texts.as_text(result)


@pytest.mark.parametrize(
    ("problem", "labels", "label", "score"),
    [
        (None, ("stars",), "stars", 1 / (1 + np.exp(-2))),
        ("regression", ("stars",), "stars", 2.0),
        ("regression", ("good", "bad"), "good", 2.0),
        ("multi_label_classification", ("good", "bad"), "good", 1 / (1 + np.exp(-2))),
        ("single_label_classification", ("good", "bad"), "good", 1 / (1 + np.exp(-1))),
        (None, ("good", "bad"), "good", 1 / (1 + np.exp(-1))),
    ],
)
def test_scores_are_those_of_the_kind_of_problem(
    bundle: Path, load, problem, labels, label, score
) -> None:
    (bundle / "config.json").write_text(json.dumps({"problem_type": problem}))
    load(Model("sequence-classification", labels))
    (answer,) = texts.run(bundle, ["a a b"])["labels"]
    assert (answer["label"], answer["score"]) == (label, pytest.approx(score))


def test_scores_are_those_of_the_pipeline_of_transformers() -> None:
    """Every problem and number of labels, by the pipeline's own code."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits = np.array([[1.5, -0.5, 0.25]], np.float32)
    for problem in (None, "regression", "multi_label_classification"):
        for count in (1, 3):
            config = transformers.BertConfig(num_labels=count, problem_type=problem)
            answers = SimpleNamespace(model=SimpleNamespace(config=config))
            want = transformers.TextClassificationPipeline.postprocess(
                answers, {"logits": torch.from_numpy(logits[:, :count])}, top_k=1
            )
            scores = text_settings.scoring(problem, count)
            got = texts._label(logits[0, :count], [f"LABEL_{i}" for i in range(count)], scores)
            assert got == {"label": want["label"], "score": pytest.approx(want["score"])}


def test_token_classification_leaves_special_tokens_out(bundle: Path, load) -> None:
    load(Model("token-classification", ("A", "B")))
    (row,) = texts.run(bundle, ["a b"])["labels"]
    assert [(answer["token"], answer["label"]) for answer in row] == [("a", "A"), ("b", "B")]


def test_text_that_is_too_long_is_refused_with_both_numbers(bundle: Path, load) -> None:
    load(Model("embedding"))
    with pytest.raises(InputError, match="text 2 has 9 tokens, the model takes at most 8"):
        texts.run(bundle, ["a", "a a a a a a a"])


def test_truncate_cuts_a_text_that_is_too_long(bundle: Path, load) -> None:
    load(Model("embedding"))
    assert texts.run(bundle, ["a a a a a a a"], truncate=True)["embeddings"] == [[6, 0]]


def test_head_without_an_answer_to_a_text_is_refused(bundle: Path, load) -> None:
    load(Model("masked-lm"))
    with pytest.raises(InputError, match="has the head 'masked-lm'"):
        texts.run(bundle, ["a"])


def test_missing_tokenizer_is_named(tmp_path: Path, load) -> None:
    load(Model("embedding"))
    with pytest.raises(BundleError, match=r"has no tokenizer\.json"):
        texts.run(tmp_path, ["a"])
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(BundleError, match="cannot be read"):
        texts.run(tmp_path, ["a"])


def test_max_tokens_is_the_lower_of_both_limits() -> None:
    manifest = {"model": {"max_length": 512}, "static": {"length": 128}}
    assert texts.max_tokens(manifest) == 128
    assert texts.max_tokens({"model": {"max_length": None}, "static": {}}) is None


def test_text_table_shows_similarities(bundle: Path, load) -> None:
    load(Model("embedding"))
    text = texts.as_text(texts.run(bundle, ["a", f"{'b ' * 3}{'c' * 100}"]))
    assert "[2]" in text and "..." in text


# What the directory says of its texts, against the libraries that read it too

TEXTS = ["The Cat Sat", "a cat sat on the Mat and a mat sat on THE cat", "É a", ""]
LETTERS = [letter for upper in "abcdefghijklmnopqrstuvwxyz" for letter in (upper, upper.upper())]


@pytest.fixture
def cased(tmp_path: Path) -> Path:
    """A directory with BERT's tokenizer of cased letters, which says nothing else."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "The", "cat", "Cat", "É", "e"]
    words += [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.BertWordPieceTokenizer(vocabulary, lowercase=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    return tmp_path


def settle(directory: Path, name: str, **values) -> None:
    (directory / name).write_text(json.dumps(values))


@pytest.mark.parametrize(
    "settings",
    [
        {"do_lower_case": False},
        {"do_lower_case": True},
        {},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"do_lower_case": False, "truncation_side": "left"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": True},
        {"tokenizer_class": "DistilBertTokenizer", "tokenize_chinese_chars": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [3, 9, 100])
def test_ids_are_those_of_transformers(cased: Path, settings, length) -> None:
    transformers = pytest.importorskip("transformers")
    named = {"tokenizer_class": "BertTokenizer", "model_max_length": length, **settings}
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    settle(cased, "tokenizer_config.json", **named, **special, sep_token="[SEP]")
    tokenizer = transformers.AutoTokenizer.from_pretrained(cased)
    want = tokenizer(TEXTS, truncation=True)
    got = texts.encode(cased, TEXTS, 512, truncate=True)
    assert [encoding.ids for encoding in got] == want["input_ids"]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_seq_length": 7},
        {"max_seq_length": 7, "do_lower_case": True},
        {"max_seq_length": None, "do_lower_case": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", ["", "Query A: "])
@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_roberta_config.json"])
def test_ids_are_those_of_sentence_transformers(cased: Path, settings, prompt, name) -> None:
    models = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        **dict(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, intermediate_size=8),
        vocab_size=200,
        max_position_embeddings=20,
    )
    transformers.BertModel(config).save_pretrained(cased)
    settle(cased, "tokenizer_config.json", tokenizer_class="BertTokenizer", do_lower_case=False)
    settle(cased, name, **settings)
    prompts = {"prompts": {"query": prompt, "document": "no"}, "default_prompt_name": "query"}
    settle(cased, "config_sentence_transformers.json", **prompts)
    module = models.Transformer.load(str(cased))
    want = module.preprocess(TEXTS, prompt=prompt)
    got = texts.encode(cased, TEXTS, 20, truncate=True)
    for encoding, ids, mask in zip(got, want["input_ids"], want["attention_mask"], strict=True):
        assert encoding.ids == ids[mask == 1].tolist()


@pytest.mark.parametrize("name", ["max_seq_length", "model_max_length"])
def test_text_longer_than_its_library_takes_is_refused(cased: Path, name: str) -> None:
    """Newer versions of sentence-transformers save the length with the tokenizer alone."""
    settle(cased, "sentence_bert_config.json", **{"max_seq_length": 7} if name[:3] == "max" else {})
    settle(cased, "tokenizer_config.json", tokenizer_class="BertTokenizer", model_max_length=7)
    with pytest.raises(InputError, match="text 1 has 11 tokens, the model takes at most 7"):
        texts.encode(cased, ["a a a a a a a a a"], 20)


def test_side_of_a_cut_is_the_tokenizers_own_where_nothing_else_is_said(cased: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(cased / "tokenizer.json"))
    tokenizer.enable_truncation(5, direction="left")
    tokenizer.save(str(cased / "tokenizer.json"))
    (encoding,) = texts.encode(cased, ["a b c d e"], 4, truncate=True)
    assert encoding.tokens == ["[CLS]", "d", "e", "[SEP]"]


def test_directory_without_settings_is_tokenized_as_its_tokenizer_says(cased: Path) -> None:
    (encoding,) = texts.encode(cased, ["The cat"])
    assert encoding.tokens == ["[CLS]", "The", "cat", "[SEP]"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "[]", "is not a JSON object"),
        ("sentence_bert_config.json", "{", "cannot be read"),
        ("config_sentence_transformers.json", "3", "is not a JSON object"),
        ("config_sentence_transformers.json", '{"default_prompt_name": "q"}', "no prompt of the n"),
        (
            "config_sentence_transformers.json",
            '{"default_prompt_name": "q", "prompts": {"q": 3}}',
            "has no prompt of the name 'q', its default",
        ),
    ],
)
def test_settings_that_make_no_sense_are_named(cased: Path, name, content, message) -> None:
    (cased / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        texts.encode(cased, ["a"])
