"""A bundle's tokenizer.json by itself gives the ids of transformers' tokenizer, whatever form it
came in.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import sentence_models as tiny

from bertile.base.errors import MissingExtraError, ModelError
from bertile.config import Config
from bertile.export import asked
from bertile.families import text_settings
from bertile.families.text_settings import TextSettings
from bertile.onnx import tokenizer_file

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
TEXTS = (
    *("", " ", "The Cat SAT", "É café naïve", "日本 mat", "good 😀 movie!", "a\tb\nc", "ﬁ Ⅷ"),
    "the cat sat on a mat. " * 8,
)


def ids(directory: Path, settings: TextSettings) -> list[list[int]]:
    """What the prepared file gives, with nothing else asked of it."""
    prepared = tokenizer_file.prepare(directory, settings, str(directory))
    assert prepared.cut_at == settings.cut_at
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.padding is None and tokenizer.truncation is None
    return [tokenizer.encode(text).ids for text in TEXTS]


def wanted(directory: Path) -> list[list[int]]:
    return transformers.AutoTokenizer.from_pretrained(directory)(list(TEXTS))["input_ids"]


def wordpiece(directory: Path, **config) -> Path:
    """BERT's vocabulary, with cased words too, that config, and no tokenizer.json."""
    words = [*tiny.WORDS, "The", "Cat", "É", "café", "cafe", "naive"]
    words += [letter.upper() for letter in tiny.LETTERS]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    tiny.settle(directory / "config.json", model_type="bert")
    tiny.settle(directory / "tokenizer_config.json", tokenizer_class="BertTokenizer", **config)
    return directory


def corpus() -> list[str]:
    return ["the cat sat on the mat", "a good movie", "a bad movie café", "THE CAT 日本"] * 9


def bytepairs(directory: Path) -> Path:
    """RoBERTa's byte pairs: vocab.json and merges.txt."""
    trained = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(corpus(), vocab_size=320, special_tokens=special)
    trained.save_model(str(directory))
    tiny.settle(directory / "config.json", model_type="roberta")
    tiny.settle(directory / "tokenizer_config.json", tokenizer_class="RobertaTokenizer")
    return directory


