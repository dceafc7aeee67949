"""Directories of tiny models, saved once for all tests of texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import text_models

ENTITIES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
ENTAILMENT = ("contradiction", "neutral", "entailment")
KINDS = {
    "encoder": dict(kind=""),
    "score": dict(kind="SequenceClassification", labels=("relevant",)),
    "labels": dict(kind="SequenceClassification", labels=ENTAILMENT),
    "tagger": dict(kind="TokenClassification", labels=ENTITIES),
    "roberta-tagger": dict(kind="TokenClassification", labels=ENTITIES, roberta=True),
    "filler": dict(kind="MaskedLM"),
    "roberta-filler": dict(kind="MaskedLM", roberta=True),
    "answerer": dict(kind="QuestionAnswering"),
}


@pytest.fixture(scope="package")
def single_thread() -> Iterator[None]:
    """Models as small as these take longer on several threads of torch."""
    pytest.importorskip("torch", reason="the original models are those of torch")
    with text_models.single_thread():
        yield


@pytest.fixture(scope="package")
def saved(single_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a kind of model, by the name of its row; each is saved once."""
    pytest.importorskip("transformers", reason="the original models are those of transformers")
    known: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in known:
            known[name] = text_models.save(tmp_path_factory.mktemp(name), **KINDS[name])
        return known[name]

    return of


@pytest.fixture(scope="package")
def sentences(single_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of sentence-transformers with prompts."""
    pytest.importorskip("sentence_transformers", reason="which is what is compared with")
    return text_models.save_sentences(
        tmp_path_factory.mktemp("sentences"),
        prompts={"query": "What: ", "passage": "film "},
        default_prompt_name=None,
    )


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A directory with a tokenizer of words, which would pad and cut if it were asked."""
    tokenizers = pytest.importorskip("tokenizers", reason="texts need a tokenizer")
    vocabulary = {w: n for n, w in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def cased(tmp_path: Path) -> Path:
    """A directory with BERT's tokenizer of cased letters, which says nothing else."""
    tokenizers = pytest.importorskip("tokenizers", reason="texts need a tokenizer")
    letters = [*text_models.LETTERS, *text_models.LETTERS.upper()]
    pieces = [*text_models.SPECIAL, "the", "The", "cat", "Cat", "É"]
    pieces += [*letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = tokenizers.BertWordPieceTokenizer(vocabulary, lowercase=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return tmp_path
