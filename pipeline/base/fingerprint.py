"""Hashes files, and what a stage's result depends on in Bertile's own source."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from bertile.base.progress import open_bar

BLOCK = 1 << 20
LARGE = 1 << 28  # bytes, which take a slow disk some seconds
_HOLDS = (ast.stmt, ast.ExceptHandler, ast.match_case)  # what statements lie in


def hash_path(path: Path) -> str:
    """SHA-256 of a file, or of a directory's file names and contents (dot files left out)."""
    if path.is_file():
        return _hash_file(path)
    names = sorted(
        name
        for name in (file.relative_to(path).as_posix() for file in path.rglob("*"))
        if not any(part.startswith(".") for part in name.split("/")) and (path / name).is_file()
    )
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{_hash_file(path / name)}\n".encode())
    return digest.hexdigest()


@cache
def source_hash(*modules: str) -> str:
    """SHA-256 of the source of bertile modules and of all bertile modules that they reach."""
    digest = hashlib.sha256()
    for name, file in closure(*modules).items():
        digest.update(f"{name}\0{_hash_file(file)}\n".encode())
    return digest.hexdigest()


@cache
def own_hash(module: str) -> str:
    """SHA-256 of the source of one bertile module, whatever it imports."""
    file = _source_file(module)
    if file is None:
        raise ValueError(f"there is no module {module}")
    return _hash_file(file)


def closure(*modules: str) -> dict[str, Path]:
    """These bertile modules and all that they reach by import, sorted by name, with their files.

    Imports within functions count, those for type checkers alone do not. ValueError for a name
    that is no module.
    """
    for module in modules:
        if _source_file(module) is None:
            raise ValueError(f"there is no module {module}")
    reached: dict[str, Path] = {}
    queue = list(modules)
    while queue:
        name = queue.pop()
        file = _source_file(name)
        if name not in reached and file is not None:
            reached[name] = file
            queue.extend(_imports(name, file))
    return dict(sorted(reached.items()))


@cache
def _imports(name: str, file: Path) -> list[str]:
    names = [name.rpartition(".")[0]] if "." in name else []
    queue: list[ast.AST] = [ast.parse(file.read_bytes())]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from bertile.graph.passes import fuse_qkv` names a module or something within one
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            queue.extend(node.orelse)
        else:  # no expression holds an import
            queue.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, _HOLDS))
    return [name for name in names if name.split(".")[0] == "bertile"]


@cache
def _source_file(module: str) -> Path | None:
    # by paths, since find_spec of a deeper module would import the packages above it
    parts = module.split(".")
    for depth in (2, 1):
        package = ".".join(parts[:depth])
        with contextlib.suppress(ImportError, AttributeError):
            spec = importlib.util.find_spec(package)
            for place in (spec and spec.submodule_search_locations) or ():
                base = Path(place, *parts[depth:])
                for file in (base / "__init__.py", base.with_suffix(".py")):
                    if file.is_file():
                        return file
    return None


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    for block in read_blocks(path):
        digest.update(block)
    return digest.hexdigest()


def read_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a mebibyte at a time; a large file has a bar."""
    size = path.stat().st_size
    with contextlib.ExitStack() as stack, open(path, "rb") as file:
        bar = None
        if size >= LARGE:
            bar = stack.enter_context(open_bar(f"hash {path.name}, MiB", -(-size // BLOCK)))
        while block := file.read(BLOCK):
            yield block
            if bar is not None:
                bar.advance()
