"""Model objects as scripts hold them: each gives what its directory gives, or says why not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

from bertile.base.errors import ModelError, UsageError
from bertile.base.quiet import quiet
from bertile.config import Config
from bertile.export import cached, checkpoints, exporter, files, objects, synthetic
from bertile.families import text_settings
from bertile.families.table import FAMILIES
from bertile.onnx.exported import ExportedModel
from bertile.onnx.samples import largest_difference, sample, session

TOLERANCE = 5e-5  # two layers in float32, summed in another order
LEFT_OUT = "left out: the head of {}, of which the encoder is compiled"
# class: the head that its object and its directory give
KINDS = {
    "BertForPreTraining": "encoder",
    "ElectraForPreTraining": "encoder",
    "AlbertForPreTraining": "encoder",
    "ErnieForPreTraining": "encoder",
    "MegatronBertForPreTraining": "encoder",
    "BertLMHeadModel": "masked-lm",
    "RobertaForCausalLM": "masked-lm",
    "ElectraForCausalLM": "masked-lm",
    "RemBertForCausalLM": "masked-lm",
    "Data2VecTextForCausalLM": "masked-lm",
    "DistilBertForMaskedLM": "masked-lm",
    "BertForNextSentencePrediction": "next-sentence",
    "ErnieForNextSentencePrediction": "next-sentence",
    "BertForMultipleChoice": "multiple-choice",
    "RobertaForMultipleChoice": "multiple-choice",
    "DistilBertForMultipleChoice": "multiple-choice",
    "MPNetForMultipleChoice": "multiple-choice",
}


def build(kind: str = "BertModel", **changes):
    """A model of that transformers class, in the size of its family's tiny one."""
    maker = getattr(transformers, kind)
    settings = maker.config_class.model_type
    family = next(row for row in FAMILIES if settings in row.model_types)
    config = transformers.AutoConfig.for_model(settings, **{**family.tiny, **changes})
    torch.manual_seed(synthetic.SEED)
    with quiet():
        model = maker(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def answers(model, arrays):
    with torch.no_grad():
        return model(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def assert_answers(checkpoint, answer, shapes=((1, 1), (3, 37), (2, 16))) -> None:
    """What is exported of a checkpoint, against `answer`: by name, what torch makes of arrays."""
    exported = exporter._describe(checkpoint, Path())
    module, padding = exporter._module(checkpoint, exported), exporter._padding_id(checkpoint)
    for seed, (batch, length) in enumerate(shapes):
        arrays = sample(exported.inputs, batch, length, padding, seed)
        want = answer(arrays)
        with torch.no_grad():
            got = module(*(torch.from_numpy(arrays[spec.name]) for spec in exported.inputs))
        for name, tensor in zip(exported.outputs, got):
            mask = arrays["attention_mask"]
            difference = largest_difference(tensor.numpy(), want[name].numpy(), mask)
            assert difference < TOLERANCE, (name, batch, length)


def export(held, tmp_path, **config):
    return exporter.export(held, tmp_path / "exported", Config(**config))


# Heads


@pytest.mark.parametrize("kind", KINDS)
def test_object_and_directory_give_the_same_head_of_any_class(kind, tmp_path):
    model = build(kind)
    with quiet():
        model.save_pretrained(tmp_path)
    by_object, by_directory = checkpoints.load(model), checkpoints.load(tmp_path)
    assert by_object.head == by_directory.head == KINDS[kind]
    whole = {"encoder": model.base_model}.get(KINDS[kind], model)

    def answer(arrays):
        if KINDS[kind] != "multiple-choice":
            return answers(whole, arrays)
        # each row is asked as the second of two choices, after an unmasked one of the same text
        pairs = {name: np.stack([array, array], 1) for name, array in arrays.items()}
        pairs["attention_mask"][:, 0] = 1
        return {"logits": answers(model, pairs).logits[:, 1:]}

    for checkpoint in (by_object, by_directory):
        left_out = LEFT_OUT.format(kind) in checkpoint.notes
        assert left_out == kind.endswith("ForPreTraining")
        assert_answers(checkpoint, answer)


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("BertForPreTraining", "masked-lm"),
        ("BertForPreTraining", "next-sentence"),
        ("AlbertForPreTraining", "masked-lm"),
        ("BertForSequenceClassification", "encoder"),
        ("BertLMHeadModel", "embedding"),
    ],
)
def test_load_gives_of_an_object_the_head_that_its_directory_gives(kind, head, tmp_path):
    model = build(kind)
    with quiet():
        model.save_pretrained(tmp_path)
    expected = checkpoints.load(tmp_path, head).model.state_dict()
    state = checkpoints.load(model, head).model.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("by_directory", [False, True])
