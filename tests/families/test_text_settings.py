"""What a directory says of its texts, against what sentence-transformers and transformers read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import sentence_models as tiny

from bertile.base.errors import BundleError, ModelError
from bertile.base.quiet import quiet
from bertile.export import files
from bertile.families import text_settings
from bertile.families.text_settings import TextSettings

library = pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("classifier") / "model"
    return tiny.transformer(directory, "sequence-classification")


@pytest.fixture
def own(classifier, tmp_path) -> Path:
    return Path(shutil.copytree(classifier, tmp_path / "own"))


def of_modules(directory: Path, *others: str) -> Path:
    """A modules.json, without which sentence-transformers reads none of its own files."""
    named = {"Transformer": "", **{kind: f"1_{kind}" for kind in others}}
    entries = [
        {
            "idx": number,
            "name": str(number),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, (kind, path) in enumerate(named.items())
    ]
    (directory / "modules.json").write_text(json.dumps(entries))
    return directory


def change(directory: Path, **values) -> Path:
    path = directory / "config.json"
    tiny.settle(path, **{**json.loads(path.read_text()), **values})
    return directory


def test_settings_of_minilm_stand_in_its_files():
    settings = text_settings.read(files.find_directory("minilm"))
    assert (settings.longest, settings.cut_at, settings.prompt) == (256, 256, "")
    assert settings.normalizer and settings.normalizer["lowercase"] and not settings.lower
    assert (settings.similarity, settings.dimensions, settings.kind) == ("cosine", None, "dense")


IDENTITY, SIGMOID = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Sigmoid"


@pytest.mark.parametrize(
    ("labels", "config", "prompts"),
    [
        (1, {}, {}),
        (3, {}, {}),
        (1, {"sentence_transformers": {"activation_fn": IDENTITY}}, {}),
        (1, {"sbert_ce_default_activation_function": IDENTITY}, {}),
        (3, {"sbert_ce_default_activation_function": SIGMOID}, {}),
        (3, {"sentence_transformers": {"activation_fn": "torch.nn.Softmax"}}, {}),
        (1, {"sentence_transformers": {"activation_fn": IDENTITY}}, {"activation_fn": SIGMOID}),
        (1, {"sentence_transformers": {"activation_fn": "mine.Cube"}}, {}),
    ],
    ids=str,
)
def test_activation_is_that_of_a_cross_encoder(own, labels, config, prompts):
    names = {str(number): f"LABEL_{number}" for number in range(labels)}
    change(own, id2label=names, label2id={n: int(i) for i, n in names.items()}, **config)
    if prompts:
        tiny.settle(own / text_settings.PROMPTS, model_type="CrossEncoder", **prompts)
        tiny.settle(own / "sentence_bert_config.json", transformer_task="sequence-classification")
        of_modules(own)
    settings = text_settings.read(own)
    model = _cross_encoder(own)
    theirs = type(model.activation_fn).__name__
    assert settings.activation == {"Identity": "none"}.get(theirs, theirs.lower())
    assert text_settings.read(own, labels) == settings


def _cross_encoder(directory: Path):
    """Its settings alone, the weights of a classifier of another number of labels left random."""
    with quiet():
        return library.CrossEncoder(
            str(directory), device="cpu", model_kwargs={"ignore_mismatched_sizes": True}
        )


def test_other_activation_is_named(own):
    change(own, sentence_transformers={"activation_fn": "torch.nn.modules.activation.Tanh"})
    with pytest.raises(ModelError, match=r"makes scores by 'torch\.nn\.modules\.activation\.Tanh'"):
        text_settings.read(own)


@pytest.mark.parametrize(
    "general",
    [
        {},
        {"prompts": {"query": "q: ", "passage": "p: "}, "default_prompt_name": "passage"},
        {"prompts": {"query": None}, "default_prompt_name": "query"},
        {"default_prompt_name": "document"},
        {"similarity_fn_name": "euclidean", "truncate_dim": 16},
        {"similarity_fn_name": None, "truncate_dim": None},
    ],
    ids=str,
)
def test_prompts_similarity_and_dimensions_are_sentence_transformers(own, general):
    tiny.settle(own / text_settings.PROMPTS, **general)
    tiny.settle(own / "sentence_bert_config.json", max_seq_length=40)
    of_modules(own, "Pooling")
    tiny.settle(own / "1_Pooling" / "config.json", word_embedding_dimension=128)
    with quiet():
        model = library.SentenceTransformer(str(own), device="cpu")
    settings = text_settings.read(own)
    assert {"query": "", "document": "", **settings.prompts} == model.prompts
    assert settings.default_prompt == model.default_prompt_name
    assert settings.prompt == _default(model)
    assert settings.similarity == model.similarity_fn_name
    assert settings.dimensions == model.truncate_dim
    assert settings.longest == model.max_seq_length == 40


def _default(model) -> str:
    return model.prompts[model.default_prompt_name] if model.default_prompt_name else ""


def test_settings_come_out_of_a_manifest_as_they_went_in(own):
    settings = text_settings.read(own, kind="sparse")
    assert (settings.kind, settings.similarity) == ("sparse", "dot")
    manifest = {"text": json.loads(json.dumps(settings.to_json()))}
    assert text_settings.of_bundle(own / "nowhere", manifest) == settings
    manifest["text"]["tongue"] = "English"
    with pytest.raises(BundleError, match="settings of texts are unknown here: tongue; load it wi"):
        text_settings.of_bundle(own, manifest)
    with pytest.raises(BundleError, match="unknown here: 3"):
        TextSettings.from_json(3)


def test_bundle_of_an_older_version_is_read_by_its_files(own):
    tiny.settle(own / "sentence_bert_config.json", max_seq_length=7)
    change(own, problem_type="regression")
    settings = text_settings.of_bundle(own, {"model": {"labels": ["a", "b", "c"]}})
    assert (settings.longest, settings.scores, settings.activation) == (7, "none", "none")
    assert text_settings.of_bundle(own, {"model": {"labels": ["a"]}}).activation == "sigmoid"
