"""The doctor: every check answers, every problem has a remedy, what blocks is exit code 3."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from bertile.base import version_ranges
from bertile.base.errors import PlatformError
from bertile.cli import doctor, main
from bertile.targets import linker


def by_name(checks: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


def test_examine_looks_at_everything(tmp_path: Path) -> None:
    checks = by_name(doctor.examine(str(tmp_path)))
    assert set(checks) >= {"python", "cpu", "cores", "tvm", "llvm", "linker", "compile", "cache"}
    assert set(checks) >= {"numpy", "onnx", "onnxruntime"}
    assert str(tmp_path) in checks["cache"].detail
    assert {check.status for check in checks.values()} <= {"ok", "note", "fails"}
    assert all(check.remedy for check in checks.values() if check.status != "ok")


def here(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Let these packages alone be installed, in these versions."""
    names = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(version_ranges, "_installed", names.get)


def test_wrong_pin_fails_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, apache_tvm="0.27.0.post1", apache_tvm_ffi="0.1.15.post2")
    check = doctor._tvm()
    assert check.status == "fails" and "apache-tvm-ffi 0.1.15.post2" in check.detail
    assert "apache-tvm-ffi==0.1.14.post1" in check.remedy


def test_who_only_runs_bundles_needs_no_tvm(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    for check in (doctor._tvm(), doctor._llvm()):
        assert (check.status, check.remedy) == (
            "note",
            "to compile: pip install 'bertile[compile]'",
        )


def test_version_is_beside_the_range_that_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, numpy="1.26.4", torch="99.0.0+cpu")
    checks = by_name(doctor.examine())
    assert checks["numpy"].status == "ok"
    assert checks["numpy"].detail == "1.26.4; tried to load: >=1.22,<3, to compile: >=1.26,<3"
    assert checks["torch"].status == "note" and "tried to export: >=2" in checks["torch"].detail
    assert "99.0.0+cpu is not tried; what is: pip install 'torch>=2" in checks["torch"].remedy
    assert "onnx" not in checks and "onnx missing" in checks["compile"].detail


def test_numpy_that_loads_but_is_too_old_to_compile_is_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here(monkeypatch, numpy="1.24.2")
    check = by_name(doctor.examine())["numpy"]
    assert check.status == "note" and "pip install 'numpy>=1.26,<3'" in check.remedy


def test_python_that_is_not_tried_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._python().status == "ok"
    monkeypatch.setattr(doctor.sys, "version_info", (3, 99, 0))
    check = doctor._python()
    assert check.status == "note" and "tried: 3.10 to 3." in check.detail and check.remedy


def test_bertile_that_is_not_installed_is_a_check_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(version_ranges.metadata, "metadata", none)
    checks = by_name(doctor.examine())
    assert (checks["compile"].status, checks["compile"].detail) == (
        "fails",
        "bertile is not installed",
    )


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
    here(monkeypatch)
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
