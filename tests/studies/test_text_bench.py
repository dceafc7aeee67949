"""The study of texts: engines take turns, who is missing is said, the tables go into a page."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bertile.base.errors import BertileError, UsageError
from bertile.base.progress import Progress
from bertile.bench.engines import Engine, LeftOut, Source
from bertile.config import Config
from bertile.studies import text_bench, text_calls, text_peers
from bertile.studies.text_calls import Pass


def engine(kind: str, precision: str = "fp32") -> Engine:
    return Engine(f"{kind} {precision}", kind, precision, Source(Path(), model="minilm"))


class Worker:
    """An engine of this process, whose vectors are the true ones."""

    turns: list[str] = []  # noqa: RUF012

    def __init__(self, engine: Engine, threads: int, opener: object) -> None:
        self.engine, self.name, self.pid = engine, engine.name, 1

    def receive(self) -> str:
        if self.engine.kind == "llamacpp":
            raise LeftOut("llamacpp is left out: it is not there")
        return self.name

    def apply(self, function: object, texts: list[str]) -> object:
        self.turns.append(self.name)
        if function is text_calls.whole_list:
            return Pass(np.eye(len(texts), dtype=np.float32), 1.0, 0.01)
        return [1.0] * len(texts)

    def close(self) -> None:
        self.turns.append(f"{self.name} closed")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Engines that are not prepared and have no process; the turns that they had."""
    monkeypatch.setattr(text_peers, "prepared", lambda engine, *rest: (engine, None))
    monkeypatch.setattr(text_bench, "Worker", Worker)
    texts = ["a text", "another one", "the third"]
    monkeypatch.setattr(text_bench, "_corpus", lambda bundle, count: (texts, [8, 9, 40]))
    monkeypatch.setattr(Worker, "turns", [])
    return Worker.turns


def run(against: tuple[str, ...], **choices: object) -> dict:
    choices = {"precisions": ("fp32",), "texts": 3, "rounds": 2, **choices}
    return text_bench.run("minilm", Config(threads=1), Progress(-1), against=against, **choices)


def test_engines_take_turns_and_end(pretended: list[str]) -> None:
    outcome = run(("st-torch", "llamacpp"))
    assert [row["engine"] for row in outcome["rows"]] == ["bertile fp32", "st-torch fp32"]
    assert outcome["notes"] == ["llamacpp is left out: it is not there"]
    first, second = "bertile fp32", "st-torch fp32"
    assert pretended[:5] == [second, first, second, second, first]  # first what is true
    ended = [turn for turn in pretended if turn.endswith("closed")]
    assert len(ended) == 3
    assert outcome["queries"] == 2 * text_bench.QUERY_ROUNDS  # two texts are short enough


@pytest.mark.parametrize("turn", [4, 6])  # in the second round, and among the queries
def test_ctrl_c_keeps_what_was_measured(
    pretended: list[str], monkeypatch: pytest.MonkeyPatch, capsys, turn: int
) -> None:
    apply = Worker.apply

    def stopped(worker: Worker, *arguments: object) -> object:
        if len(pretended) == turn:
            raise KeyboardInterrupt
        return apply(worker, *arguments)

    monkeypatch.setattr(Worker, "apply", stopped)
    text_bench.main(["--precision", "fp32", "--against", "openvino", "--rounds", "2"])
    out = capsys.readouterr().out
    assert "openvino fp32" in out and "Stopped by Ctrl-C" in out


def test_torch_gives_the_true_vectors_where_it_is_no_peer(pretended: list[str]) -> None:
    outcome = run(("openvino",))
    assert [row["engine"] for row in outcome["rows"]] == ["bertile fp32", "openvino fp32"]
    assert pretended.count("st-torch fp32") == 1


def test_without_true_vectors_nothing_is_compared(
    pretended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(engine: Engine, *rest: object) -> tuple:
        if engine.kind == "st-torch":
            raise LeftOut("st-torch is left out: it is not there")
        return engine, None

    monkeypatch.setattr(text_peers, "prepared", prepared)
    with pytest.raises(BertileError, match="st-torch is left out: it is not there"):
        run(("openvino",))


def test_a_precision_that_a_peer_does_not_compute_in_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(LeftOut, match="fastembed bf16 is left out: it computes in fp32, int8"):
        text_peers.prepared(engine("fastembed", "bf16"), Config(), tmp_path, Progress(-1))


@pytest.mark.parametrize(("precision", "hint"), [("fp32", "f32"), ("int8", None)])
def test_openvino_behind_sentence_transformers_computes_as_the_row_says(
    monkeypatch: pytest.MonkeyPatch, precision: str, hint: str | None
) -> None:
    """By itself it would take bfloat16 for float32, where the processor has that."""
    asked: dict[str, Any] = {}
    library = SimpleNamespace(
        __version__="6", SentenceTransformer=lambda *_, **how: asked.update(how)
    )
    packages = {"sentence_transformers": library, "torch": SimpleNamespace(set_num_threads=id)}
    openvino = SimpleNamespace(__version__="2026.4.1-1")
    monkeypatch.setattr(
        text_peers, "require", lambda _, *names: [packages.get(name, openvino) for name in names]
    )
    _, name = text_peers.KINDS["st-openvino"][2](engine("st-openvino", precision), 2)
    settings = asked["model_kwargs"]["ov_config"]
    assert name == "sentence-transformers 6 (OpenVINO 2026.4.1)"
    assert settings.get("INFERENCE_PRECISION_HINT") == hint
    assert settings["INFERENCE_NUM_THREADS"] == 2


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(UsageError, match="engine 'onnx' is unknown"):
        text_bench.main(["--against", "onnx"])


def test_tables_go_into_a_page(
    pretended: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- bench-texts -->\nold\n<!-- /bench-texts -->\n")
    text_bench.main(["--precision", "fp32", "--against", "st-torch", "--into", str(page)])
    text = page.read_text()
    assert "| st-torch fp32 " in text and "old" not in text and "Made by `python -m" in text
    assert "st-torch fp32" in capsys.readouterr().out
