"""A process that answers texts imports what that needs, and does not grow with their number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import tiny_bundle
from helpers.tiny_bundle import MANIFEST, PARAMS, python

from bertile.bundle import writer
from bertile.studies import text_bench

HEAVY = ("torch", "transformers", "tvm", "onnx", "onnxruntime", "sentence_transformers")
OPENED = """
import json, sys
import bertile
with bertile.open(sys.argv[1], threads=1) as model:
    shapes = [len(model.encode("a b")), len(model.encode(["a", "b"] * 300))]
print(json.dumps([shapes, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.fixture(scope="module")
def bundle(stages: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calls itself an embedding, and has a tokenizer of words."""
    tokenizers = pytest.importorskip("tokenizers", reason="texts need a tokenizer")
    words = {w: n for n, w in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    directory = tmp_path_factory.mktemp("fresh")
    tokenizer.save(str(directory / "tokenizer.json"))
    manifest = {**MANIFEST, "model": {**MANIFEST["model"], "head": "embedding"}}
    files = [directory / "tokenizer.json"]
    library = tiny_bundle.library(stages)
    return writer.write(manifest, library, PARAMS, files, directory / "tiny")


def test_texts_are_answered_without_what_compiles_models(bundle: Path) -> None:
    code = f"import sys; sys.argv = ['-c', {str(bundle)!r}]\n{OPENED}"
    shapes, modules = json.loads(python(code))
    assert shapes == [2, 600] and "tokenizers" in modules
    assert set(HEAVY) & set(modules) == set()


@pytest.mark.slow  # twenty thousand texts
def test_memory_does_not_grow_with_the_number_of_texts(bundle: Path) -> None:
    _, tenth, end = text_bench.memory(bundle, 2, 20_000)
    assert end - tenth < text_bench.MOST_GROWTH_MB
