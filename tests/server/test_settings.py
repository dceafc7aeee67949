"""What a server may take is checked before it starts; models have names."""

from __future__ import annotations

from pathlib import Path

import pytest

from bertile.errors import UsageError
from bertile.server.model_list import read_list
from bertile.server.settings import RESERVED, Settings, model_names


def test_names_are_those_of_directories_or_others() -> None:
    names = model_names(["out/minilm", "big=/models/large/", "/a/b/c/", "minilm-2=minilm"])
    assert names == {
        "minilm": "out/minilm",
        "big": "/models/large/",
        "c": "/a/b/c/",
        "minilm-2": "minilm",
    }


@pytest.mark.parametrize(
    "words", [["a/x", "b/x"], ["v1=a"], ["=a"], ["a="], ["a/b=c"], ["embed"], [".."], ["/"]]
)
def test_names_that_cannot_be_are_refused(words) -> None:
    with pytest.raises(UsageError):
        model_names(words)


def test_no_route_can_be_the_name_of_a_model() -> None:
    pytest.importorskip("uvicorn", reason="the server needs the extra serve")
    from bertile.server.application import ROUTES

    assert {route.path.split("/")[1] for route in ROUTES} - {"", "invocations"} <= RESERVED


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_client_batch_size": 0},
        {"workers": 0},
        {"payload_limit": -1},
        {"grace": -1.0},
        {"default_prompt": "a", "default_prompt_name": "b"},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong) -> None:
    with pytest.raises(UsageError):
        Settings(**wrong)


def test_settings_go_to_another_process_and_show_no_key() -> None:
    settings = Settings(api_key="secret", admin_key="hidden", workers=2)
    assert Settings(**settings.to_json()) == settings
    assert "secret" not in repr(settings) and "hidden" not in repr(settings)


def test_list_names_directories_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "models.txt"
    file.write_text("# all of them\n\nminilm=3\nout/a\nb=/abs/b  # the second\n")
    assert read_list(file) == {
        "minilm": str(tmp_path / "3"),
        "a": str(tmp_path / "out/a"),
        "b": "/abs/b",
    }
    file.write_text("# none\n")
    with pytest.raises(UsageError, match="names no model"):
        read_list(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_list(tmp_path / "nowhere")
