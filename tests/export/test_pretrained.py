"""Checkpoints that are another model than their `model_type` says; and what every user's holds."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import family_models
from safetensors.torch import load_file, save_file

from bertile.base.errors import ModelError
from bertile.base.quiet import quiet
from bertile.config import Config
from bertile.export import cached, checkpoints, exporter

MARK = "--allow-unused"


@pytest.fixture
def copy(stages, tmp_path):
    """A directory that save_pretrained wrote of a family's tiny model, to be changed."""

    def make(name: str = "bert-tiny", head: str = "encoder") -> Path:
        source = family_models.directory(name, head, stages)
        return Path(shutil.copytree(source, tmp_path / "model"))

    return make


@pytest.fixture
def plain(stages):
    """The export of such a directory as it was."""
    return family_models.exported("bert-tiny", "encoder", stages)


def change_config(directory: Path, **changes) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


def change_tensors(directory: Path, change) -> Path:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    return directory


def add_tensors(directory: Path, *names: str) -> Path:
    return change_tensors(directory, lambda held: {**held, **{n: torch.ones(2) for n in names}})


def as_pickle(directory: Path, content=None) -> Path:
    held = directory / "model.safetensors"
    torch.save(load_file(held) if content is None else content, directory / "pytorch_model.bin")
    held.unlink()
    return directory


def assert_same_weights(model, expected) -> None:
    state = model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name


# What is another model


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query", "alibi", "rotary"])
def test_load_refuses_other_kinds_of_positions(copy, kind):
    directory = change_config(copy(), position_embedding_type=kind)
    with pytest.raises(ModelError, match=f"it has position_embedding_type '{kind}'; {MARK}"):
        checkpoints.load(directory)
    assert checkpoints.load(directory, allow_unused=True).notes == (
        f"left out: position_embedding_type '{kind}'",
    )


def test_load_refuses_code_of_its_own_with_its_names(copy):
    code = {"AutoModel": "modeling_my.MyModel", "AutoTokenizer": [None, "tokens.MyTokenizer"]}
    directory = change_config(copy(), auto_map=code)
    said = (
        r"auto_map, AutoModel: modeling_my\.MyModel\); --trust-remote-code runs that code; --allow"
    )
    with pytest.raises(ModelError, match=said):
        checkpoints.load(directory)
    assert checkpoints.load(directory, allow_unused=True).head == "encoder"


@pytest.mark.parametrize("harmless", [{}, None, {"AutoTokenizer": [None, "tokens.MyTokenizer"]}])
def test_load_takes_code_that_is_no_models(copy, harmless):
    assert checkpoints.load(change_config(copy(), auto_map=harmless)).notes == ()


def test_load_refuses_an_adapter_beside_the_weights(copy):
    directory = copy()
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ModelError, match=r"it has an adapter \(adapter_config\.json\); --allow"):
        checkpoints.load(directory)


def test_load_refuses_weights_that_are_quantized(copy):
    directory = change_config(copy(), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="quantized"):
        checkpoints.load(directory)


@pytest.mark.parametrize("family", family_models.EVERY)
@pytest.mark.parametrize("head", ["encoder", "sequence-classification"])
def test_load_refuses_tensors_that_no_part_of_the_model_reads(copy, family, head):
    directory = copy(f"{family}-tiny", head)
    held = load_file(directory / "model.safetensors")
    name = next(key for key in held if re.search(r"\.0\..*\.weight$", key))
    extra = f"{name.removesuffix('.weight')}.distance_embedding.weight"
    with pytest.raises(ModelError) as caught:
        checkpoints.load(add_tensors(directory, extra), head)
    # by the names that transformers' model has for them, which a file's are brought to
    named_so = r"\S*\.distance_embedding\.weight\b"
    assert re.search(rf"its tensors {named_so}.* are never read; {MARK}", str(caught.value))
    checkpoint = checkpoints.load(directory, head, allow_unused=True)
    assert any(re.match(f"tensors that are not read: {named_so}", n) for n in checkpoint.notes)


