"""The table of what each precision costs, on real weights, beside ONNX Runtime's own 8 bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from bertile.base.errors import UsageError
from bertile.config import Config
from bertile.evaluation.datasets import Dataset
from bertile.evaluation.sentences import sentences
from bertile.studies.compare import as_text, compare


@pytest.mark.slow
def test_int8_embeddings_are_closer_to_fp32_than_onnxruntimes(cache):
    dataset = Dataset(Path("sentences.txt"), tuple(sentences(100)))
    fp32, ours, peer = compare(
        "minilm", dataset, Config(cache_dir=cache), ["int8"], ["onnxruntime-int8"]
    )
    assert (fp32["engine"], fp32["cosine"]) == ("bertile fp32", pytest.approx(1))
    for metric in ("cosine", "spearman"):
        assert 0.995 <= ours[metric] < 1 and ours[metric] > peer[metric]
    assert ours["bytes"] < fp32["bytes"]
    text = as_text([fp32, ours, peer])
    assert text.splitlines()[0].split() == ["engine", "weights", "cosine", "spearman"]
    assert f"{ours['spearman']:.5f}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((["int9"], []), "did you mean 'int8'?"), (([], ["openvino"]), "peer 'openvino' is unknown")],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(UsageError) as caught:
        compare("minilm", Dataset(Path("x.txt"), ("a",)), Config(), *arguments)
    assert message in str(caught.value)
