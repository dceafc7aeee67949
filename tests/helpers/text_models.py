"""Makes tiny directories of models with tokenizers, and what stands in for their bundles.

The stand-in runs the directory's own model in torch, so that what differs from the original
library is Bertile's way with texts, and no test waits for a compile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bertile.errors import BertileError
from bertile.families import text_settings
from bertile.text.opening import KINDS
from bertile.text.text_model import TextModel

LENGTH = 48  # tokens that the models take
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    "the a of and is was not very good bad movie film cat sat on mat paris london berlin new york"
    " works lives in for acme corp he she it we who what where when wrote book read city old river"
    " runs long short . , ! ? ' - 3 1998 日 本 東 京"
).split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = (
    "The cat sat on the mat.",
    "",
    "Zoë lives in New York, not in Berlin!",
    "東京 is a very old city; 日本",
    "🙂 naïve café — déjà vu",
    "a",
    "unbelievably long: antiestablishment",
    "What was the old film? \t It was good.\n",
)
LONG = "the old cat lives in paris and reads a very good book . " * 12
SIZES: dict[str, Any] = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    initializer_range=0.4,  # of which scores differ more than the precision of a float
)


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """torch computes with one thread meanwhile."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def mixed(count: int, seed: int = 0) -> list[str]:
    """Texts of 0 to 60 words."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(0.08, count) - 1, 60)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]


def word_pieces() -> Any:
    """BERT's tokenizer of some words and of all letters, lower case."""
    from tokenizers import BertWordPieceTokenizer

    pieces = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return BertWordPieceTokenizer(vocabulary, lowercase=True)._tokenizer


def bytes_and_pairs() -> Any:
    """RoBERTa's tokenizer, trained on the same words."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing

    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(
        mixed(200) + [text.title() for text in mixed(50, 1)],
        vocab_size=400,
        min_frequency=2,
        special_tokens=special,
        show_progress=False,
    )
    tokenizer._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer._tokenizer


def save(
    directory: Path,
    kind: str,
    *,
    roberta: bool = False,
    labels: tuple[str, ...] = (),
    **config: Any,
) -> Path:
    """A seeded model of transformers' class AutoModelFor… of that `kind`, "" for an encoder."""
    import torch
    import transformers

    tokenizer = bytes_and_pairs() if roberta else word_pieces()
    names = ("<pad>", "<unk>", "<s>", "</s>", "<mask>") if roberta else SPECIAL
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=LENGTH,
        model_input_names=["input_ids", *(() if roberta else ["token_type_ids"]), "attention_mask"],
        **dict(zip(roles, names)),
    ).save_pretrained(directory)
    sizes = {**SIZES, "vocab_size": tokenizer.get_vocab_size(), **config}
    if labels:
        sizes["id2label"] = dict(enumerate(labels))
        sizes["label2id"] = {label: number for number, label in enumerate(labels)}
    if roberta:
        settings = transformers.RobertaConfig(
            max_position_embeddings=LENGTH + 2, pad_token_id=1, type_vocab_size=1, **sizes
        )
    else:
        settings = transformers.BertConfig(max_position_embeddings=LENGTH, **sizes)
    torch.manual_seed(0)
    name = f"AutoModelFor{kind}" if kind else "AutoModel"
    getattr(transformers, name).from_config(settings).eval().save_pretrained(directory)
    return directory


class TorchModel:
    """Stands in for the bundle of a directory: its model in torch, called with arrays.

    `module` takes the tensors by their names, and gives outputs by those of `axes`.
    """

    threads = 2
    max_length = LENGTH

    def __init__(self, head: str, module: Any, axes: dict[str, list[Any]], **model: Any) -> None:
        self.module, self.closed, self.calls = module, False, []
        inputs = ["input_ids", "attention_mask"]
        if getattr(module.config, "type_vocab_size", 1) > 1:
            inputs.append("token_type_ids")
        self.inputs, self.outputs = tuple(inputs), tuple(axes)
        self.manifest = {
            "model": {"head": head, "max_length": LENGTH, "source": "tiny", **model},
            "static": {"batch": None, "length": None},
            "target": {"name": "torch"},
            "inputs": [{"name": "input_ids", "below": module.config.vocab_size}],
            "outputs": [{"name": name, "axes": axes[name]} for name in axes],
        }

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.manifest["model"].get("labels") or ())

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        if self.closed:
            raise BertileError("the model is closed", "load the bundle again")
        self.calls.append(arrays["input_ids"].shape)
        with torch.inference_mode():
            outputs = self.module(**{name: torch.from_numpy(a) for name, a in arrays.items()})
        return {name: outputs[name].numpy() for name in self.outputs}

    def close(self) -> None:
        self.closed = True


HEADS = {
    "sequence-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "question-answering": "QuestionAnswering",
    "masked-lm": "MaskedLM",
    "encoder": "",
}


