"""The package map, the pins and the house rules that a program can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import wheels
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib")  # part of Python from 3.11 on

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
MAP = PROJECT["tool"]["setuptools"]["package-dir"]


def directory(package: str) -> Path:
    """Where a package of the map lies: the longest mapped name decides, as in setuptools."""
    mapped = max((name for name in MAP if f"{package}.".startswith(f"{name}.")), key=len)
    return ROOT.joinpath(MAP[mapped], *package[len(mapped) :].strip(".").split(".")).resolve()


def sources() -> list[Path]:
    parts = [*MAP.values(), "tests"]
    return sorted(file for part in parts for file in (ROOT / part).rglob("*.py"))


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def test_listed_packages_are_the_packages_of_the_tree() -> None:
    listed = {directory(name) for name in PROJECT["tool"]["setuptools"]["packages"]}
    tree = {file.parent for part in MAP.values() for file in (ROOT / part).rglob("__init__.py")}
    studies = ROOT / MAP["bertile"] / "studies"  # experiments, which are in no wheel
    listed |= {studies.resolve()}
    assert listed == tree
    modules = {file.parent for part in MAP.values() for file in (ROOT / part).rglob("*.py")}
    assert modules <= tree, "a directory with modules lacks its __init__.py"


def test_no_file_imports_a_package_by_its_directory() -> None:
    wrong = []
    for file in sources():
        for node in ast.walk(ast.parse(file.read_bytes())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                imported = [node.module or ""] if not node.level else ["relative"]
            if {name.split(".")[0] for name in imported} & {*MAP.values(), "relative"}:
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []


def test_every_module_says_what_it_is() -> None:
    bare = [
        file
        for file in sources()
        if file.read_bytes().strip() and not ast.get_docstring(ast.parse(file.read_bytes()))
    ]
    assert names(bare) == []


def test_every_module_opens_with_what_it_does() -> None:
    """One active sentence, "Chooses the layers that …", not what comes in and goes out."""
    passive = []
    for part in ("pipeline", "schedules"):
        for file in sorted((ROOT / part).rglob("*.py")):
            first = (ast.get_docstring(ast.parse(file.read_bytes())) or "").split(" ")[0]
            if not re.fullmatch(r"[A-Z][a-z]+s,?", first):
                passive.append(file)
    assert names(passive) == []


def test_ruff_finds_nothing() -> None:
    pytest.importorskip("ruff")
    for command in (["check"], ["format", "--check"]):
        line = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
        run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout


def asked() -> list[Requirement]:
    """All requirements, those of Bertile's own extras aside."""
    project = PROJECT["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    every = [Requirement(line) for requirements in lists for line in requirements]
    return [requirement for requirement in every if requirement.name != "bertile"]


def test_base_needs_numpy_alone() -> None:
    assert [Requirement(line).name for line in PROJECT["project"]["dependencies"]] == ["numpy"]


def test_tvm_alone_is_pinned_and_the_rest_has_two_ends() -> None:
    ends = {r.name: sorted(bound.operator for bound in r.specifier) for r in asked()}
    pinned = {name for name, operators in ends.items() if operators == ["=="]}
    assert pinned == {"apache-tvm", "apache-tvm-ffi", "bertile-runtime"}
    ranged = {name: operators for name, operators in ends.items() if name not in pinned}
    assert {name for name, operators in ranged.items() if operators != ["<", ">="]} == set()


def test_extras_agree_on_versions() -> None:
    versions: dict[str, set[str]] = {}
    for extra in PROJECT["project"]["optional-dependencies"].values():
        for requirement in map(Requirement, extra):
            versions.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert {name: ranges for name, ranges in versions.items() if len(ranges) > 1} == {}


def test_constraints_lie_within_the_ranges_and_leave_nothing_open() -> None:
    pins = dict(
        line.split("==")
        for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
    wanted = [requirement for requirement in asked() if requirement.name != "bertile-runtime"]
    assert {r.name for r in wanted} <= set(pins)
    assert [str(r) for r in wanted if not r.specifier.contains(pins[r.name])] == []


def test_makefile_installs_everything_under_the_constraints() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"CONSTRAINTS := {CONSTRAINTS.relative_to(ROOT)}\n" in text
    assert re.search(r"^PIP := .*pip install.* -c \$\(CONSTRAINTS\)$", text, re.MULTILINE)
    assert text.count("pip install") == 1


def test_changelog_begins_with_the_version_of_the_package() -> None:
    first = re.search(r"^## (\S+) - \d{4}-\d\d-\d\d$", CHANGELOG, re.MULTILINE)
    assert first and first[1] == PROJECT["project"]["version"]
    assert CHANGELOG.index("## ") == first.start()


def test_issue_templates_are_forms() -> None:
    yaml = pytest.importorskip("yaml")
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 4
    for form in forms:
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        if form.stem != "config":
            assert {"name", "description", "body"} <= set(content)
            assert all({"type", "attributes"} <= set(part) for part in content["body"])


def test_importing_bertile_imports_nothing_heavy() -> None:
    code = "import bertile, sys; print({'numpy', 'tvm', 'torch', 'onnx'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_wheel_holds_every_module_the_c_loader_and_the_tuning_logs(tmp_path: Path) -> None:
    wheel = wheels.build(tmp_path, MAP.values())
    with zipfile.ZipFile(wheel) as file:
        packed = set(file.namelist())
    wanted = set()
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        for file in (*directory(package).glob("*.py"), *_data(package)):
            inside = file.relative_to(directory(package)).as_posix()
            wanted.add(f"{package.replace('.', '/')}/{inside}")
    assert wanted <= packed
    assert not [name for name in packed if name.split("/")[0] in ("pipeline", "schedules", "tests")]
    assert not [name for name in packed if "studies" in name or name.endswith((".md", ".svg"))]
    assert wheel.name == f"bertile-{PROJECT['project']['version']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        (about,) = (name for name in packed if name.endswith("METADATA"))
        description = file.read(about).decode().partition("\n\n")[2]
    assert 500 < len(description) < 4000 and "](" not in description  # no links into the checkout


def _data(package: str) -> list[Path]:
    pattern = {"bertile.tuning_logs": "*.json*", "bertile": "native/**/*.*"}.get(package)
    files = directory(package).rglob(pattern) if pattern else ()
    return [path for path in files if path.is_file()]
