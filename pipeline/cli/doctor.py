"""Runs `bertile doctor`: what Bertile needs, what is there, and what to do about the rest."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from bertile.base import scratch
from bertile.base.errors import BertileError, PlatformError
from bertile.base.progress import Progress
from bertile.base.tables import size, table
from bertile.cli.command import Outcome
from bertile.cli.config_flags import cache_directory

# The stage that each extra serves, and what it imports. bertile's own metadata has the versions.
EXTRAS = {
    "compile": ("onnx", "onnxruntime", "xgboost"),
    "export": ("torch", "transformers", "onnxscript", "safetensors"),
    "run": ("tokenizers",),
}
# Later releases of the second crash TVM's tuner in the first, and pip prefers them.
PINS = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
CACHE_ROOM = 5 * 10**9
THREAD_VARIABLES = ("TVM_NUM_THREADS", "TVM_BIND_THREADS", "OMP_NUM_THREADS")


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing looked at; `status` is ok, note (works, with a limit) or fails."""

    name: str
    status: str
    detail: str
    remedy: str = ""


def add_arguments(parser: ArgumentParser) -> None:
    """Whose free space and right to write are looked at."""
    parser.add_argument("--cache-dir", metavar="DIR", help="where the results of stages are cached")


def run(options: Namespace, progress: Progress) -> Outcome:
    """Exit code 3 where something keeps Bertile from working here."""
    checks = examine(cache_directory(options.cache_dir))
    blocked = any(check.status == "fails" for check in checks)
    data = [
        {"name": c.name, "status": c.status, "found": c.detail, "remedy": c.remedy} for c in checks
    ]
    return Outcome(data, as_text(checks), 3 if blocked else 0)


def examine(cache_dir: str | None = None) -> list[Check]:
    """Look at everything; a check that raises is a failed check, never an exception."""
    checks: list[Check] = []
    for name, look in (
        ("python", _python),
        ("cpu", _cpu),
        ("cores", _cores),
        ("threads", _thread_variables),
        ("tvm", _tvm),
        ("llvm", _llvm),
        ("runtime", _runtime),
        ("linker", _linker),
        ("cuda", _cuda),
        *((extra, lambda extra=extra: _extra(extra)) for extra in EXTRAS),
        ("cache", lambda: _cache(Path(cache_dir or "~/.cache/bertile").expanduser())),
    ):
        checks.append(_safely(name, look))
    return checks


def as_text(checks: list[Check]) -> str:
    """One line per check and, below, one line for each problem with its remedy."""
    lines = [table(("check", "status", "found"), [(c.name, c.status, c.detail) for c in checks])]
    problems = [check for check in checks if check.remedy]
    lines += [f"\n{check.name}: {check.remedy}" for check in problems]
    if not problems:
        lines.append("\nno problems found")
    return "\n".join(lines)


def _safely(name: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except BertileError as error:
        return Check(name, "fails", error.what, error.remedy)
    except Exception as error:  # a broken installation may raise anything
        return Check(name, "fails", f"{type(error).__name__}: {error}", "install it again")


def _python() -> Check:
    system = f"{platform.python_version()} on {platform.machine()}, glibc {platform.libc_ver()[1]}"
    if sys.version_info < (3, 11):
        remedy = "loading bundles works; to compile, use Python 3.11 or later"
        return Check("python", "note", system, remedy)
    return Check("python", "ok", system)


def _cpu() -> Check:
    from bertile.loader import cpu_features
    from bertile.targets.rows import native, of_arch

    row = native()
    best = of_arch(row.arch)[0]
    missing = sorted(set(best.features) - cpu_features())
    without = f"; without {' '.join(missing)}" if missing else ""
    return Check("cpu", "ok", f"{_cpu_name()}: best target {row.name}{without}")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> Check:
    from bertile.loader import available_cores

    usable, present = available_cores(), os.cpu_count() or 1
    return Check("cores", "ok", f"{usable} of {present} may be used")


def _thread_variables() -> Check:
    variables = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    if not variables:
        return Check("threads", "ok", "no environment variable limits the threads")
    text = ", ".join(f"{name}={value}" for name, value in variables.items())
    remedy = f"unset {' '.join(variables)}, unless you mean it; --threads does it for one command"
    return Check("threads", "note", text, remedy)


def _tvm() -> Check:
    versions = {name: _version(name) for name in PINS}
    text = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    if versions == PINS:
        return Check("tvm", "ok", text)
    if not any(versions.values()):  # who only loads bundles needs none of it
        return Check("tvm", "note", text, "to compile: pip install 'bertile[compile]'")
    wanted = " ".join(f"{name}=={version}" for name, version in PINS.items())
    return Check("tvm", "fails", text, f"pip install {wanted}")


def _llvm() -> Check:
    if not any(_version(name) for name in PINS):
        return Check(
            "llvm", "note", "it comes with TVM", "to compile: pip install 'bertile[compile]'"
        )
    # In a process of its own: a broken library may crash, and importing takes a second.
    code = "import tvm.target.codegen as c; print('LLVM', c.llvm_version_major())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    text = run.stdout.strip()
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["TVM cannot be imported"])[-1]
        return Check("llvm", "fails", reason, "pip install 'bertile[compile]'")
    return Check("llvm", "ok", text)


def _runtime() -> Check:
    from bertile.loader import find_runtime

    paths = find_runtime()
    total = sum(os.path.getsize(path) for path in paths)
    return Check("runtime", "ok", f"libtvm_ffi and libtvm_runtime, {size(total)}")


def _linker() -> Check:
    from bertile.targets import linker
    from bertile.targets.rows import TABLE, of_arch

    command = linker.link_command(next(iter(of_arch(platform.machine())), TABLE[0]))
    _link_something(command)
    return Check("linker", "ok", " ".join(command))


def _cuda() -> Check:
    from bertile.codegen.cuda import compiler
    from bertile.targets import detect

    card = detect.gpu()
    runs = card if isinstance(card, str) else card.name
    try:
        return Check("cuda", "ok", f"{compiler.find().name}; {runs}")
    except PlatformError as error:  # nobody needs it who compiles for processors
        return Check("cuda", "note", f"no compiler; {runs}", f"for GPUs: {error.remedy}")


def _link_something(command: list[str]) -> None:
    with scratch.directory() as directory:
        source = Path(directory, "empty.c")
        source.write_text("int bertile_doctor(void) { return 0; }\n", encoding="ascii")
        line = [*command, "-shared", "-fPIC", "-o", str(source.with_suffix(".so")), str(source)]
        run = subprocess.run(line, capture_output=True, text=True, timeout=120)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        remedy = "install a C compiler with its libc headers, or: pip install ziglang"
        raise BertileError(f"{' '.join(command)} does not link: {reason}", remedy)


def _extra(extra: str) -> Check:
    versions = {module: _version_of_module(module) for module in EXTRAS[extra]}
    text = ", ".join(f"{module} {version or 'missing'}" for module, version in versions.items())
    if all(versions.values()):
        return Check(extra, "ok", text)
    return Check(extra, "note", text, f"to {extra}: pip install 'bertile[{extra}]'")


def _cache(directory: Path) -> Check:
    there = next(parent for parent in (directory, *directory.parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    used = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    text = f"{directory}: {size(used)} used, {size(free)} free"
    if not os.access(there, os.W_OK):
        return Check("cache", "fails", f"{there} is not writable", "choose another: --cache-dir")
    if free < CACHE_ROOM:
        return Check("cache", "note", text, "make room, or choose another disk: --cache-dir")
    return Check("cache", "ok", text)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version_of_module(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    return _version(module) or _version(f"{module}-cpu") or "(version unknown)"
