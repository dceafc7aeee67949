"""Ids of texts are those of the libraries that read the same directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.text_models import LONG, TEXTS, bytes_and_pairs, word_pieces

from bertile.base.errors import BundleError, InputError, ModelError
from bertile.families import text_settings
from bertile.families.text_settings import TextSettings
from bertile.text.tokens import FIRST, Ids, TextTokenizer, max_tokens

CASED = ["The Cat Sat", "a cat sat on the Mat and a mat sat on THE cat", "É a", "日本 🙂", ""]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def settle(directory: Path, name: str, **values) -> None:
    (directory / name).write_text(json.dumps(values))


def encode(directory: Path, texts, limit: int | None = None, truncate: bool = True, **options):
    """Encodings by what the directory says, as an older bundle's are; its own says the same."""
    settings = text_settings.read(directory)
    kept = TextSettings.from_json(json.loads(json.dumps(settings.to_json())))
    assert kept == settings
    return TextTokenizer(directory, kept, limit).encode(texts, truncate=truncate, **options)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_lower_case": False},
        {"do_lower_case": True},
        {},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"do_lower_case": False, "truncation_side": "left"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": True},
        {"tokenizer_class": "DistilBertTokenizer", "tokenize_chinese_chars": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [3, 9, 100])
def test_ids_are_those_of_transformers(cased: Path, settings, length) -> None:
    transformers = pytest.importorskip("transformers")
    named = {"tokenizer_class": "BertTokenizer", "model_max_length": length, **settings}
    settle(cased, "tokenizer_config.json", **named, **SPECIAL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(cased)
    want = tokenizer(CASED, truncation=True)["input_ids"]
    for offsets in (False, True):
        got = encode(cased, CASED, 512, offsets=offsets)
        assert [encoding.ids for encoding in got] == want
    if length > 3:
        pairs = list(zip(CASED, reversed(CASED)))
        want = tokenizer(*map(list, zip(*pairs)), truncation=True)
        got = encode(cased, pairs, 512)
        assert [encoding.ids for encoding in got] == want["input_ids"]
        if "token_type_ids" in want:  # not of DistilBERT
            assert [encoding.type_ids for encoding in got] == want["token_type_ids"]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_seq_length": 7},
        {"max_seq_length": 7, "do_lower_case": True},
        {"max_seq_length": None, "do_lower_case": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", ["", "Query A: "])
@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_roberta_config.json"])
def test_ids_are_those_of_sentence_transformers(cased: Path, settings, prompt, name) -> None:
    models = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        **dict(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, intermediate_size=8),
        vocab_size=200,
        max_position_embeddings=20,
    )
    transformers.BertModel(config).save_pretrained(cased)
    settle(cased, "tokenizer_config.json", tokenizer_class="BertTokenizer", do_lower_case=False)
    settle(cased, name, **settings)
    prompts = {"prompts": {"query": prompt, "document": "no"}, "default_prompt_name": "query"}
    settle(cased, "config_sentence_transformers.json", **prompts)
    assert text_settings.read(cased).prompt == prompt
    want = models.Transformer.load(str(cased)).preprocess(CASED, prompt=prompt)
    got = encode(cased, [prompt + text for text in CASED], 20)
    for encoding, ids, mask in zip(got, want["input_ids"], want["attention_mask"], strict=True):
        assert encoding.ids == ids[mask == 1].tolist()


@pytest.mark.parametrize("name", ["max_seq_length", "model_max_length"])
def test_text_longer_than_its_library_takes_is_refused(cased: Path, name: str) -> None:
    """Newer versions of sentence-transformers save the length with the tokenizer alone."""
    settle(cased, "sentence_bert_config.json", **{"max_seq_length": 7} if name[:3] == "max" else {})
    settle(cased, "tokenizer_config.json", tokenizer_class="BertTokenizer", model_max_length=7)
    text = "a a a a a a a a a"
    with pytest.raises(InputError, match="text 2 has 11 tokens, the model takes at most 7"):
        encode(cased, ["a", text], 20, truncate=False)
    with pytest.raises(InputError, match="text 41 has 11 tokens"):
        encode(cased, [text], 20, truncate=False, first=41)
    assert len(encode(cased, [text], 20)[0]) == 7
    assert [bool(cut.overflowing) for cut in encode(cased, ["a", text], 20)] == [False, True]


def test_side_of_a_cut_is_the_tokenizers_own_where_nothing_else_is_said(cased: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(cased / "tokenizer.json"))
    tokenizer.enable_truncation(5, direction="left")
    tokenizer.save(str(cased / "tokenizer.json"))
    (encoding,) = encode(cased, ["a b c d e"], 4, offsets=True)
    assert encoding.tokens == ["[CLS]", "d", "e", "[SEP]"]


def test_of_a_pair_the_longer_is_cut_or_the_first(cased: Path) -> None:
    (encoding,) = encode(cased, [("a b", "c d e f g")], 7, offsets=True)
    assert encoding.tokens == ["[CLS]", "a", "b", "[SEP]", "c", "d", "[SEP]"]
    (encoding,) = encode(cased, [("a b c d e", "f g")], 7, cut=FIRST, offsets=True)
    assert encoding.tokens == ["[CLS]", "a", "b", "[SEP]", "f", "g", "[SEP]"]


def test_directory_without_settings_is_tokenized_as_its_tokenizer_says(cased: Path) -> None:
    (encoding,) = encode(cased, ["The cat"], offsets=True)
    assert encoding.tokens == ["[CLS]", "The", "cat", "[SEP]"]


def test_what_a_file_says_of_padding_and_cutting_is_left(words: Path) -> None:
    """It is how the model was trained: 64 tokens of padding, cut at 4."""
    encodings = encode(words, ["a b a b a b", ""])
    assert [len(encoding) for encoding in encodings] == [8, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "[]", "is not a JSON object"),
        ("sentence_bert_config.json", "{", "cannot be read"),
        ("config_sentence_transformers.json", "3", "is not a JSON object"),
        ("config_sentence_transformers.json", '{"default_prompt_name": "q"}', "no prompt of the n"),
        (
            "config_sentence_transformers.json",
            '{"default_prompt_name": "q", "prompts": {"q": 3}}',
            "has no prompt of the name 'q', its default",
        ),
    ],
)
def test_settings_that_make_no_sense_are_named(cased: Path, name, content, message) -> None:
    (cased / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        encode(cased, ["a"])


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no tokenizer\.json"):
        encode(tmp_path, ["a"])
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        encode(tmp_path, ["a"])


def test_special_tokens_are_known_by_the_names_of_berts_relatives(words: Path) -> None:
    tokenizer = TextTokenizer(words, TextSettings())
    assert [tokenizer.special_id(kind) for kind in ("pad", "unk", "mask")] == [0, 1, None]
    bytes_and_pairs().save(str(words / "tokenizer.json"))
    tokenizer = TextTokenizer(words, TextSettings())
    assert [tokenizer.special_id(kind) for kind in ("pad", "unk", "mask")] == [1, 3, 4]


def test_words_are_what_the_decoder_makes_of_tokens(tmp_path: Path) -> None:
    word_pieces().save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer(tmp_path, TextSettings())
    for text in (*TEXTS[:1], LONG):
        tokens = tokenizer.whole.encode(text, add_special_tokens=False).tokens
        assert tokenizer.words(tokens) == tokenizer.whole.decoder.decode(tokens)
    assert tokenizer.words(["un", "##known"]) == "unknown"


def test_words_without_a_decoder_have_blanks_between(words: Path) -> None:
    assert TextTokenizer(words, TextSettings()).words(["a", "b"]) == "a b"


def test_max_tokens_is_the_lower_of_both_limits() -> None:
    manifest = {"model": {"max_length": 512}, "static": {"length": 128}}
    assert max_tokens(manifest) == 128
    assert max_tokens({"model": {"max_length": None}, "static": {}}) is None


def test_ids_are_their_own_encoding(cased: Path) -> None:
    text = encode(cased, ["a cat sat on the mat"])[0].ids
    settle(cased, "tokenizer_config.json", model_max_length=6)
    first, ids, last = encode(cased, ["a cat", Ids(text), "the cat"])
    assert (first.ids, last.ids) == tuple(e.ids for e in encode(cased, ["a cat", "the cat"]))
    assert (ids.ids, len(ids)) == (text[:6], 6) and ids.overflowing
    assert ids.attention_mask == [1] * 6 and ids.type_ids == [0] * 6
    (left,) = encode(cased, [Ids(text)], side="left")
    assert left.ids == text[-6:]
    assert not encode(cased, [Ids(text[:6])])[0].overflowing


def test_side_of_a_cut_may_be_said(cased: Path) -> None:
    settle(cased, "tokenizer_config.json", model_max_length=6, truncation_side="right")
    whole = encode(cased, [CASED[1]], truncate=False)[0].ids
    assert len(whole) > 6
    for side, kept in ((None, whole[1:5]), ("right", whole[1:5]), ("left", whole[-5:-1])):
        (encoding,) = encode(cased, [CASED[1]], side=side)
        assert encoding.ids == [whole[0], *kept, whole[-1]]