@pytest.mark.parametrize(
    ("kind", "head", "message"),
    [
        ("BertForPreTraining", "token-classification", "no weights for the head 'token-class"),
        ("BertForTokenClassification", "sequence-classification", "no bert.pooler.dense"),
        ("DistilBertModel", "next-sentence", "'distilbert' have no head 'next-sentence'; known"),
    ],
)
def test_load_refuses_a_head_that_the_model_lacks(kind, head, message, by_directory, tmp_path):
    model = build(kind)
    with quiet():
        model.save_pretrained(tmp_path)
    with pytest.raises((ModelError, UsageError), match=message):
        checkpoints.load(tmp_path if by_directory else model, head)


@pytest.mark.parametrize("kind", ["BertLMHeadModel", "RobertaForCausalLM", "BertModel"])
def test_load_refuses_decoders(kind, tmp_path):
    model = build(kind, is_decoder=True)
    with quiet():
        model.save_pretrained(tmp_path)
    for held in (model, tmp_path):
        with pytest.raises(ModelError, match=r"is a decoder .* Bertile compiles encoders"):
            checkpoints.load(held)


class OfMyTask(transformers.BertPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.score = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, **inputs):
        return {"scores": self.score(self.bert(**inputs).last_hidden_state)}


class Renamed(transformers.BertForTokenClassification):
    pass


class OtherMask(transformers.BertModel):
    def forward(self, *positional, attention_mask=None, **keywords):
        shift = attention_mask.to(torch.float32).mean()
        results = super().forward(*positional, attention_mask=attention_mask, **keywords)
        results.last_hidden_state = results.last_hidden_state + shift
        return results


class OtherAnswer(transformers.BertModel):
    def forward(self, **inputs):
        return {"hidden": super().forward(**inputs).last_hidden_state}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = build()


def test_load_takes_the_encoder_of_a_class_of_ones_own_where_that_is_asked_for():
    model = OfMyTask(build().config)
    with pytest.raises(ModelError, match=r"a OfMyTask, .* unsupported; compile its encoder with"):
        checkpoints.load(model)
    checkpoint = checkpoints.load(model, "encoder")
    assert torch.equal(checkpoint.model.pooler.dense.weight, model.bert.pooler.dense.weight)
    assert checkpoints.load(Renamed(model.config)).head == "token-classification"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OtherMask, r"last_hidden_state differs by .* its code must take a mask of \(batch, 1, 1"),
        (OtherAnswer, r"a OtherAnswer answers with hidden, not with last_hidden_state"),
    ],
)
def test_export_refuses_code_that_answers_otherwise(kind, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        export(kind(build().config).eval(), tmp_path)


# What is around a model


def first_compiled(model):
    model.encoder.layer[0] = torch.compile(model.encoder.layer[0])
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        torch.nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda model: torch.compile(torch.nn.DataParallel(model)),
        first_compiled,
    ],
    ids=["compiled", "parallel", "averaged", "both", "a layer"],
)
def test_load_unwraps_objects(wrap):
    expected = build().state_dict()
    checkpoint = checkpoints.load(wrap(build()))
    assert (
        checkpoint.source == "BertModel" and checkpoint.model.state_dict().keys() == expected.keys()
    )
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_load_writes_weights_that_a_rule_makes_of_others():
    model = build()
    first, second = model.encoder.layer[0].output.dense, model.encoder.layer[1].output.dense
    prune.l1_unstructured(first, "weight", 0.5)
    torch.nn.utils.parametrizations.weight_norm(second)
    layers = checkpoints.load(model).model.encoder.layer
    for layer, own in zip(layers, (first, second)):
        assert torch.equal(layer.output.dense.weight, own.weight)
        assert isinstance(layer.output.dense.weight, torch.nn.Parameter)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (torch.nn.Linear(2, 2), "cannot compile a Linear; give a path"),
        (
            Net(),
            "cannot compile a Net, which holds a model at 'encoder'; give its object.encoder",
        ),
        ({"a": 1}, "cannot compile a dict; give a path"),
    ],
    ids=["layer", "own module", "dict"],
)
def test_load_refuses_other_objects(held, message):
    with pytest.raises(UsageError, match=message):
        checkpoints.load(held)


# Weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("by_directory", [False, True])
def test_load_takes_weights_of_any_float_as_float32(dtype, by_directory, tmp_path):
    model = build().to(dtype)
    with quiet():
        model.save_pretrained(tmp_path)
    state = checkpoints.load(tmp_path if by_directory else model).model.state_dict()
    for name, tensor in model.float().state_dict().items():
        assert state[name].dtype == torch.float32 and torch.equal(state[name], tensor)


def with_weight(tensor):
    model = build()
    model.encoder.layer[1].output.dense.weight = torch.nn.Parameter(tensor, requires_grad=False)
    return model


class Packed(torch.Tensor):
    pass


def with_adapter():
    model = build()
    kind = type("Linear", (torch.nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    model.encoder.layer[0].attention.self.query = kind(128, 128)
    return model


PLACE = r"at 'encoder\.layer\.1\.output\.dense\.weight', which is unsupported"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build().to("meta"), "a tensor without values .* at 'embeddings.word_embeddings"),
        (
            lambda: torch.ao.quantization.quantize_dynamic(build(), {torch.nn.Linear}),
            r"quantized \(DynamicQuantizedLinear at 'encoder.layer.0.attention.self.query'\)",
        ),
        (lambda: with_weight(torch.ones(128, 512, dtype=torch.int8)), f"weights of int8 {PLACE}"),
        (lambda: with_weight(torch.ones(9, dtype=torch.uint8)), f"weights of uint8 {PLACE}"),
        (lambda: with_weight(torch.ones(128, 512).to(torch.float8_e4m3fn)), f"float8_.* {PLACE}"),
        (lambda: with_weight(torch.ones(128, 512).to_sparse()), f"layout torch.sparse_coo {PLACE}"),
        (lambda: with_weight(torch.ones(128, 512).as_subclass(Packed)), f"a Packed in .* {PLACE}"),
        (with_adapter, r"an adapter inside \(Linear at 'encoder.layer.0.*; merge it"),
    ],
    ids="meta dynamic int8 uint8 float8 sparse subclass adapter".split(),
)
@pytest.mark.filterwarnings("ignore")
def test_export_refuses_weights_that_are_no_plain_floats(make, message, cache):
    with pytest.raises(ModelError, match=message) as caught:
        cached.export_cached(make(), Config(cache_dir=cache))
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)


def test_load_refuses_files_of_integer_weights(tmp_path):
    with quiet():
        build().save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    held[name] = held[name].to(torch.int8)
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} is of I8, as quantized weights are"):
        checkpoints.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(held, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=f"{name} is of int8, as quantized weights are"):
        checkpoints.load(tmp_path)


def test_export_says_what_a_models_own_code_raises(tmp_path):
    def fail(*_, **__):
        raise ValueError("no such\ncase")

    model = build()
    model.encoder.layer[0].forward = fail
    with pytest.raises(ModelError, match=r"^'BertModel' cannot be exported: no such$"):
        export(model, tmp_path)


# Settings of the program around, and of the model


def test_export_is_the_same_in_any_surroundings(tmp_path):
    with torch.inference_mode():
        model = build()
    model.set_attn_implementation("eager")
    model.config.output_hidden_states = model.config.output_attentions = True
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        exported = export(model.train(), tmp_path)
    assert exported.outputs == ("last_hidden_state", "pooler_output") and model.training
    arrays, plain = sample(exported.inputs, 3, 37, 0), build()
    got = session(exported.onnx_path).run(["last_hidden_state"], arrays)[0]
    want = answers(plain, arrays).last_hidden_state.numpy()
    assert largest_difference(got, want, arrays["attention_mask"]) < TOLERANCE