def pieces(directory: Path, name: str, model_type: str) -> Path:
    """A model of sentencepiece, trained here."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="trains the pieces")
    with (directory / name).open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()),
            model_writer=file,
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
            num_threads=1,
            **(
                {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3}
                if name == "spiece.model"
                else {}
            ),
            user_defined_symbols=["[CLS]", "[SEP]", "[MASK]"] if name == "spiece.model" else [],
        )
    tiny.settle(directory / "config.json", model_type=model_type)
    return directory


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    ],
    ids=str,
)
def test_wordpiece_becomes_a_file_with_transformers_ids(tmp_path, config):
    directory = wordpiece(tmp_path, **config)
    want = wanted(directory)
    assert ids(directory, text_settings.read(directory)) == want
    assert len({tuple(row) for row in want}) > 6


def test_byte_pairs_become_a_file_with_transformers_ids(tmp_path):
    directory = bytepairs(tmp_path)
    want = wanted(directory)
    assert ids(directory, text_settings.read(directory)) == want


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("sentencepiece.bpe.model", "xlm-roberta"),
        ("sentencepiece.bpe.model", "camembert"),
        ("spiece.model", "albert"),
    ],
)
def test_pieces_become_a_file_with_transformers_ids(tmp_path, name, model_type):
    directory = pieces(tmp_path, name, model_type)
    want = wanted(directory)
    assert ids(directory, text_settings.read(directory)) == want
    assert len({tuple(row) for row in want}) > 6


@pytest.fixture
def padding(tmp_path) -> Path:
    """A cased tokenizer.json that pads and cuts, with the config of an uncased one."""
    directory = wordpiece(tmp_path, do_lower_case=True, model_max_length=64)
    words = (directory / "vocab.txt").read_text(encoding="utf-8").splitlines()
    cased = tokenizers.BertWordPieceTokenizer({w: i for i, w in enumerate(words)}, lowercase=False)
    cased.enable_padding(length=12)
    cased._tokenizer.enable_truncation(12, direction="left")
    cased.save(str(directory / "tokenizer.json"))
    (directory / "vocab.txt").unlink()
    return directory


def test_file_neither_pads_nor_cuts_and_lowercases_as_transformers(padding):
    directory = Path(shutil.copytree(padding, padding.parent / "theirs"))
    rows = transformers.AutoTokenizer.from_pretrained(directory)(list(TEXTS), padding=False)
    settings = text_settings.read(padding)
    assert ids(padding, settings) == rows["input_ids"]
    # what the file has said of a cut is kept where its config says nothing
    shutil.copyfile(directory / "tokenizer.json", padding / "tokenizer.json")
    assert tokenizer_file.prepare(padding, settings, "it").side == "left"
    again = tokenizer_file.prepare(padding, TextSettings(side="right"), "it")
    assert again.side == "right"


@pytest.mark.parametrize("normalizer", ["BertNormalizer", "Sequence", None])
def test_lower_case_of_sentence_transformers_stands_in_front(normalizer):
    contents = {
        "BertNormalizer": {"type": "BertNormalizer", "lowercase": False},
        "Sequence": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        None: None,
    }
    settings = TextSettings(lower=True)
    first = tokenizer_file.normalizer(contents[normalizer], settings)
    parts = first["normalizers"] if first["type"] == "Sequence" else [first]
    assert parts[0] == {"type": "Lowercase"} and len(parts) == 1 + bool(normalizer)
    assert tokenizer_file.normalizer(first, settings) == first
    assert tokenizer_file.normalizer(contents[normalizer], TextSettings()) == contents[normalizer]


def test_directory_without_a_tokenizer_stays_so(tmp_path):
    settings = TextSettings(side="left")
    assert tokenizer_file.prepare(tmp_path, settings, "it") is settings
    assert not list(tmp_path.iterdir())
    tokenizer_file.check(tmp_path)


def test_vocabulary_that_cannot_be_converted_is_named_with_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ModelError, match=r"\(vocab\.json\) cannot .*no merges\.txt beside it; put"):
        tokenizer_file.check(tmp_path)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "spiece.model").write_bytes(b"no pieces")
    tiny.settle(tmp_path / "config.json", model_type="albert")
    is_there = tokenizer_file.extras._is_there
    monkeypatch.setattr(
        tokenizer_file.extras, "_is_there", lambda m: m != "sentencepiece" and is_there(m)
    )
    with pytest.raises(MissingExtraError, match=r"sentencepiece; install with: .*bertile\[export"):
        tokenizer_file.prepare(tmp_path, TextSettings(), "the model")
    monkeypatch.undo()
    pytest.importorskip("sentencepiece", reason="reads the pieces")
    with pytest.raises(ModelError, match=r"of 'the model' \(spiece\.model\) cannot become a tok"):
        tokenizer_file.prepare(tmp_path, TextSettings(), "the model")


def test_tokenizer_without_a_fast_form_is_named(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n日\n")
    tiny.settle(tmp_path / "config.json", model_type="bert")
    own = {"word_tokenizer_type": "basic", "subword_tokenizer_type": "character"}
    name = "BertJapaneseTokenizer"
    tiny.settle(tmp_path / "tokenizer_config.json", tokenizer_class=name, **own)
    with pytest.raises(ModelError, match=r"no fast BertJapaneseTokenizer; put a tokenizer\.json"):
        tokenizer_file.prepare(tmp_path, TextSettings(), "it")


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_file_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json of 'it' cannot be read"):
        tokenizer_file.prepare(tmp_path, TextSettings(), "it")


def test_preflight_refuses_a_half_vocabulary_before_anything_is_loaded(tmp_path):
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "vocab_size": 9}
    tiny.settle(tmp_path / "config.json", model_type="roberta", **sizes)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ModelError, match=r"there is no merges\.txt beside it"):
        asked.check(str(tmp_path), Config())


def test_prepared_file_is_the_same_again(padding):
    settings = tokenizer_file.prepare(padding, text_settings.read(padding), "it")
    first = (padding / "tokenizer.json").read_bytes()
    assert tokenizer_file.prepare(padding, settings, "it") == settings
    assert (padding / "tokenizer.json").read_bytes() == first
    assert json.loads(first)["padding"] is None