def test_load_names_three_tensors_and_counts_the_rest(copy):
    directory = add_tensors(copy(), *(f"encoder.layer.{i}.adapter.weight" for i in range(40)))
    with pytest.raises(ModelError, match=r"layer\.10\.adapter\.weight and 37 more are never read"):
        checkpoints.load(directory)


def test_load_refuses_more_layers_than_the_config_says(copy):
    with pytest.raises(ModelError, match=r"encoder\.layer\.1\..* are never read"):
        checkpoints.load(change_config(copy(), num_hidden_layers=1))


def test_load_refuses_a_part_of_the_chosen_head_that_is_not_read(copy):
    directory = add_tensors(copy(head="token-classification"), "crf.transitions")
    with pytest.raises(ModelError, match=r"crf\.transitions are never read"):
        checkpoints.load(directory)
    assert checkpoints.load(directory, "encoder").head == "encoder"  # beside what it asks for


def test_load_reads_unread_tensors_of_pickled_weights_too(copy):
    directory = as_pickle(add_tensors(copy(), "encoder.layer.0.adapter.weight"))
    with pytest.raises(ModelError, match=r"encoder\.layer\.0\.adapter\.weight are never read"):
        checkpoints.load(directory)


@pytest.mark.parametrize(
    ("missing", "head", "named_as"),
    [
        ("encoder.layer.1.output.dense.weight", "encoder", "encoder.layer.1.output.dense.weight"),
        ("embeddings.position_embeddings.weight", None, "embeddings.position_embeddings.weight"),
        (None, "token-classification", "classifier.bias"),
        (None, "masked-lm", "cls.predictions.bias"),
    ],
)
def test_load_refuses_random_weights_even_if_more_is_allowed(copy, missing, head, named_as):
    directory = change_tensors(copy(), lambda held: {k: v for k, v in held.items() if k != missing})
    for allow in (False, True):
        with pytest.raises(ModelError, match=f"has no weights for the head .*no .*{named_as}"):
            checkpoints.load(directory, head, allow)


def test_load_refuses_a_classifier_without_the_pooler_that_it_reads(copy):
    directory = change_tensors(
        copy(head="sequence-classification"),
        lambda held: {name: tensor for name, tensor in held.items() if "pooler" not in name},
    )
    with pytest.raises(ModelError, match=r"no bert\.pooler\.dense\.bias"):
        checkpoints.load(directory)


def test_allowing_what_is_unused_is_another_export(copy, cache):
    directory = change_config(copy(), position_embedding_type="alibi")
    source = str(directory)
    assert cached.export_cached(source, Config(cache_dir=cache, allow_unused=True)).notes
    with pytest.raises(ModelError, match="position_embedding_type 'alibi'"):
        cached.export_cached(source, Config(cache_dir=cache))


# What is the same model


@pytest.mark.parametrize("family", family_models.NAMES)
@pytest.mark.parametrize("head", ["encoder", "token-classification"])
def test_load_takes_the_encoder_of_a_checkpoint_with_another_head(copy, family, head):
    """Its own head is asked for as well, of which a base model's file knows nothing."""
    directory = copy(f"{family}-tiny", "masked-lm")
    if head == "encoder":
        assert checkpoints.load(directory, head).head == head
    else:
        with pytest.raises(ModelError, match="has no weights for the head"):
            checkpoints.load(directory, head)


def test_load_takes_what_every_users_checkpoint_holds(copy):
    """As bert-base-uncased's: old names, buffers, the pooler and the other head of pretraining."""
    directory = copy(head="masked-lm")
    expected = checkpoints.load(directory).model

    def age(held: dict) -> dict:
        old = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): tensor
            for name, tensor in held.items()
        }
        words = held["bert.embeddings.word_embeddings.weight"]
        return {
            **old,
            "bert.embeddings.position_ids": torch.arange(512)[None],
            "bert.pooler.dense.weight": torch.ones(128, 128),
            "bert.pooler.dense.bias": torch.ones(128),
            "cls.predictions.decoder.weight": words.clone(),
            "cls.seq_relationship.weight": torch.ones(2, 128),
            "cls.seq_relationship.bias": torch.ones(2),
        }

    change_tensors(directory, age)
    checkpoint = checkpoints.load(directory)
    assert (checkpoint.head, checkpoint.notes) == ("masked-lm", ())
    assert_same_weights(checkpoint.model, expected)
    encoder = checkpoints.load(directory, "encoder")
    assert encoder.notes == () and encoder.model.pooler is not None
    pickled = checkpoints.load(as_pickle(directory))
    assert_same_weights(pickled.model, expected)


