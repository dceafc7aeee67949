"""Every module has a room, no import runs upward, and one place tells kinds of machine apart."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up: a room imports rooms before it in this list, and itself.
ROOMS = (
    "loading",
    "base",
    "schedules",
    "targets",
    "numerics",
    "config",
    "families",
    "text",
    "integrations",
    "server",
    "onnx",
    "export",
    "graph",
    "codegen",
    "tune.estimate",
    "tune.measure",
    "tune.log",
    "tune.search",
    "tune.archive",
    "lower",
    "bundle",
    "run",
    "backends",
    "evaluation",
    "quantize",
    "verify",
    "preflight",
    "driver",
    "compress",
    "bench",
    "report",
    "cli",
    "studies",
)
# Public names of what lies in a room; and what has no room, since it only names things.
FACADES = {
    "bertile.loader": "loading",
    "bertile.cuda_loader": "loading",
    "bertile.errors": "base",
    "bertile.ray": "integrations",
}
ABOVE_ALL = {"bertile", "bertile.__main__", "bertile.tune", "bertile.tuning_logs"}
# Backends of different machines know nothing of each other.
APART = ("bertile.backends.cpu", "bertile.backends.cuda")


def modules() -> dict[str, Path]:
    """Every module of the package, with its file."""
    files = {}
    for folder, package in (("pipeline", "bertile"), ("schedules", "bertile.schedules")):
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return files


MODULES = modules()


def imports(module: str) -> Iterator[str]:
    """The modules that one imports, within functions too."""
    for node in ast.walk(ast.parse(MODULES[module].read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in MODULES or node.module in MODULES:
                    yield inner if inner in MODULES else node.module


def room(module: str) -> str:
    """The room that a module lies in, "" if it has none."""
    if module in FACADES:
        return FACADES[module]
    inside = module.removeprefix("bertile.")
    return next((room for room in ROOMS if f"{inside}.".startswith(f"{room}.")), "")


# The package itself imports nothing but for type checkers: its names load on first use.
EDGES = {module: sorted(set(imports(module)) if module != "bertile" else ()) for module in MODULES}


def test_every_module_has_a_room():
    assert [module for module in MODULES if not room(module) and module not in ABOVE_ALL] == []


def test_every_room_is_there():
    assert set(ROOMS) == {room(module) for module in MODULES} - {""}


def test_no_import_runs_upward():
    upward = [
        f"{module} imports {other}"
        for module, others in EDGES.items()
        for other in others
        if room(module) and room(other) and ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert upward == []


def test_backends_know_nothing_of_each_other():
    mixed = [
        (module, other)
        for module, others in EDGES.items()
        for other in others
        for mine, theirs in (APART, APART[::-1])
        if f"{module}.".startswith(f"{mine}.") and f"{other}.".startswith(f"{theirs}.")
    ]
    assert mixed == []


def test_modules_import_each_other_in_no_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in EDGES[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_every_room_says_what_it_is_for_and_what_it_may_import():
    folders = {room.split(".")[0] for room in ROOMS} - {"config", "driver", "preflight"}
    silent = []
    for name in folders:
        place = ROOT / ("schedules" if name == "schedules" else f"pipeline/{name}")
        text = ast.get_docstring(ast.parse((place / "__init__.py").read_bytes())) or ""
        if not re.search(r"^May import: ", text, flags=re.MULTILINE):
            silent.append(name)
    assert silent == []


@pytest.mark.parametrize("pattern", [r"row\.gpu", r"\barch == ", r'"gpu" in'])
def test_kinds_of_machine_are_told_apart_in_one_place(pattern):
    """Elsewhere a backend is asked; what knows of a GPU already (a folder `cuda`) may use it."""
    may = ("backends", "targets", "loading")
    lines = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in (ROOT / "pipeline").rglob("*.py")
        if file.relative_to(ROOT / "pipeline").parts[0] not in may and not is_of_cuda(file)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert lines == []


def is_of_cuda(file: Path) -> bool:
    return "cuda" in file.parts or file.stem.startswith("cuda")


def test_tests_lie_in_the_rooms_of_what_they_test():
    own = {"helpers", "golden"}
    folders = {path.parts[0] for path in files_of_tests() if len(path.parts) > 1} - own
    assert folders <= {room.split(".")[0] for room in ROOMS}


def test_no_test_imports_another_test():
    imported = []
    for path in files_of_tests():
        for node in ast.walk(ast.parse((ROOT / "tests" / path).read_bytes())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported += [f"{path}: {name}" for name in names if re.match(r"(.*\.)?test_", name)]
    assert imported == []


def files_of_tests() -> list[Path]:
    return [path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("*.py")]
