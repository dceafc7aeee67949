"""Runs `bertile doctor`: what Bertile needs, what is there, and what to do about the rest."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from bertile.base import scratch, version_ranges
from bertile.base.errors import BertileError, PlatformError
from bertile.base.progress import Progress
from bertile.base.tables import size, table
from bertile.base.version_ranges import VersionRange
from bertile.cli.command import Outcome
from bertile.cli.config_flags import cache_directory

# The extras that are named after what a person does with them.
EXTRAS = ("compile", "export", "run")
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
        *((name, lambda ranges=ranges: _package(ranges)) for name, ranges in _ranges().items()),
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
    versions = version_ranges.pythons()
    text = f"{system}; tried: {versions[0]} to {versions[-1]}"
    if f"{sys.version_info[0]}.{sys.version_info[1]}" in versions:
        return Check("python", "ok", text)
    return Check("python", "note", text, f"not tried with this version; use Python {versions[-1]}")


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
    """Pinned: later releases of its ffi crash TVM's tuner, and pip prefers them."""
    pins = version_ranges.packages("device")
    versions = [pin.version() for pin in pins]
    text = ", ".join(
        f"{pin.package} {version or 'missing'}" for pin, version in zip(pins, versions)
    )
    if not any(versions):  # who only loads bundles needs none of it
        return Check("tvm", "note", text, "to compile: pip install 'bertile[compile]'")
    if all(version and pin.holds(version) for pin, version in zip(pins, versions)):
        return Check("tvm", "ok", text)
    return Check("tvm", "fails", text, f"pip install {' '.join(map(str, pins))}")


def _llvm() -> Check:
    if not any(pin.version() for pin in version_ranges.packages("device")):
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
    packages = version_ranges.packages(extra)
    missing = [tried.package for tried in packages if not tried.version()]
    if not missing:
        return Check(extra, "ok", f"all its {len(packages)} packages are here")
    text = ", ".join(f"{package} missing" for package in missing)
    return Check(extra, "note", text, f"to {extra}: pip install 'bertile[{extra}]'")


def _ranges() -> dict[str, list[VersionRange]]:
    """By package what loading a bundle and the extras ask of it, where it is installed."""
    ranges: dict[str, list[VersionRange]] = {}
    try:
        asked = [tried for extra in ("", *EXTRAS) for tried in version_ranges.packages(extra)]
    except PlatformError:  # the rows of the extras say so
        return {}
    for tried in asked:
        if tried.version():
            ranges.setdefault(tried.package, []).append(tried)
    return ranges


def _package(ranges: Sequence[VersionRange]) -> Check:
    """The version of a package beside what is tried; outside of that it may well work."""
    package, version = ranges[0].package, ranges[0].version()
    asked = [f"to {tried.extra or 'load'}: {tried.bounds}" for tried in ranges]
    text = f"{version}; tried {', '.join(asked)}"
    outside = [tried for tried in ranges if not tried.holds(version)]
    if not outside:
        return Check(package, "ok", text)
    return Check(
        package, "note", text, f"{version} is not tried; what is: pip install '{outside[-1]}'"
    )


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
