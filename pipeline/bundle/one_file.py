"""Joins the modules of `bertile.loading` into the two files that load a bundle without Bertile.

before    loading/errors.py    class InputError …
          loading/inputs.py    from bertile.loading.errors import InputError
                               def check_inputs …

after     loader.py            # -- errors …
                               class InputError …

                               # -- inputs …
                               def check_inputs …

All modules get one namespace, so that what would be told apart by the name of a module alone is
refused: see `join`.
"""

from __future__ import annotations

import ast
import builtins
import symtable
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from bertile.loading import (
    about,
    again,
    batch,
    blocks,
    boxes,
    command,
    dispatch,
    errors,
    exits,
    files,
    inputs,
    interface,
    manifest,
    memory,
    model,
    padding,
    platform,
    pool,
    ragged,
    runtime,
    stream,
    threads,
    tvm_abi,
    weights,
)
from bertile.loading.cuda import (
    borrowed,
    code,
    device_array,
    driver,
    extents,
    gpu,
    graph,
    layout,
    plan,
    request,
    workspace,
)
from bertile.loading.cuda import model as cuda_model

# Each module imports from those before it; what runs as a command is the last.
LOADER = (
    *(
        errors,
        memory,
        exits,
        blocks,
        batch,
        ragged,
        boxes,
        inputs,
        padding,
        interface,
        manifest,
        files,
        weights,
        platform,
        threads,
    ),
    *(tvm_abi, runtime, pool, stream, about, again, model, dispatch, command),
)
CUDA_LOADER = (
    *(extents, driver, gpu, layout, plan, code, graph, workspace, device_array, borrowed),
    *(request, cuda_model),
)

_HEAD = '''"""Loads a bundle; its calls take token ids and give numpy arrays.

Needs numpy and the libraries in the bundle's runtime/ (or those of the package apache-tvm), and no
Bertile: `python loader.py` runs the bundle that this file lies in. It is joined from the modules of
bertile.loading, under their names.
"""
'''
_CUDA_HEAD = '''"""Loads a bundle for an NVIDIA GPU; its calls take token ids and give numpy arrays.

Needs numpy, the driver's own library (libcuda.so.1) and the loader.py beside it, which calls it.
It is joined from the modules of bertile.loading.cuda, under their names.
"""
'''
_NUMPY = "import numpy as np\n"
_NUMPY_OR_A_SENTENCE = """try:
    import numpy as np
except ImportError:  # `python loader.py` on a bare machine gets a sentence, not a traceback
    if __name__ != "__main__":
        raise
    print("loader.py: the package numpy is missing; install it with: pip install numpy")
    sys.exit(3)
"""
_WIDTH = 100

# What an import binds: (module, "") or (module, name in it).
_Origin = tuple[str, str]


@cache
def loader() -> str:
    """The text of the `loader.py` of a bundle."""
    return join(_HEAD, _texts(LOADER)).replace(_NUMPY, _NUMPY_OR_A_SENTENCE, 1)


@cache
def cuda_loader() -> str:
    """The text of the `cuda_loader.py` of a bundle; it imports from the `loader.py` beside it."""
    return join(_CUDA_HEAD, _texts(CUDA_LOADER), {"loader": _texts(LOADER)})


