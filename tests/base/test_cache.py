"""The stage cache: one making per key, whole entries only, oldest pruned first."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bertile.base import cache as cache_module
from bertile.base.cache import Cache, key
from bertile.base.errors import BertileError
from bertile.base.fingerprint import hash_path, source_hash
from bertile.config import Config


def write(text: str = "made"):
    return lambda directory: Path(directory, "file").write_text(text, encoding="utf-8")


def age(cache: Cache, name: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(cache.directory / name, (then, then))


def names(cache: Cache) -> set[str]:
    return {entry.name for entry in cache.directory.iterdir()} - {"locks"}


def test_get_or_make_makes_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "cache")
    first, hit = cache.get_or_make("a", write())
    assert (first / "file").read_text() == "made" and not hit
    second, hit = cache.get_or_make("a", write("other"))
    assert second == first and hit and (second / "file").read_text() == "made"


def test_get_or_make_leaves_nothing_when_making_fails(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        write()(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).get_or_make("a", fail)
    assert names(Cache(tmp_path)) == set()


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_get_or_make_makes_again_when_an_entry_is_not_whole(tmp_path: Path, damage: str) -> None:
    content, _ = Cache(tmp_path).get_or_make("a", write())
    (content / "file").write_text("") if damage == "truncate" else (content / "file").unlink()
    content, hit = Cache(tmp_path).get_or_make("a", write())
    assert not hit and (content / "file").read_text() == "made"


def _make_slowly(directory: str, log: str) -> None:
    def make(content: Path) -> None:
        with open(log, "a", encoding="utf-8") as file:
            file.write("made\n")
        time.sleep(0.3)
        write()(content)

    content, _ = Cache(directory).get_or_make("a", make)
    assert (content / "file").read_text() == "made"


def test_two_processes_make_one_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (str(tmp_path / "cache"), str(tmp_path / "log"))
    processes = [context.Process(target=_make_slowly, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


def test_the_first_to_finish_wins_where_locks_do_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "fcntl", None)

    def make(directory: Path) -> None:
        if not (tmp_path / "a").exists():
            Cache(tmp_path).get_or_make("a", write("first"))
        write("second")(directory)

    content, _ = Cache(tmp_path).get_or_make("a", make)
    assert (content / "file").read_text() == "first"
    assert names(Cache(tmp_path)) == {"a"}


def test_prune_removes_what_was_used_longest_ago(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for number, name in enumerate(("oldest", "used", "new")):
        cache.get_or_make(name, write("x" * 1000))
        age(cache, name, 10**6 - number)
    cache.get_or_make("oldest", write())  # a hit makes it the newest
    age(cache, "oldest", 10**5)
    freed = cache.prune(limit_bytes=2500)
    assert names(cache) == {"oldest", "new"} and 1000 <= freed < 1100


def test_prune_keeps_what_may_be_in_use(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=10)
    cache.get_or_make("a", write("x" * 1000))
    cache.get_or_make("b", write("x" * 1000))
    assert names(cache) == {"a", "b"}


def test_prune_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for name in (".a-killed", ".b-at-work"):
        (tmp_path / name).mkdir()
    age(cache, ".a-killed", 10**6)
    cache.prune()
    assert names(cache) == {".b-at-work"}


def test_full_disk_is_one_message_with_a_remedy(tmp_path: Path) -> None:
    def fill(directory: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(BertileError, match=r"No space left on device; make room or .*--cache-dir"):
        Cache(tmp_path).get_or_make("a", fill)


def test_unwritable_directory_is_one_message_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(BertileError, match="--cache-dir"):
        Cache(tmp_path / "file" / "cache").get_or_make("a", write())


def test_what_make_raises_is_not_blamed_on_the_cache(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Cache(tmp_path).get_or_make("a", lambda directory: open("/no/such/model").close())


def test_key_depends_on_stage_and_parts() -> None:
    base = key("export.exporter", Config(), b"weights", {"a": 1, "b": None})
    assert base == key("export.exporter", Config(), b"weights", {"b": None, "a": 1})
    assert base.startswith("export.exporter-")
    others = [
        key("graph.importer", Config(), b"weights", {"a": 1, "b": None}),
        key("export.exporter", Config(threads=1), b"weights", {"a": 1, "b": None}),
        key("export.exporter", Config(), b"other", {"a": 1, "b": None}),
        key("export.exporter", Config(), b"weights", {"a": "1", "b": None}),
    ]
    assert len({base, *others}) == 5


def test_key_refuses_a_path_since_its_content_may_change() -> None:
    with pytest.raises(TypeError, match="hash it first"):
        key("export.exporter", Path("model.onnx"))


def test_key_refuses_a_stage_that_is_no_module() -> None:
    with pytest.raises(ValueError, match=r"bertile\.exportr"):
        key("exportr")


def test_source_hash_reaches_what_a_module_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bertile.base.fingerprint as fingerprint

    for name, text in (
        ("stage", "def run():\n    from bertile.passes import one\n    import numpy\n"),
        ("passes", ""),
        ("passes.one", "X = 1\n"),
        ("passes.two", "X = 1\n"),
    ):
        (tmp_path / f"bertile.{name}").write_text(text)
    there = lambda name: path if (path := tmp_path / name).is_file() else None  # noqa: E731
    monkeypatch.setattr(fingerprint, "_source_file", there)
    before = source_hash.__wrapped__("bertile.stage")
    (tmp_path / "bertile.passes.two").write_text("X = 2\n")
    assert source_hash.__wrapped__("bertile.stage") == before
    (tmp_path / "bertile.passes.one").write_text("X = 2\n")
    assert source_hash.__wrapped__("bertile.stage") != before


def test_source_files_of_every_package_of_the_map_are_found() -> None:
    from bertile.base.fingerprint import _source_file

    packages = ("bertile.graph.passes", "bertile.schedules.cpu", "bertile.schedules")
    for module in ("bertile.base.cache", "bertile.loading.cuda.model", *packages):
        assert _source_file(module) is not None, module
    assert _source_file("bertile.nothing") is None


def test_hash_path_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_text("1")
    hashes = [hash_path(tmp_path)]
    (tmp_path / ".git").write_text("left out")
    assert hash_path(tmp_path) == hashes[0]
    (tmp_path / "deep" / "a").write_text("2")
    hashes.append(hash_path(tmp_path))
    (tmp_path / "deep" / "a").rename(tmp_path / "deep" / "b")
    hashes.append(hash_path(tmp_path))
    assert len(set(hashes)) == 3
    assert hash_path(tmp_path / "deep" / "b") != hashes[2]


ASK = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

root, *changed = sys.argv[1:]
for name, folder in (("bertile", "pipeline"), ("bertile.schedules", "schedules")):
    place = f"{root}/{folder}"
    spec = spec_from_file_location(name, f"{place}/__init__.py", submodule_search_locations=[place])
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])

from bertile.backends.cpu.backend import CpuBackend
from bertile.backends.cuda.backend import CudaBackend
from bertile.base import cache, fingerprint
from bertile.driver import STAGES

def ask():
    for remembered in (fingerprint.source_hash, fingerprint.own_hash):
        remembered.cache_clear()
    for backend in (CpuBackend, CudaBackend):
        print(cache.key("driver", modules=(*STAGES, *backend.stages)))

ask()
for names in changed:
    before = {Path(root, name): Path(root, name).read_bytes() for name in names.split()}
    for file, text in before.items():
        file.write_bytes(text + b"# a remark\\n")
    ask()
    for file, text in before.items():
        file.write_bytes(text)
"""