def stand_in(directory: Path, head: str) -> TextModel:
    """What `bertile.open` would give of that directory's bundle."""
    import transformers

    name = f"AutoModelFor{HEADS[head]}" if HEADS[head] else "AutoModel"
    module = getattr(transformers, name).from_pretrained(directory).eval()
    config = module.config
    labels = [config.id2label[number] for number in range(config.num_labels)]
    axes: dict[str, dict[str, list[Any]]] = {
        "sequence-classification": {"logits": ["batch", len(labels)]},
        "token-classification": {"logits": ["batch", "length", len(labels)]},
        "question-answering": {
            "start_logits": ["batch", "length"],
            "end_logits": ["batch", "length"],
        },
        "masked-lm": {"logits": ["batch", "length", config.vocab_size]},
        "encoder": {"last_hidden_state": ["batch", "length", config.hidden_size]},
    }
    classes = {"labels": labels} if head.endswith("classification") else {}
    model = TorchModel(head, module, axes[head], **classes)
    return KINDS[head](model, directory)


def save_sentences(directory: Path, **options: Any) -> Path:
    """An encoder with mean pooling as sentence-transformers' directory; `options` are its own."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    save(directory / "encoder", "")
    module = Transformer(str(directory / "encoder"))
    pooling = Pooling(SIZES["hidden_size"], "mean")
    model = SentenceTransformer(modules=[module, pooling], device="cpu", **options)
    model.save(str(directory / "sentences"))
    return directory / "sentences"


def stand_in_of_sentences(directory: Path, original: Any) -> TextModel:
    """What `bertile.open` would give of the bundle of sentence-transformers' `original`."""

    class Pooled:
        config = original[0].model.config

        def __call__(self, **tensors: Any) -> Any:
            return original(tensors)

    pooled = Pooled()
    axes = {"sentence_embedding": ["batch", SIZES["hidden_size"]]}
    model = TorchModel("embedding", pooled, axes)
    settings = dataclasses.replace(text_settings.read(directory), pooling="mean")
    model.manifest["text"] = settings.to_json()
    return KINDS["embedding"](model, directory)


def stand_in_of_splade(directory: Path) -> TextModel:
    """What `bertile.open` would give of the bundle of a masked language model as SPLADE has it."""
    import torch
    import transformers

    masked = transformers.AutoModelForMaskedLM.from_pretrained(directory).eval()

    class Weights:
        config = masked.config

        def __call__(self, **tensors: Any) -> Any:
            logits = masked(**tensors).logits
            weights = torch.log1p(torch.relu(logits)) * tensors["attention_mask"][:, :, None]
            return {"sentence_embedding": weights.amax(1)}

    axes = {"sentence_embedding": ["batch", masked.config.vocab_size]}
    model = TorchModel("embedding", Weights(), axes)
    settings = text_settings.TextSettings(
        kind="sparse", similarity="dot", cut_at=LENGTH, pooling="splade"
    )
    model.manifest["text"] = settings.to_json()
    return KINDS["embedding"](model, directory)


class Counting:
    """Stands in for an embedding bundle: counts of the ids 4 and 5, by streams that take a while.

    `live` is how many rows are alive of those it gave, at most `most_live`.
    """

    inputs = ("input_ids", "attention_mask")
    outputs = ("sentence_embedding",)
    labels = ()

    def __init__(self, threads: int = 2, seconds: float = 0.0, max_length: int | None = None):
        self.threads, self.seconds = threads, seconds
        self.shapes: list[tuple[int, int]] = []
        self.running = self.most_running = 0
        self.failing: Exception | None = None
        self._lock = threading.Lock()
        self.manifest = {
            "model": {"head": "embedding", "max_length": max_length},
            "static": {"batch": None, "length": None},
            "outputs": [{"name": "sentence_embedding", "axes": ["batch", 2]}],
            "text": text_settings.TextSettings().to_json(),
        }

    def __call__(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> dict[str, Any]:
        with self._lock:
            self.shapes.append(input_ids.shape)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            assert ((input_ids > 0) == (attention_mask > 0)).all()
            if self.failing is not None:
                raise self.failing
            time.sleep(self.seconds)
            counts = np.stack([(input_ids == word).sum(1) for word in (4, 5)], axis=1)
            return {"sentence_embedding": counts.astype(np.float32)}
        finally:
            with self._lock:
                self.running -= 1

    def close(self) -> None:
        self.failing = BertileError("the model is closed", "load the bundle again")


def assert_same(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Fail unless two answers are the same, but for the last digits of their numbers."""
    if isinstance(want, dict):
        assert list(got) == list(want)
        for name, value in want.items():
            assert_same(got[name], value, tolerance)
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for mine, value in zip(got, want):
            assert_same(mine, value, tolerance)
    elif isinstance(want, (float, np.floating)):
        assert abs(got - want) <= tolerance, f"{got} is not {want}"
    else:
        assert got == want