def test_load_takes_a_base_models_names_with_its_prefix(copy):
    directory = copy()
    expected = checkpoints.load(directory).model
    change_tensors(directory, lambda held: {f"bert.{name}": held[name] for name in held})
    assert_same_weights(checkpoints.load(directory).model, expected)


# Configs that say the same in another way


FORMS = [
    {"return_dict": False},
    {"use_return_dict": False, "torchscript": True},
    {"_attn_implementation": "sdpa", "attn_implementation": "flash_attention_2"},
    {"output_hidden_states": True, "output_attentions": True},
    {"chunk_size_feed_forward": 7},
    {"torch_dtype": "float16", "dtype": "bfloat16", "transformers_version": "2.3.0"},
    {"num_labels": 2, "_num_labels": 2, "finetuning_task": None, "pruned_heads": {}},
    {"output_past": True, "use_bfloat16": False, "xla_device": None, "to_dict": 1},
]
TOGETHER = {key: value for form in FORMS for key, value in form.items()}


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(TOGETHER, id="all together"),
        *(pytest.param(form, id=next(iter(form)), marks=pytest.mark.slow) for form in FORMS),
    ],
)
def test_export_is_the_same_in_whatever_way_a_config_computes_it(copy, plain, form, cache):
    changed = change_config(copy(), **form)
    other = cached.export_cached(str(changed), Config(cache_dir=cache))
    assert other.onnx_path.read_bytes() == plain.onnx_path.read_bytes()


@pytest.mark.slow
def test_object_that_answers_with_tuples_is_exported(cache):
    model = checkpoints.load("synthetic:bert-tiny").model
    model.config.return_dict = False
    model.encoder.layer[0].chunk_size_feed_forward = 7
    plain = cached.export_cached("synthetic:bert-tiny", Config(cache_dir=cache))
    exported = cached.export_cached(model, Config(cache_dir=cache))
    assert exported.onnx_path.read_bytes() == plain.onnx_path.read_bytes()
    assert model.config.return_dict is False


# Damaged or hostile


class Code:
    def __reduce__(self):
        return (print, ("this runs",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Code(), "pickled with more than plain tensors, and unpickling that could run code; save"),
        ({"a": Code()}, "pickled with more than plain tensors"),
        ({"model": {"a": torch.ones(1)}}, "they are not a dictionary of tensors; save them with"),
        ([torch.ones(1)], "they are not a dictionary of tensors"),
        ({1: torch.ones(1)}, "they are not a dictionary of tensors"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_load_unpickles_tensors_alone(copy, capfd, content, message, zipped):
    directory = as_pickle(copy(), {})
    path = directory / "pytorch_model.bin"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=message) as caught:
        checkpoints.load(directory)
    assert "weights_only" not in str(caught.value) and capfd.readouterr() == ("", "")


def test_load_refuses_a_bare_pickle(copy, capfd):
    directory = as_pickle(copy(), {})
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Code()))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin' cannot be loaded"):
        checkpoints.load(directory)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 65536, "num_attention_heads": 64}, "asks for .* million, and the files"),
        ({"num_hidden_layers": 900}, "asks for .* million, and the files"),
        ({"vocab_size": 1 << 24}, "asks for .* million, and the files"),
        ({"hidden_size": 100, "num_attention_heads": 3}, "not a multiple of the number"),
        ({"vocab_size": 999}, r"word_embeddings\.weight has the shape \[1000, 128\], config"),
        ({"num_hidden_layers": 3}, r"has no weights for .* \(no encoder\.layer\.2\."),
        ({"hidden_act": "none such"}, "cannot be loaded"),
    ],
)
def test_load_compares_the_config_with_the_files_before_it_builds(copy, changes, message):
    with pytest.raises(ModelError, match=message):
        checkpoints.load(change_config(copy(), **changes))


