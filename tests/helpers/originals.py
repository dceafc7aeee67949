"""Saves small models with a tokenizer of BERT's kind, and bundles in which torch computes them.

Such a bundle is whole but for its library: quick tests ask what stands around a model, and compile
nothing. What a compiled library computes, slow tests compare.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
from helpers import family_models

from bertile import loader
from bertile.base.quiet import quiet
from bertile.bundle import writer
from bertile.families import text_settings
from bertile.loading.about import Bundled
from bertile.onnx.exported import TOKENIZER_FILES

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", ":", "?", "!"),
    *("the", "cat", "dog", "sat", "on", "a", "mat", "good", "bad", "movie", "query", "this", "is"),
    *(*LETTERS, *(f"##{letter}" for letter in LETTERS)),
]
TEXTS = [
    "The cat sat on a mat.",
    "dog",
    "This movie is bad, bad, bad!",
    "",
    "A good dog? The good cat on the mat is this good dog: " + "a good movie, " * 8,
    "Zebras jump quickly",
]
PAIRS = [("the cat", "a mat"), ("is this good?", "the movie is good."), ("dog", "sat " * 40)]
LONGEST = 64
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": LONGEST,
}
CLASSES = {
    "embedding": "BertModel",
    "encoder": "BertModel",
    "sequence-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "question-answering": "BertForQuestionAnswering",
    "masked-lm": "BertForMaskedLM",
}
# Of the outputs with their axes behind the batch; 0 is the number of labels.
OUTPUTS: dict[str, dict[str, list[Any]]] = {
    "embedding": {"sentence_embedding": [32]},
    "encoder": {"last_hidden_state": ["length", 32], "pooler_output": [32]},
    "sequence-classification": {"logits": [0]},
    "token-classification": {"logits": ["length", 0]},
    "question-answering": {"start_logits": ["length"], "end_logits": ["length"]},
    "masked-lm": {"logits": ["length", len(WORDS)]},
}


def save(directory: Path, head: str, labels: tuple[str, ...] = ()) -> Path:
    """A seeded random model of that head, as save_pretrained writes it, with its tokenizer."""
    import torch
    import transformers

    names = {}
    if labels:
        numbers = {label: number for number, label in enumerate(labels)}
        names = {"id2label": dict(enumerate(labels)), "label2id": numbers}
    config = transformers.BertConfig(**SIZES, initializer_range=0.5, **names)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(7)
        getattr(transformers, CLASSES[head])(config).save_pretrained(directory)
    _save_tokenizer(directory)
    return directory


def compute(original: Path, output: Path, head: str) -> Path:
    """A bundle of the model in `original`, for `load`; it holds what a compile takes along."""
    text = ("config.json", *TOKENIZER_FILES, *text_settings.FILES)
    config = json.loads((original / "config.json").read_text())
    labels = list(config.get("id2label", {}).values()) if "classification" in head else []
    axes = {name: [len(labels) or size for size in axes] for name, axes in OUTPUTS[head].items()}
    manifest = {
        "bertile": "0.0.0",
        "entry": "main",
        "model": {
            **{"source": str(original), "family": "bert", "head": head},
            **{"max_length": LONGEST, "labels": labels},
        },
        "target": {"name": "native", "arch": platform.machine(), "features": []},
        "lanes": 16,
        "inputs": [
            {"name": "input_ids", "dtype": "int64", "below": len(WORDS), "default": None},
            {"name": "attention_mask", "dtype": "int64", "below": 2, "default": "ones"},
            {"name": "token_type_ids", "dtype": "int64", "below": 2, "default": "zeros"},
        ],
        "outputs": [
            {"name": name, "dtype": "float32", "axes": ["batch", *sizes]}
            for name, sizes in axes.items()
        ],
        "static": {"batch": None, "length": None},
        "text": text_settings.read(original, len(labels) or None).to_json(),
    }
    files = [original / name for name in text if (original / name).exists()]
    params = {"none": np.zeros(1, np.float32)}
    return writer.write(manifest, original / "config.json", params, files, output)


class Computed(Bundled):
    """A loaded bundle of `compute`: torch runs the original that it was made of."""

    closed = False

    def __init__(self, directory: Path, threads: int | None) -> None:
        import transformers

        self.manifest = loader.read_manifest(directory)
        loader.check_files(directory, self.manifest["files"], True)
        self.inputs = tuple(spec["name"] for spec in self.manifest["inputs"])
        self.outputs = tuple(spec["name"] for spec in self.manifest["outputs"])
        self.max_length, self.threads, self.place = LONGEST, threads or 1, Path(directory)
        self.last: dict[str, np.ndarray] = {}
        source, head = self.manifest["model"]["source"], self.manifest["model"]["head"]
        with quiet():
            self.torch = getattr(transformers, CLASSES[head]).from_pretrained(source).eval()

    @property
    def directory(self) -> Path:
        return self.place

    def __call__(self, **inputs: Any) -> dict[str, np.ndarray]:
        """The original's outputs; as those of a library, zero behind the end of a sequence."""
        checked = loader.check_inputs(inputs, self.manifest["inputs"], self.max_length)
        head = self.manifest["model"]["head"]
        mask = checked.setdefault("attention_mask", np.ones_like(checked["input_ids"]))
        outputs = family_models.torch_outputs(self.torch, head, checked)
        for spec in self.manifest["outputs"]:
            if "length" in spec["axes"]:
                outputs[spec["name"]][mask == 0] = 0
        self.last = outputs
        return outputs

    def __reduce__(self) -> tuple[Any, ...]:
        return Computed, (self.place, self.threads)

    def close(self) -> None:
        self.closed = True

    def _place(self) -> str:
        return "torch"


def load(directory: Path, threads: int | None = None, **_: Any) -> Computed:
    """In the place of `bertile.loader.load`."""
    return Computed(Path(directory), threads)


def _save_tokenizer(directory: Path) -> None:
    import transformers

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = transformers.BertTokenizer(vocabulary, model_max_length=LONGEST)
    tokenizer.save_pretrained(directory)
