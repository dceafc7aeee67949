"""The doctor: every check answers, every problem has a remedy, what blocks is exit code 3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bertile.base.errors import PlatformError
from bertile.cli import doctor, main
from bertile.targets import linker


def by_name(checks: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


def test_examine_looks_at_everything(tmp_path: Path) -> None:
    checks = by_name(doctor.examine(str(tmp_path)))
    assert set(checks) >= {"python", "cpu", "cores", "tvm", "llvm", "linker", "compile", "cache"}
    assert str(tmp_path) in checks["cache"].detail
    assert {check.status for check in checks.values()} <= {"ok", "note", "fails"}
    assert all(check.remedy for check in checks.values() if check.status != "ok")


def test_wrong_pin_fails_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "0.1.15.post2")
    check = doctor._tvm()
    assert check.status == "fails" and "apache-tvm-ffi 0.1.15.post2" in check.detail
    assert "apache-tvm-ffi==0.1.14.post1" in check.remedy


def test_who_only_runs_bundles_needs_no_tvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    for check in (doctor._tvm(), doctor._llvm()):
        assert (check.status, check.remedy) == (
            "note",
            "to compile: pip install 'bertile[compile]'",
        )


def test_pins_are_those_of_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for name, version in doctor.PINS.items():
        assert f'"{name}=={version}"' in text


def test_missing_linker_is_a_check_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(row: object) -> list[str]:
        raise PlatformError("no linker was found", "pip install ziglang")

    monkeypatch.setattr(linker, "link_command", none)
    check = doctor._safely("linker", doctor._linker)
    assert (check.status, check.remedy) == ("fails", "pip install ziglang")


def test_linker_that_cannot_link_fails_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linker, "link_command", lambda row: ["python3", "-c", "raise OSError('x')"])
    check = doctor._safely("linker", doctor._linker)
    assert check.status == "fails" and "OSError: x" in check.detail


def test_missing_extra_is_a_note_with_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version_of_module", lambda module: None)
    check = doctor._extra("export")
    assert check.status == "note" and "torch missing" in check.detail
    assert check.remedy == "to export: pip install 'bertile[export]'"


def test_thread_variables_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert doctor._thread_variables().status == "ok"
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    check = doctor._thread_variables()
    assert check.status == "note" and "TVM_NUM_THREADS=1" in check.detail


def test_little_room_in_the_cache_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "CACHE_ROOM", 10**18)
    assert doctor._cache(tmp_path / "new" / "cache").status == "note"


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("note", 0), ("fails", 3)])
def test_command_exits_with_3_when_something_blocks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, status: str, code: int
) -> None:
    checks = [doctor.Check("linker", status, "found", "do this" if status != "ok" else "")]
    monkeypatch.setattr(doctor, "examine", lambda cache_dir: checks)
    assert main.main(["doctor"]) == code
    assert ("linker: do this" in capsys.readouterr().out) == (status != "ok")
    assert main.main(["doctor", "--json"]) == code
    (row,) = json.loads(capsys.readouterr().out)
    assert list(row.items())[:3] == [("name", "linker"), ("status", status), ("found", "found")]