@pytest.fixture
def keys(tmp_path: Path) -> Callable[..., list[tuple[str, str]]]:
    """Asks a copy of the package for the keys of a compile (CPU, GPU): as it is, then with the
    files of each argument changed, whose names have spaces between them."""
    root = Path(__file__).parents[2]
    for name in ("pipeline", "schedules"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))

    def ask(*changed: str) -> list[tuple[str, str]]:
        line = [sys.executable, "-c", ASK, str(tmp_path), *changed]
        run = subprocess.run(line, capture_output=True, text=True, check=True)
        lines = run.stdout.split()
        return list(zip(lines[::2], lines[1::2]))

    return ask


def test_compile_is_keyed_on_what_it_runs_and_no_more(
    keys: Callable[..., list[tuple[str, str]]],
) -> None:
    elsewhere = "pipeline/tune/measure/device.py pipeline/cli/compile.py pipeline/report/page.py"
    everywhere = ("pipeline/graph/passes/fuse_dense.py", "pipeline/driver.py")
    of_gpu, of_cpu = "pipeline/backends/cuda/plan.py", "schedules/cpu/attention.py"
    (cpu, gpu), unchanged, *both, gpu_change, cpu_change = keys(
        elsewhere, *everywhere, of_gpu, of_cpu
    )
    assert cpu != gpu
    assert unchanged == (cpu, gpu)
    for name, changed in zip(everywhere, both):
        assert not {cpu, gpu} & set(changed), name
    assert gpu_change[0] == cpu and gpu_change[1] != gpu
    assert cpu_change[0] != cpu
