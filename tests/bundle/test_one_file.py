"""Modules are joined into one file that means the same, or are refused by name."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from bertile import cuda_loader, loader, loading
from bertile.bundle import one_file, writer

JOINED = {"loader.py": one_file.loader, "cuda_loader.py": one_file.cuda_loader}
PUBLIC = {"loader.py": loader, "cuda_loader.py": cuda_loader}
PARTS = {"loader.py": one_file.LOADER, "cuda_loader.py": one_file.CUDA_LOADER}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """What a bundle for a GPU gets."""
    place = tmp_path_factory.mktemp("joined")
    writer.include_loaders(place)
    return place


def imported(path: Path) -> ModuleType:
    spec = spec_from_file_location(f"joined_{path.stem}", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", JOINED)
def test_bundle_has_the_joined_file_byte_for_byte_whoever_joins_it(name, directory):
    code = (
        "import sys; from bertile.bundle import one_file;"
        f" sys.stdout.buffer.write(one_file.{Path(name).stem}().encode())"
    )
    for seed in ("0", "1"):
        again = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        )
        assert again.stdout == (directory / name).read_bytes()


@pytest.mark.parametrize("name", JOINED)
def test_every_public_name_and_every_definition_is_in_the_file(name, directory, monkeypatch):
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.delitem(sys.modules, "loader", raising=False)
    module = imported(directory / name)
    monkeypatch.delitem(sys.modules, "loader", raising=False)
    assert [public for public in PUBLIC[name].__all__ if not hasattr(module, public)] == []
    assert len(PUBLIC[name].__all__) > 30
    for part in PARTS[name]:
        own = {key for key, value in vars(part).items() if _is_of(value, part)}
        assert own and own <= set(vars(module)), part.__name__


def _is_of(value: object, module: ModuleType) -> bool:
    return getattr(value, "__module__", None) == module.__name__


def test_every_module_of_the_package_is_in_a_file():
    place = Path(loading.__file__).parent
    files = {path for path in place.rglob("*.py") if path.name != "__init__.py"}
    assert {Path(module.__file__) for module in (*one_file.LOADER, *one_file.CUDA_LOADER)} == files


@pytest.mark.parametrize("name", JOINED)
def test_file_is_python_3_9_and_has_neither_our_imports_nor_a_branch_for_the_package(name):
    text = JOINED[name]()
    tree = ast.parse(text, feature_version=(3, 9))
    compile(text, name, "exec")
    assert "__package__" not in text
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level and node.module.partition(".")[0] != "bertile"
    headings = [line.split()[2] for line in text.splitlines() if line.startswith("# -- ")]
    assert headings == [part.__name__.rpartition(".")[2] for part in PARTS[name]]


@pytest.mark.parametrize("name", JOINED)
def test_file_is_as_tidy_as_what_it_is_made_of(name, directory):
    pytest.importorskip("ruff")
    config = Path(__file__).parents[2] / "pyproject.toml"
    for command in (["check", "--ignore=I001"], ["format", "--check"]):
        line = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", str(config)]
        done = subprocess.run([*line, str(directory / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


# -- joining -----------------------------------------------------------------------------------

ERRORS = '''"""Names errors."""

from __future__ import annotations

class Broken(Exception):
    pass
'''
READ = '''"""Reads a file.

And says what it reads.
"""

import os
from pathlib import Path

import numpy as np

from bertile.a.errors import Broken

LIMIT = 3  # bytes


def read(path):
    """Return it."""
    import json

    if __package__:
        from bertile.b import other

        return other
    raise Broken(os.fspath(Path(path)), json, np)
'''
JOINED_TEXT = '''"""Head."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

# -- errors ------------------------------------------------------------------------------------
# Names errors.

class Broken(Exception):
    pass


# -- read --------------------------------------------------------------------------------------
# Reads a file.
#
# And says what it reads.

LIMIT = 3  # bytes


def read(path):
    """Return it."""
    import json

    raise Broken(os.fspath(Path(path)), json, np)
'''


def test_join_hoists_imports_and_keeps_everything_else():
    texts = {"bertile.a.errors": ERRORS, "bertile.a.read": READ}
    assert one_file.join('"""Head."""\n', texts) == JOINED_TEXT


def test_join_imports_from_the_file_beside_what_that_has():
    text = one_file.join(
        '"""Head."""\n', {"bertile.read": READ}, {"e": {"bertile.a.errors": ERRORS}}
    )
    assert "\nimport numpy as np\n\nfrom e import Broken\n" in text
    assert "class Broken" not in text


REFUSED = {
    "two functions of one name": (
        "def _read():\n    pass\n",
        "def _read():\n    pass\n",
        "bertile.b and bertile.a both have a _read; rename one of them",
    ),
    "a value and a class": ("X = 1\n", "class X:\n    pass\n", "both have a X"),
    "a name within a condition": ("X = 1\n", "if True:\n    X = 2\n", "both have a X"),
    "a function and an import": ("import json\n", "def json():\n    pass\n", "both have a json"),
    "an import and a function": ("def json():\n    pass\n", "import json\n", "both have a json"),
    "two imports of one name": (
        "from os import path\n",
        "from sys import path\n",
        "both have a path",
    ),
    "a name of Python's": ("", "def open():\n    pass\n", "the name open, which is Python's own"),
    "a module": (
        "X = 1\n",
        "from bertile import a\n",
        "imports a from bertile, which is no module that stands before it",
    ),
    "a module as a whole": ("X = 1\n", "import bertile.a\n", "may import names alone"),
    "another name": ("X = 1\n", "from bertile.a import X as Y\n", "may import names alone"),
    "all names": ("X = 1\n", "from bertile.a import *\n", "may import names alone"),
    "a relative import": ("X = 1\n", "from .a import X\n", "no module that stands before it"),
    "a name that is not there": ("X = 1\n", "from bertile.a import Y\n", "does not define it"),
    "a module further down": (
        "from bertile.b import X\n",
        "X = 1\n",
        "bertile.a imports X from bertile.b, which is no module that stands before it",
    ),
    "an import within a function": (
        "X = 1\n",
        "def f():\n    from bertile.a import X\n    return X\n",
        "bertile.b imports ours in line 2, not at its top",
    ),
    "a branch with another": (
        "X = 1\n",
        "if __package__:\n    from bertile.a import X\nelse:\n    X = 2\n",
        "imports ours in line 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_join_refuses_what_would_mean_something_else_in_one_file(case):
    first, second, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        one_file.join('"""Head."""\n', {"bertile.a": first, "bertile.b": second})


def test_join_refuses_a_name_that_the_file_beside_gave_as_well():
    used = "from bertile.a.errors import Broken\n"
    texts = {"bertile.b": used, "bertile.c": "class Broken:\n    pass\n"}
    with pytest.raises(ValueError, match=r"bertile\.c and bertile\.b both have a Broken"):
        one_file.join('"""Head."""\n', texts, {"loader": {"bertile.a.errors": ERRORS}})
