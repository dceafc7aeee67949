"""`bertile.loading` needs numpy alone and looks one way; `bertile.load` stays what it is."""

from __future__ import annotations

import ast
import itertools
import sys
from pathlib import Path

import pytest
from helpers import tiny_bundle

import bertile
from bertile import cuda_loader, loader, loading
from bertile.bundle import one_file

PLACE = Path(loading.__file__).parent
FILES = [path for path in PLACE.rglob("*.py") if path.name != "__init__.py"]


def imports(path: Path) -> list[str]:
    """The modules that a file imports, within functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PLACE).as_posix())
def test_module_imports_numpy_the_standard_library_and_modules_further_down(path):
    order = [module.__name__ for module in (*one_file.LOADER, *one_file.CUDA_LOADER)]
    own = ".".join(("bertile", "loading", *path.relative_to(PLACE).with_suffix("").parts))
    ours = {name for name in imports(path) if name.startswith("bertile")}
    if own == "bertile.loading.dispatch":  # finds the model for a GPU only once there is one
        ours.remove("bertile.loading.cuda")
    assert ours <= set(order[: order.index(own)])
    tops = {name.partition(".")[0] for name in imports(path)} - {"bertile"}
    assert tops <= {"numpy", *sys.stdlib_module_names}


def test_modules_for_gpus_do_not_need_what_loads_any_bundle():
    """`dispatch` imports them when it needs them: the other way round would be a circle."""
    circle = [path for path in FILES if "bertile.loading.dispatch" in imports(path)]
    assert [path.name for path in circle] == ["command.py"]


def test_public_modules_are_thin():
    for module in (loader, cuda_loader):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        assert not [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


MODULES = ("bertile.loader", "bertile.loading", "bertile.loading.dispatch", "bertile.cuda_loader")


@pytest.mark.parametrize("asked", [False, True], ids=["asked after", "asked before"])
@pytest.mark.parametrize("order", list(itertools.permutations(MODULES, 2)), ids=" then ".join)
def test_load_stays_the_function_whatever_is_imported_first(order, asked):
    code = f"""
import importlib, types, bertile
def check():
    assert isinstance(bertile.load, types.FunctionType), bertile.load
    assert bertile.load.__module__ == "bertile.loading.dispatch"
if {asked}:
    check()
for name in {order!r}:
    importlib.import_module(name)
check()
from bertile import load
assert load is bertile.load is importlib.import_module("bertile.loader").load
assert isinstance(bertile.loading, types.ModuleType)
"""
    tiny_bundle.python(code)


def test_public_modules_share_errors_and_the_function():
    assert loader.load is bertile.load and loader.Model is not cuda_loader.Model
    assert cuda_loader.BertileError is loader.BertileError