@pytest.mark.parametrize("link", ["vocab.txt", "config.json", "model.safetensors", "1_Pooling"])
def test_load_refuses_links_that_leave_the_directory(copy, tmp_path, link):
    directory = copy()
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    (directory / "modules.json").write_text(
        '[{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}]'
    )
    (directory / "vocab.txt").write_text("[PAD]")
    assert checkpoints.load(directory).head == "embedding"
    (directory / link).rename(tmp_path / "elsewhere")
    (directory / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=f"{link}' leads out of .*; copy the file into"):
        checkpoints.load(directory)


@pytest.mark.parametrize("name", ["../elsewhere", "/etc"])
def test_load_refuses_modules_that_lie_elsewhere(copy, name):
    directory = copy()
    (directory / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": name}]))
    with pytest.raises(ModelError, match="leads out of"):
        checkpoints.load(directory)


def test_load_refuses_parts_of_the_weights_that_lie_elsewhere(copy, tmp_path):
    directory = copy()
    (directory / "model.safetensors").rename(tmp_path / "part.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../part.safetensors"}}')
    with pytest.raises(ModelError, match="leads out of"):
        checkpoints.load(directory)
    index.write_text('{"weight_map": ["part.safetensors"]}')
    with pytest.raises(ModelError, match="has no weight_map of file names"):
        checkpoints.load(directory)


def test_load_takes_links_within_the_directory_and_to_the_hubs_blobs(copy, tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "revision"
    snapshot.parent.mkdir(parents=True)
    copy().rename(snapshot)
    (tmp_path / "models--x" / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).rename(tmp_path / "models--x" / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    (snapshot / "words.txt").write_text("[PAD]")
    (snapshot / "vocab.txt").symlink_to("words.txt")
    (tmp_path / "alias").symlink_to(snapshot)
    assert {path.name for path in checkpoints.load(tmp_path / "alias").files} == {
        "config.json",
        "vocab.txt",
    }


def test_load_reads_weights_in_parts(copy, stages):
    directory = copy()
    expected = checkpoints.load(directory).model
    (directory / "model.safetensors").unlink()
    with quiet():
        expected.save_pretrained(directory, max_shard_size="200KB")
    assert not (directory / "model.safetensors").exists()
    assert_same_weights(checkpoints.load(directory).model, expected)


@pytest.mark.parametrize(
    "padding", [-1, *(pytest.param(other, marks=pytest.mark.slow) for other in (999, None, 0, 7))]
)
def test_export_takes_any_padding_id_of_the_table(copy, cache, padding):
    directory = change_config(copy(), pad_token_id=padding)
    exported = cached.export_cached(str(directory), Config(cache_dir=cache))
    assert exported.inputs[0].below == 1000


@pytest.mark.parametrize(
    ("padding", "message"),
    [
        (None, "has pad_token_id None, from which its positions would be counted"),
        (-1, "has pad_token_id -1, from which its positions would be counted"),
        (513, "has no position for a token: pad_token_id 513 leaves none of max_position_emb"),
    ],
)
def test_load_refuses_positions_behind_no_padding_id(copy, padding, message):
    with pytest.raises(ModelError, match=message):
        checkpoints.load(change_config(copy("roberta-tiny"), pad_token_id=padding))


def test_export_counts_positions_behind_any_other_padding_id(copy, cache):
    directory = change_config(copy("roberta-tiny"), pad_token_id=400)
    exported = cached.export_cached(str(directory), Config(cache_dir=cache))
    assert exported.max_length == 514 - 401


@pytest.mark.parametrize("device", ["meta", pytest.param("cpu", marks=pytest.mark.slow)])
def test_export_is_the_same_under_any_default_of_torch(copy, plain, tmp_path, device):
    source = copy()
    torch.set_default_device(device)
    torch.set_default_dtype(torch.float64)
    try:
        other = exporter.export(str(source), tmp_path / "other", Config())
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert other.onnx_path.read_bytes() == plain.onnx_path.read_bytes()