def test_cache_tells_heads_and_own_code_apart(cache, monkeypatch):
    def write(_, directory, config):
        head = config.head or "masked-lm"
        return ExportedModel(directory, "x", "0", "bert", head, 8, (), ("logits",)).write()

    monkeypatch.setattr(exporter, "export", write)
    model = build("BertForMaskedLM")
    for head in (None, "encoder"):
        exported = cached.export_cached(model, Config(cache_dir=cache, head=head))
        assert exported.head == (head or "masked-lm")
    plain = files.fingerprint(model)
    assert plain == files.fingerprint(model)
    model.register_forward_hook(lambda *_: None)
    assert plain != files.fingerprint(model)


@pytest.mark.parametrize("head", ["masked-lm", "encoder"])
def test_cache_tells_heads_of_a_directory_apart(head, cache, tmp_path, monkeypatch):
    def write(_, directory, config):
        return ExportedModel(directory, "x", "0", "bert", config.head, 8, (), ("logits",)).write()

    monkeypatch.setattr(exporter, "export", write)
    with quiet():
        build("BertForMaskedLM").save_pretrained(tmp_path)
    for asked in ("embedding", head):
        exported = cached.export_cached(str(tmp_path), Config(cache_dir=cache, head=asked))
        assert exported.head == asked


# Objects of sentence-transformers


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """A directory of a tiny classifier with one label, and a tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("tokenized")
    with quiet():
        build("BertForSequenceClassification", num_labels=1).save_pretrained(directory)
    words = {word: index for index, word in enumerate("[PAD] [UNK] [CLS] [SEP] the cat".split())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def sentence_model(tokenized):
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")

    def make(pooling="mean", last=modules.Normalize):
        with quiet():
            first = modules.Transformer(str(tokenized), max_seq_length=64)
            parts = [first, modules.Pooling(128, pooling_mode=pooling), last()]
            prompts = {"query": "query: "}
            return library.SentenceTransformer(
                modules=parts, prompts=prompts, default_prompt_name="query", device="cpu"
            )

    return make


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
def test_sentence_transformer_is_an_embedding_with_its_texts_settings(sentence_model, wrap):
    model = sentence_model()
    held = objects.opened(wrap(model))
    checkpoint = checkpoints.load(held)
    assert (checkpoint.head, checkpoint.source) == ("embedding", "SentenceTransformer")
    settings = text_settings.read(held.directory)
    assert (settings.prompt, settings.longest) == ("query: ", 64)
    assert {"tokenizer.json", text_settings.PROMPTS} <= {path.name for path in checkpoint.files}
    assert_answers(checkpoint, lambda arrays: answers(_Features(model), arrays))


class _Features:
    def __init__(self, model):
        self.model = model

    def __call__(self, **features):
        return self.model(features)


def test_sentence_transformer_of_other_modules_is_refused(sentence_model):
    with pytest.raises(ModelError, match="module Dropout, which is unsupported"):
        modules = pytest.importorskip("sentence_transformers.models")
        checkpoints.load(sentence_model(last=modules.Dropout))
    assert checkpoints.load(sentence_model("max"), "encoder").chain is None


def test_cross_encoder_is_its_classifier(tokenized):
    library = pytest.importorskip("sentence_transformers")
    with quiet():
        model = library.CrossEncoder(str(tokenized), device="cpu")
    checkpoint = checkpoints.load(model)
    assert (checkpoint.head, checkpoint.source) == ("sequence-classification", "CrossEncoder")
    assert "tokenizer.json" in {path.name for path in checkpoint.files}
    assert checkpoint.files[0].is_file()  # which lies as long as the checkpoint is there


def test_opened_object_is_opened_once(sentence_model):
    held = objects.opened(sentence_model())
    assert objects.opened(held) is held and held.directory.is_dir()