def join(
    head: str,
    texts: Mapping[str, str],
    beside: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """Return one file of the modules with these names and texts, below the docstring `head`.

    `beside` has, by their names, the files that will lie beside the new one, as the texts of their
    modules: what the new file needs of those, it imports from there. An `if __package__:` is left
    out, since it holds what only the package does. Raises ValueError for

    - a name that two modules give to different things, or that is one of Python's own;
    - an import of ours that is not `from MODULE import NAME` at the top of a module, without `as`,
      or whose module neither stands further up nor in a file beside.
    """
    homes: dict[str, tuple[str, set[str]]] = {}  # of our modules: the file ("" for this), the names
    for file, others in (beside or {}).items():
        homes.update({name: (file, _read(name, text).names) for name, text in others.items()})
    meanings: dict[str, tuple[_Origin, str]] = {}  # of a name: what it is, the module that says so
    imports: dict[str, _Origin] = {}
    bodies = []
    for name, text in texts.items():
        module = _read(name, text)
        for bound, origin in module.imports.items():
            if _is_ours(origin[0]):
                file = _home(name, origin, homes)
                if not file:
                    continue
                origin = file, bound
            _give(meanings, bound, origin, name)
            imports[bound] = origin
        for bound in sorted(module.names):
            _give(meanings, bound, (name, bound), name)
        homes[name] = "", module.names
        bodies.append(module.body)
    lines = _import_lines(imports, beside or ())
    return f"{head}\nfrom __future__ import annotations\n\n{lines}\n" + "\n\n".join(bodies)


def _home(module: str, origin: _Origin, homes: Mapping[str, tuple[str, set[str]]]) -> str:
    """The file in which a name of ours is; raises ValueError where it is in none."""
    source, bound = origin
    if source not in homes:
        raise ValueError(
            f"{module} imports {bound} from {source}, which is no module that stands before it"
        )
    file, names = homes[source]
    if bound not in names:
        raise ValueError(f"{module} imports {bound} from {source}, which does not define it")
    return file


def _give(
    meanings: dict[str, tuple[_Origin, str]], bound: str, origin: _Origin, module: str
) -> None:
    """Note what a name means in a module; raises ValueError where it means something else."""
    if hasattr(builtins, bound):
        raise ValueError(f"{module} gives the name {bound}, which is Python's own; choose another")
    before, other = meanings.setdefault(bound, (origin, module))
    if before != origin:
        raise ValueError(f"{module} and {other} both have a {bound}; rename one of them")


class _Module(NamedTuple):
    imports: dict[str, _Origin]  # at its top, by the names that they bind
    names: set[str]  # that it defines
    body: str  # a heading, its docstring as a comment, and what follows the imports


def _read(name: str, text: str) -> _Module:
    tree = ast.parse(text, name)
    docstring = ast.get_docstring(tree)
    imports: dict[str, _Origin] = {}
    end = 0
    for number, node in enumerate(tree.body):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.update(_bound(name, node))
        elif number or not docstring:
            break
        end = node.end_lineno
    dropped = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__package__" and not node.orelse
        for line in range(node.lineno, node.end_lineno + 1)
    }
    for node in ast.walk(tree):
        late = isinstance(node, (ast.Import, ast.ImportFrom)) and node.lineno > end
        if late and node.lineno not in dropped and any(map(_is_ours, _sources(node))):
            raise ValueError(f"{name} imports ours in line {node.lineno}, not at its top")
    lines = text.splitlines()
    kept = [lines[at - 1] for at in range(end + 1, len(lines) + 1) if at not in dropped]
    heading = [f"# -- {name.rpartition('.')[2]} ".ljust(96, "-")]
    heading += [f"# {line}".rstrip() for line in (docstring or "").splitlines()]
    table = symtable.symtable(text, name, "exec")
    names = {symbol.get_name() for symbol in table.get_symbols() if _is_defined(symbol)}
    return _Module(imports, names, "\n".join([*heading, *kept]).rstrip("\n") + "\n")


def _bound(module: str, node: ast.Import | ast.ImportFrom) -> dict[str, _Origin]:
    """What an import binds; raises ValueError where that is ours, and not simply a name."""
    origins: dict[str, _Origin] = {}
    for alias, source in zip(node.names, _sources(node)):
        named = isinstance(node, ast.ImportFrom)
        if _is_ours(source) and (not named or alias.asname or alias.name == "*"):
            raise ValueError(
                f"{module} has '{ast.unparse(node)}'; of ours it may import names alone, as in "
                "'from bertile.loading.errors import InputError'"
            )
        if source != "__future__":
            bound = alias.asname or alias.name.partition(".")[0]
            origins[bound] = (source, alias.name if named else "")
    return origins


def _sources(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The module of each name of an import; of a relative one a name that begins with a dot."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return ["." * node.level + (node.module or "")] * len(node.names)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("bertile", "")


def _is_defined(symbol: symtable.Symbol) -> bool:
    return (symbol.is_assigned() or symbol.is_namespace()) and not symbol.is_imported()


def _import_lines(imports: Mapping[str, _Origin], beside: Collection[str]) -> str:
    """The imports in the order of ruff: of the standard library, numpy, the files beside."""
    sections: list[list[str]] = [[], [], []]
    names: dict[str, list[str]] = {}
    for bound, (source, name) in imports.items():
        section = sections[2 if source in beside else source == "numpy"]
        if name:
            names.setdefault(source, []).append(name if name == bound else f"{name} as {bound}")
        else:
            section.append(f"import {source}" + (f" as {bound}" if bound != source else ""))
    for section in sections:
        section.sort()
    for source in sorted(names):
        sections[2 if source in beside else 0].append(_import_line(source, names[source]))
    return "\n".join("".join(f"{line}\n" for line in section) for section in sections if section)


def _import_line(source: str, names: list[str]) -> str:
    names = sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    line = f"from {source} import {', '.join(names)}"
    if len(line) <= _WIDTH:
        return line
    return f"from {source} import (\n" + "".join(f"    {name},\n" for name in names) + ")"


def _texts(modules: tuple[ModuleType, ...]) -> dict[str, str]:
    return {
        module.__name__: Path(module.__file__).read_text(encoding="utf-8") for module in modules
    }
