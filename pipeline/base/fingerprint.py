"""Content hashes: of files, of what a stage's result depends on in Bertile's own source."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
from functools import cache
from pathlib import Path


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
def source_hash(module: str) -> str:
    """SHA-256 of a bertile module's source and of all bertile modules that it reaches by import."""
    if _source_file(module) is None:
        raise ValueError(f"there is no module {module}")
    digest, seen, queue = hashlib.sha256(), set(), [module]
    while queue:
        name = queue.pop()
        file = _source_file(name)
        if name in seen or file is None:
            continue
        seen.add(name)
        queue.extend(_imports(name, file))
    for name in sorted(seen):
        digest.update(f"{name}\0{_hash_file(_source_file(name))}\n".encode())
    return digest.hexdigest()


def _imports(name: str, file: Path) -> list[str]:
    found = [name.rpartition(".")[0]] if "." in name else []
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from bertile.passes import fuse_qkv` names a module or something within one
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [one for one in found if one.split(".")[0] == "bertile"]


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
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
