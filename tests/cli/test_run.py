"""`bertile run` as it is typed, on a model that only counts: every head, every way in and out."""

from __future__ import annotations

import io
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.counting_model import CountingModel, save_tokenizer

from bertile import loader
from bertile.base.allowed import AGGREGATIONS
from bertile.cli import main, run

pytest.importorskip("tokenizers", reason="what makes ids of texts")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle")
    save_tokenizer(directory)
    return directory


@pytest.fixture
def typed(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Type `bertile run` for a model; gives its code, what it printed, and what it said."""

    def type_command(
        model: CountingModel, *words: str, stdin: bytes | None = b"", terminal: bool = False
    ) -> SimpleNamespace:
        stream = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin))
        if stream is not None:
            stream.isatty = lambda: terminal
        monkeypatch.setattr("sys.stdin", stream)
        monkeypatch.setattr(loader, "load", lambda *_, **__: model)
        model.closed = False
        code = main.main(["run", str(bundle), *words])
        out, err = capsys.readouterr()
        assert model.closed or code == 2
        said = err.removeprefix("bertile: ").strip()
        return SimpleNamespace(code=code, out=out, err=said, lines=out.split("\n")[:-1])

    return type_command


def records(answer: SimpleNamespace) -> list[dict]:
    assert answer.code == 0, answer.err
    return [json.loads(line) for line in answer.lines]


# Every head


def test_vectors_are_a_table_for_people_and_lines_for_programs(typed) -> None:
    answer = typed(CountingModel("embedding"), "a a", "", "b")
    assert answer.lines[2].split() == ["1", "2.0000", "0.0000", "a", "a"]
    assert answer.lines[3].split() == ["2", "0.0000", "0.0000"] and len(answer.lines) == 5
    for words in (("--json",), ("-o", "-")):
        assert records(typed(CountingModel("embedding"), "a a", "", "b", *words)) == [
            {"text": "a a", "embedding": [2, 0]},
            {"text": "", "embedding": [0, 0]},
            {"text": "b", "embedding": [0, 1]},
        ]


def test_similarities_are_those_of_the_model_and_come_only_when_asked(typed) -> None:
    texts = ("a", "a b", "b")
    answer = typed(CountingModel("embedding"), *texts, "--similarity")
    assert answer.lines[3].split() == ["2", "0.71", "1.00", "0.71", "a", "b"]
    (first, *_) = records(typed(CountingModel("embedding"), *texts, "--similarity", "--json"))
    assert first["cosine"] == pytest.approx([1, 0.5**0.5, 0])
    dot = CountingModel("embedding", similarity="dot")
    assert records(typed(dot, "a a", "a b", "--similarity", "--json"))[0]["dot"] == [4, 2]


def test_prompts_length_and_width_are_the_models_arguments(typed) -> None:
    prompts = dict(prompts={"query": "a ", "twice": "b b "}, default_prompt="query")

    def vector(*words: str) -> list[float]:
        model = CountingModel("embedding", **prompts)
        return records(typed(model, "a b", "--json", *words))[0]["embedding"]

    assert vector() == [2, 1] and vector("--prompt-name", "twice") == [1, 3]
    assert vector("--prompt", "b ") == [1, 2] and vector("--truncate-dim", "1") == [2]
    assert vector("--normalize", "--prompt", "") == pytest.approx([0.5**0.5] * 2)
    answer = typed(CountingModel("embedding", **prompts), "a", "--prompt-name", "quary")
    assert (answer.code, answer.out) == (2, "")
    assert "prompt 'quary' is unknown; did you mean 'query'?" in answer.err


def test_labels_have_scores(typed) -> None:
    model = CountingModel("sequence-classification")
    probability = 1 / (1 + np.exp(-2))
    answer = typed(model, "a a", "b b")
    assert answer.lines[2].split() == ["1", "0.88", "good", "a", "a"]
    (first, second) = records(typed(model, "a a", "b b", "--json"))
    assert first == {"text": "a a", "label": "good", "score": pytest.approx(probability)}
    assert second["label"] == "bad"
    (every,) = records(typed(model, "a a", "--top-k", "5", "--json"))
    assert [row["label"] for row in every["labels"]] == ["good", "bad"]


def test_labels_of_ones_own_are_what_zero_shot_gives(typed) -> None:
    """A label is entailed as often as a pair has an "a"."""
    asking = ("--candidate-labels", "b, a", "--hypothesis-template", "a {}")
    model = CountingModel("sequence-classification", ("entailment", "contradiction"))
    answer = typed(model, "b", "a", *asking)
    share = 1 / (1 + np.exp(-1))
    assert answer.lines[2].split() == ["1", f"{share:.2f}", "a", "b"]
    (first, second) = records(typed(model, "b", "a", *asking, "--json"))
    assert [row["label"] for row in second["labels"]] == ["a", "b"]
    assert first["labels"][0] == {"label": "a", "score": pytest.approx(share)}
    (best,) = records(typed(model, "b", *asking, "--json", "--top-k", "1"))
    assert len(best["labels"]) == 1
    (each,) = records(typed(model, "a", *asking, "--json", "--multi-label"))
    assert sum(row["score"] for row in each["labels"]) > 1.5


def test_pairs_of_a_reranker_have_the_scores_of_a_cross_encoder(typed) -> None:
    scoring = dict(activation="none", scores="sigmoid")

    def score(*words: str, stdin: bytes = b"") -> list[dict]:
        model = CountingModel("sequence-classification", ("label",), **scoring)
        return records(typed(model, *words, "--json", stdin=stdin))

    want = [{"text": "a", "text_pair": "a b", "score": 2}]
    assert score("--pair", "a", "a b") == want
    assert score("--question", "a", "a b") == want
    assert score("--pair", stdin=b"a\ta b\n") == want
    assert score("--pair", "a", "a b", "--pair", "b", "b")[1]["score"] == 0
    # a text by itself is scored as transformers' pipeline does
    assert score("a")[0] == {"text": "a", "label": "label", "score": pytest.approx(0.7310586)}


def test_entities_have_offsets(typed) -> None:
    model = CountingModel("token-classification", ("B-X", "I-X"))
    (answer,) = records(typed(model, "a b b", "--json"))
    (entity,) = answer["entities"]
    assert (entity["entity_group"], entity["start"], entity["end"]) == ("X", 0, 5)
    (answer,) = records(typed(model, "a b b", "--aggregation", "none", "--json"))
    assert [entity["entity"] for entity in answer["entities"]] == ["B-X", "I-X", "I-X"]
    table = typed(model, "a b b", "").lines
    assert table[2].split() == ["1", "1.00", "X", "0", "5", "a", "b", "b"]
    assert table[3].split() == ["2", *"-----"]  # a text without entities is not dropped
    answer = typed(model, "a", "--aggregation", "simpel")
    assert (answer.code, answer.out) == (2, "") and "did you mean 'simple'?" in answer.err


def test_answers_come_of_one_question_or_of_pairs(typed) -> None:
    model = CountingModel("question-answering", max_length=512)
    (record,) = records(typed(model, "--question", "c", "c a c b c", "--json"))
    assert record.pop("score") > 0.9
    assert record == {
        "question": "c",
        "context": "c a c b c",
        "answer": "a c b",
        "start": 2,
        "end": 7,
    }
    lines = b'{"question": "c", "context": "a b"}\n{"context": "c a b", "question": "c"}\n'
    answers = records(
        typed(model, "--field", "question", "--field", "context", "-o", "-", stdin=lines)
    )
    assert [record["answer"] for record in answers] == ["a b", "a b"]
    (several,) = records(typed(model, "--question", "c", "c a c b", "--top-k", "2", "--json"))
    assert len(several["answers"]) == 2
    assert typed(model, "--question", "c", "c a b").lines[2].split()[2:] == ["2", "5", "a", "b"]
    assert "text 1 has no question; give --question" in typed(model, "a").err
    assert "the context of text 2 is blank" in typed(model, "--question", "c", "a b", " ").err
    assert (
        "text 1 is a pair, and --question" in typed(model, "--question", "c", "--pair", *"ab").err
    )


def test_masks_are_filled(typed) -> None:
    model = CountingModel("masked-lm")
    (record,) = records(typed(model, "a [MASK]", "--top-k", "2", "--json"))
    assert [token["token_str"] for token in record["tokens"]] == ["c", "b"]
    words = [line.split()[2] for line in typed(model, "a [MASK]").lines[2:]]
    assert words == ["c", "b", "a", "[MASK]", "[SEP]"]
    answer = typed(model, "a [MASK]", "a")
    assert answer.code == 2
    assert answer.err.endswith("text 2 has no [MASK]; put it for a hidden word")


def test_vectors_of_tokens_are_those_of_an_encoder(typed, tmp_path) -> None:
    model = CountingModel("encoder")
    (record,) = records(typed(model, "a b", "--json"))
    assert (
        record["features"]
        == [[0, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0]][:1] + record["features"][1:]
    )
    assert len(record["features"]) == 4 and record["features"][1] == [1, 0, 0]
    assert typed(model, "a b", "-o", str(tmp_path / "x.npz")).code == 0
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["features"].shape == (4, 3) and arrays["starts"].tolist() == [0, 4]


@pytest.mark.parametrize(
    ("head", "words", "message"),
    [
        ("embedding", ("a", "--top-k", "2"), "--top-k is not for a model with the head 'embedd"),
        ("embedding", ("a", "--question", "b"), "--question is not for a model with the head"),
        ("embedding", ("--pair", "a", "b"), "text 1 is a pair; a model with the head 'embedding'"),
        ("masked-lm", ("a", "--similarity"), "--similarity is not for a model with the head"),
        ("masked-lm", ("a", "--normalize"), "--normalize is not for a model with the head 'mas"),
        ("encoder", ("a", "--multi-label"), "--multi-label is not for a model with the head 'enco"),
        ("sequence-classification", ("a", "--multi-label"), "--multi-label is for labels of yours"),
        ("sequence-classification", ("a", "--candidate-labels", "b"), "have no 'entailment'"),
        ("encoder", ("a", "--prompt", ""), "--prompt is not for a model with the head 'encoder'"),
        ("encoder", ("a", "--aggregation", "max"), "--aggregation is not for a model with the h"),
        ("multiple-choice", ("a",), "has the head 'multiple-choice', which gives no answer to a"),
    ],
)
def test_what_a_head_is_not_asked_is_refused(typed, head, words, message) -> None:
    answer = typed(CountingModel(head), *words)
    assert (answer.code, answer.out) == (2, "") and message in answer.err


# Texts and their number


def test_texts_come_from_arguments_files_and_stdin(typed, tmp_path) -> None:
    content = b"\xef\xbb\xbfa\r\n\r\nb \xe2\x80\xa8 a\r\n"
    (tmp_path / "texts").write_bytes(content)
    want = ["a", "", "b \u2028 a"]

    def read(*words: str, **stdin) -> list[str]:
        answers = records(typed(CountingModel("embedding"), "--json", *words, **stdin))
        return [record["text"] for record in answers]

    assert read("--input", str(tmp_path / "texts"), stdin=b"other") == want
    assert read("--file", str(tmp_path / "texts")) == want
    assert read("--input", "-", stdin=content) == want
    assert read("--input", "-", stdin=content, terminal=True) == want
    assert read(stdin=content) == want
    (tmp_path / "x.csv").write_text("id,body\n1,a\n2,b\n")
    assert read("--input", str(tmp_path / "x.csv"), "--column", "body") == ["a", "b"]
    assert read("one", "two words", stdin=b"\xff") == ["one", "two words"]
    assert read("--", "-x", "--file") == ["-x", "--file"]
    assert read("--threads", "1", "-5", "-5 degrees", "--", "--", "-x") == [
        "-5",
        "-5 degrees",
        "--",
        "-x",
    ]


def test_what_is_wrong_with_texts_is_said(typed, tmp_path) -> None:
    def refused(*words: str, **stdin) -> str:
        answer = typed(CountingModel("embedding"), *words, **stdin)
        assert (answer.code, answer.out) == (2, "")
        return answer.err

    remedy = "give texts as arguments, with --input FILE, or as lines on stdin"
    assert refused(stdin=b"x", terminal=True) == f"there is no text; {remedy}"
    assert refused(stdin=None) == f"there is no text; {remedy}"
    assert refused("--input", "-", stdin=None) == f"there is no text; {remedy}"
    assert refused(stdin=b"") == f"there is no text in stdin; {remedy}"
    assert refused("x", "-x") == "option '-x' is unknown; see: bertile run --help"
    assert refused("x", "--truncate") == "option '--truncate' is unknown; did you mean '--no-tr" + (
        "uncate'?"
    )
    both = "texts and --input exclude each other; leave one of them out"
    assert refused("x", "--input", "-") == refused("x", "--file", str(tmp_path)) == both
    assert refused("x", "--column", "1") == "--field and --column are for files; leave them out"
    assert refused(stdin=b"gr\xfcn\na\n") == "line 1 of stdin is not in UTF-8; convert it"


def test_texts_before_a_wrong_line_are_answered(typed) -> None:
    answer = typed(CountingModel("embedding"), "--json", stdin=b"a\nb\ngr\xfcn\na\n")
    assert [json.loads(line)["text"] for line in answer.lines] == ["a", "b"]
    assert (answer.code, answer.err) == (2, "line 3 of stdin is not in UTF-8; convert it")


def test_texts_that_are_too_long_are_cut_and_counted_or_refused(typed, tmp_path) -> None:
    texts = ("a", "a a a a a a a", "b b b b b b b b b")
    answer = typed(CountingModel("embedding"), *texts, "--json")
    assert [record["embedding"] for record in records(answer)] == [[1, 0], [6, 0], [0, 6]]
    assert answer.err == "2 texts were cut to 8 tokens"
    assert typed(CountingModel("embedding"), *texts, "--json", "-q").err == ""
    answer = typed(CountingModel("embedding"), *texts, "--no-truncate")
    assert answer.code == 2
    assert answer.err.startswith("text 2 has 9 tokens, the model takes at most 8; shorten it")
    answer = typed(CountingModel("embedding"), *texts, "--json", "-o", str(tmp_path / "x.npy"))
    assert json.loads(answer.out) == {"output": str(tmp_path / "x.npy"), "texts": 3, "cut": 2}


# Where answers go


def lines_of(count: int) -> bytes:
    return b"".join(b"a " * (number % 5) + b"b\n" for number in range(count))


def want_of(count: int) -> list[list[int]]:
    return [[number % 5, 1] for number in range(count)]


def test_files_hold_every_answer_in_order(typed, tmp_path) -> None:
    count = 2000
    for name in ("x.npy", "x.npz", "x.jsonl"):
        answer = typed(
            CountingModel("embedding"), "-o", str(tmp_path / name), stdin=lines_of(count)
        )
        assert (answer.code, answer.out.split()[-1]) == (0, "0"), answer.err
    assert np.load(tmp_path / "x.npy").tolist() == want_of(count)
    assert np.load(tmp_path / "x.npz")["embeddings"].tolist() == want_of(count)
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert [json.loads(line)["embedding"] for line in lines] == want_of(count)


def test_scores_of_all_labels_are_a_row_of_an_array(typed, tmp_path) -> None:
    model = CountingModel("sequence-classification", ("b", "a"))
    assert typed(model, "a a", "b", "-o", str(tmp_path / "x.npz")).code == 0
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["labels"].tolist() == ["b", "a"]
        want = 1 / (1 + np.exp([-2, 1]))
        np.testing.assert_allclose(arrays["scores"], np.stack([want, 1 - want], 1), rtol=1e-6)


def test_outputs_that_cannot_be_are_refused_before_a_model_is_loaded(typed, tmp_path) -> None:
    model = CountingModel("embedding")
    assert "is no file of answers; name it .npy" in typed(model, "a", "-o", "out.txt").err
    path = tmp_path / "x.jsonl"
    path.write_text('"a"\n')
    answer = typed(model, "--input", str(path), "-o", str(path))
    assert answer.err == f"'{path}' is the input too; choose another output"
    assert path.read_text() == '"a"\n' and not model.closed
    answer = typed(model, "a", "-o", str(tmp_path / "none" / "x.npy"))
    assert answer.code == 1 and "x.npy': No such file or directory; choose another" in answer.err
    tagger = CountingModel("token-classification")
    answer = typed(tagger, "a", "-o", str(tmp_path / "x.npy"))
    assert ".npy cannot hold these answers; name it .jsonl" in answer.err


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.jsonl"])
def test_ctrl_c_keeps_what_is_written(typed, tmp_path, monkeypatch, name) -> None:
    def stopped(texts):
        for number, text in enumerate(texts):
            if number == 2500:
                raise KeyboardInterrupt
            yield text

    reading = run.text_files.of_file
    monkeypatch.setattr(run.text_files, "of_file", lambda *words: stopped(reading(*words)))
    model = CountingModel("embedding")
    answer = typed(model, "-o", str(tmp_path / name), stdin=lines_of(4000))
    assert (answer.code, answer.err, model.closed) == (130, "stopped", True)
    if name == "x.jsonl":
        lines = (tmp_path / name).read_text().splitlines()
        rows = [json.loads(line)["embedding"] for line in lines]
    else:
        array = np.load(tmp_path / name)
        rows = (array if name == "x.npy" else array["embeddings"]).tolist()
    # of 2,016 texts in whole windows all but the two windows that are still alive
    assert len(rows) == 992 and rows == want_of(992)


def test_memory_does_not_grow_with_the_number_of_texts(typed, tmp_path) -> None:
    def peak(count: int) -> int:
        stdin = lines_of(count)
        tracemalloc.start()
        answer = typed(CountingModel("embedding"), "-o", str(tmp_path / "x.npy"), stdin=stdin)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert answer.code == 0
        return most - len(stdin)  # which the test holds

    peak(100)  # imports
    few = peak(4000)  # the last three windows are full ones
    # Two or three windows are alive at the fullest moment, as the threads happen to run.
    assert peak(16000) < 1.6 * few


def test_a_reader_that_goes_away_ends_the_run(bundle, monkeypatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            if "text" in self.getvalue():
                raise BrokenPipeError
            return super().write(text)

        def fileno(self) -> int:
            return descriptor

    model = CountingModel("embedding")
    monkeypatch.setattr(loader, "load", lambda *_, **__: model)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines_of(4000))))
    with open(bundle / "stdout", "w") as file:
        descriptor = file.fileno()
        monkeypatch.setattr("sys.stdout", Gone())
        assert main.main(["run", str(bundle), "--json"]) == 141
    assert model.closed and model.calls < 4000


def test_help_says_the_words_of_the_text_room() -> None:
    _, parsers = main._parser("run")
    text = parsers["run"].format_help()
    assert "|".join(AGGREGATIONS) in text and "the texts:" in text and "what is asked:" in text


def test_run_imports_no_compiler_and_no_framework(bundle) -> None:
    import subprocess

    code = (
        "import sys; from bertile.cli import answers, result_files, run\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'tvm', 'torch', 'transformers',"
        " 'onnx', 'onnxruntime', 'sentence_transformers'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
