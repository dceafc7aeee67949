"""Vectors of texts are those of sentence-transformers, by the same names and arguments."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import text_models
from helpers.text_models import LONG, TEXTS, Counting, mixed

from bertile.errors import BertileError, InputError
from bertile.families.text_settings import TextSettings
from bertile.text.embedder import Embedder
from bertile.text.sparse_vectors import SparseVector

# The same model in the same library: rows of a batch with less padding differ in the last digits.
CLOSE = dict(rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def original(sentences: Path):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(sentences), device="cpu")


@pytest.fixture(scope="module")
def embedder(sentences: Path, original) -> Embedder:
    return text_models.stand_in_of_sentences(sentences, original)


def test_each_text_and_all_together_have_the_originals_vectors(embedder, original) -> None:
    texts = [*TEXTS, LONG]
    want = original.encode(texts)
    got = embedder.encode(texts)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, **CLOSE)
    for text, row in zip(texts, want):
        vector = embedder.encode(text)
        assert vector.shape == row.shape
        np.testing.assert_allclose(vector, row, **CLOSE)


def test_many_mixed_texts_keep_their_order_through_windows(embedder, original) -> None:
    texts = mixed(1500)
    want = original.encode(texts, batch_size=64)
    np.testing.assert_allclose(embedder.encode(iter(texts)), want, **CLOSE)
    np.testing.assert_allclose(list(embedder.encode_iter(texts)), want, **CLOSE)


OPTIONS: tuple[dict[str, Any], ...] = (
    {"prompt_name": "query"},
    {"prompt": "the old "},
    {"prompt": "", "prompt_name": "query"},
    {"truncate_dim": 8},
    {"normalize_embeddings": True},
    {"truncate_dim": 8, "normalize_embeddings": True},
    {"precision": "binary"},
    {"precision": "ubinary"},
    {"convert_to_tensor": True},
    {"convert_to_tensor": True, "precision": "binary"},
    {"output_value": "sentence_embedding", "batch_size": 2},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_do_what_they_do_in_the_original(embedder, original, options) -> None:
    for texts in (list(TEXTS[:3]), TEXTS[0]):
        want, got = original.encode(texts, **options), embedder.encode(texts, **options)
        assert (type(got), got.dtype, got.shape) == (type(want), want.dtype, want.shape)
        np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize("method", ["encode_query", "encode_document"])
@pytest.mark.parametrize("options", [{}, {"prompt_name": "passage"}, {"prompt": "the old "}])
def test_queries_and_documents_have_the_prompts_of_the_original(
    embedder, original, method, options
) -> None:
    for texts in (list(TEXTS[:3]), np.array(TEXTS[:2])):
        want = getattr(original, method)(texts, **options)
        np.testing.assert_allclose(getattr(embedder, method)(texts, **options), want, **CLOSE)


def test_list_is_asked_for_by_leaving_numpy(embedder, original) -> None:
    """Its members are arrays, where those of the original are tensors: nothing else needs torch."""
    got = embedder.encode(list(TEXTS[:3]), convert_to_numpy=False)
    want = original.encode(list(TEXTS[:3]), convert_to_numpy=False)
    assert type(got) is type(want) is list
    np.testing.assert_allclose(got, np.stack([row.numpy() for row in want]), **CLOSE)


def test_older_name_of_the_texts_is_taken(embedder) -> None:
    got = embedder.encode(sentences=TEXTS[0], prompt_name="query")
    np.testing.assert_array_equal(got, embedder.encode(inputs=f"What: {TEXTS[0]}"))


@pytest.mark.parametrize("precision", ["float32", "ubinary"])
@pytest.mark.parametrize("width", [None, 8, 100])
def test_no_texts_give_no_rows_of_the_same_width(embedder, precision, width) -> None:
    one_row = embedder.encode(["a"], truncate_dim=width, precision=precision)
    empty = embedder.encode([], truncate_dim=width, precision=precision)
    assert empty.shape == (0, one_row.shape[1])
    assert empty.dtype == one_row.dtype
    assert embedder.encode(iter(()), convert_to_tensor=True).shape == (0, 32)


def test_prompts_and_what_they_are_called_are_the_originals(embedder, original) -> None:
    assert embedder.prompts == original.prompts
    assert embedder.default_prompt_name == original.default_prompt_name
    assert embedder.similarity_fn_name == original.similarity_fn_name
    assert embedder.get_embedding_dimension() == original.get_embedding_dimension()
    assert embedder.get_sentence_embedding_dimension() == 32
    assert embedder.max_seq_length == original.max_seq_length


@pytest.mark.parametrize("asked", [{}, {"prompt": ""}, {"prompt_name": "query"}])
def test_default_prompt_stands_in_front_where_no_other_is_asked_for(words: Path, asked) -> None:
    model = Counting()
    settings = TextSettings(prompts={"name": "a a", "query": "b "}, default_prompt="name")
    model.manifest["text"] = settings.to_json()
    embedder = Embedder(model, words)
    want = {"": [2, 1], "b ": [0, 2]}
    key = "b " if "prompt_name" in asked else ""
    expected = [0, 1] if asked == {"prompt": ""} else want[key]
    assert embedder.encode(" b", **asked).tolist() == expected
    assert embedder.encode([" b"], **asked).tolist() == [expected]
    assert embedder.encode_document(" b").tolist() == [0, 1]  # its own prompt, which is empty


def test_prompt_that_the_pooling_should_leave_out_is_refused(words: Path) -> None:
    model = Counting()
    model.manifest["text"] = TextSettings(include_prompt=False).to_json()
    embedder = Embedder(model, words)
    assert embedder.encode("a").tolist() == [1, 0]
    with pytest.raises(BertileError, match="leaves a prompt out of its pooling"):
        embedder.encode(["a"], prompt="b ")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(inputs=["a"], prompt_name="qery"), "prompt 'qery' is unknown; did you mean 'query'?"),
        (dict(inputs=["a"], precision="int8"), "precision 'int8' is unknown"),
        (dict(inputs="a", output_value="token_embeddings"), "output_value 'token_embeddings'"),
        (dict(inputs=["a", 3]), "text 2 is a int, not a str"),
        (dict(inputs=["a", None]), "text 2 is a NoneType, not a str"),
        (dict(inputs=iter(["a", ("a", "b")])), "text 2 is a tuple, not a str"),
        (dict(inputs=b"a"), "a bytes is no list of texts"),
        (dict(inputs={"text": "a"}), "a dict is no list of texts"),
        (dict(inputs=3), "a int is no list of texts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "call",
)
def test_what_makes_no_sense_is_named(words: Path, call, message) -> None:
    with pytest.raises(BertileError) as caught:
        Embedder(Counting(), words).encode(**call)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_texts_that_are_cut_are_counted(embedder, original) -> None:
    texts = [*TEXTS, LONG, LONG]
    lengths = [len(ids) for ids in original.tokenizer(texts, truncation=False)["input_ids"]]
    embedder.encode(texts)
    assert embedder.truncated == sum(length > original.max_seq_length for length in lengths) == 2
    embedder.encode(LONG)
    assert embedder.truncated == 1
    assert list(embedder.encode_iter(TEXTS[:3])) and embedder.truncated == 0


def test_each_thread_counts_what_was_cut_of_its_own(embedder) -> None:
    ours = embedder.encode_iter(iter([LONG] * 40))
    next(ours)  # of which a thread tokenizes the rest
    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: embedder.truncated).result() == 0
        other.submit(embedder.encode, [LONG, *TEXTS[:2]]).result()
        list(ours)
        assert embedder.truncated == 40
        assert other.submit(lambda: embedder.truncated).result() == 1


def test_text_that_is_too_long_is_refused_by_its_number_in_all_windows(words: Path) -> None:
    embedder = Embedder(Counting(max_length=8), words)
    with pytest.raises(InputError, match="text 1 has 9 tokens, the model takes at most 8"):
        embedder.encode("a a a a a a a", truncate=False)
    texts = ["a"] * 1100 + ["a a a a a a a"]
    with pytest.raises(InputError, match="text 1101 has 9 tokens, the model takes at most 8"):
        embedder.encode(texts, truncate=False)
    answers = embedder.encode_iter(texts, truncate=False)
    assert [next(answers).tolist() for _ in range(1024)] == [[1, 0]] * 1024


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarities_are_those_of_the_original(sentences: Path, original, name) -> None:
    embedder = text_models.stand_in_of_sentences(sentences, original)
    embedder.settings = TextSettings(similarity=name)
    before = original.similarity_fn_name
    original.similarity_fn_name = name
    try:
        a, b = original.encode(mixed(5, 1)), original.encode(mixed(5, 2))
        cases = [(a, b), (a[0], b), (a, a)]
        for first, second in cases:
            got, want = embedder.similarity(first, second), original.similarity(first, second)
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-4)
            assert got.dtype == np.float32
        got, want = embedder.similarity_pairwise(a, b), original.similarity_pairwise(a, b)
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-4)
    finally:
        original.similarity_fn_name = before


def test_sparse_vectors_come_as_places_and_weights(words: Path) -> None:
    model = Counting()
    model.manifest["text"] = TextSettings(kind="sparse", similarity="dot").to_json()
    embedder = Embedder(model, words)
    first, second = embedder.encode(["a a", "b a"])
    assert first == SparseVector(np.array([0]), np.array([2.0]), 2)
    assert second == SparseVector(np.array([0, 1]), np.array([1.0, 1.0]), 2)
    assert embedder.encode("a a") == first
    assert len(embedder.encode("b a", truncate_dim=1).indices) == 1
    assert embedder.similarity([first], [first, second]).tolist() == [[4, 2]]
    with pytest.raises(BertileError, match="precision 'binary'"):
        embedder.encode(["a"], precision="binary")


@pytest.mark.parametrize("name", ["encode", "encode_query", "encode_document", "similarity"])
def test_arguments_are_those_of_the_original_in_their_order(name) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = list(
        inspect.signature(getattr(sentence_transformers.SentenceTransformer, name)).parameters
    )
    ours = inspect.signature(getattr(Embedder, name)).parameters
    positional = [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if name == "similarity":  # a property there: what it gives has these names
        theirs = ["self", "embeddings1", "embeddings2"]
    assert positional == theirs[: len(positional)]
    own = {n for n, p in ours.items() if p.kind is p.KEYWORD_ONLY} - set(theirs)
    assert own <= {"truncate"}


# Streams


def test_vectors_come_before_the_texts_are_exhausted(embedder) -> None:
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        while True:  # endless
            read += 1
            yield "a cat"

    vectors = embedder.encode_iter(texts())
    first = next(vectors)
    assert read <= 3 * 512
    np.testing.assert_allclose(first, embedder.encode("a cat"), **CLOSE)
    vectors.close()


def test_threads_that_share_a_model_get_their_own_vectors(embedder) -> None:
    columns = [mixed(200, seed) for seed in range(3)]
    want = [embedder.encode(texts) for texts in columns]
    got: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda n=n: got.update({n: embedder.encode(columns[n])}))
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, rows in enumerate(want):
        np.testing.assert_allclose(got[number], rows, **CLOSE)


def test_call_after_close_is_refused(words: Path) -> None:
    with Embedder(Counting(), words) as embedder:
        assert embedder.encode("a").tolist() == [1, 0]
    for texts in ("a", ["a"], ["a"] * 600):
        with pytest.raises(BertileError, match="the model is closed"):
            embedder.encode(texts)
