"""FastEmbed takes a bundle by a name, and gives the vectors of sentence-transformers."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest
from helpers import package

tomllib = pytest.importorskip("tomllib")  # part of Python from 3.11 on
pytestmark = pytest.mark.slow  # compiles MiniLM, installs FastEmbed
ROOT = Path(__file__).parents[3]
CLIENT = """
import json, sys
import numpy as np
from fastembed import TextEmbedding
from bertile.errors import UsageError
from bertile.integrations.fastembed import add_bundle

bundle, texts, query = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
assert add_bundle(bundle, "mine/MiniLM") == "mine/MiniLM"
try:
    add_bundle(bundle, "MINE/minilm")
except UsageError as error:
    assert "has a model 'MINE/minilm' already" in str(error)
else:
    raise AssertionError("a name was taken twice")
assert "mine/MiniLM" in [model["model"] for model in TextEmbedding.list_supported_models()]
model = TextEmbedding("mine/minilm", threads=1)
assert model.embedding_size == TextEmbedding.get_embedding_size("mine/MiniLM") == 384
assert model.token_count(["?", ""]) == 5
stream = model.embed(text for text in texts)
first = next(iter(stream))
np.savez(
    sys.argv[4],
    plain=[first, *stream],
    of_documents=list(model.passage_embed(texts)),
    of_query=list(model.query_embed(query))[0],
)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """A python that has FastEmbed, which cannot lie beside the transformers that exports need."""
    home = tmp_path_factory.mktemp("fastembed") / "venv"
    venv.create(home, with_pip=True, symlinks=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [
        requirement
        for requirement in extras["fastembed"] + extras["run"]
        if not requirement.startswith("bertile[")
    ]
    line = [home / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    done = subprocess.run([*map(str, line), *wanted], capture_output=True, text=True, check=False)
    if "No matching distribution" in done.stderr:
        pytest.skip("no package index is reached")
    assert done.returncode == 0, done.stderr
    return home / "bin" / "python"


def test_vectors_are_those_of_sentence_transformers(python, minilm, texts, tmp_path):
    (tmp_path / "client.py").write_text(CLIENT)
    words = (minilm, json.dumps(texts.all), texts.query, tmp_path / "vectors.npz")
    run = subprocess.run(
        [str(python), str(tmp_path / "client.py"), *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(package.linked(tmp_path / "site"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    vectors = np.load(tmp_path / "vectors.npz")
    for name in ("plain", "of_documents", "of_query"):
        assert vectors[name].dtype == np.float32
        np.testing.assert_allclose(vectors[name], getattr(texts, name), atol=1e-4)
