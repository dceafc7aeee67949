"""The pages say what is true: links and anchors lead somewhere, commands parse, paths exist."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from bertile.cli import config_flags, main
from bertile.graph import order

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "pipeline" / "bench" / "RESULTS.md"
PLACES = ("pipeline", "schedules", "tests", "tuning_logs")
PAGES = [
    README,
    ROOT / "CHANGELOG.md",
    ROOT / ".github" / "CONTRIBUTING.md",
    *sorted(page for place in PLACES for page in (ROOT / place).rglob("*.md")),
]
# A fenced block, or lines that are indented by four behind an empty line.
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:\A|(?<=\n\n))(?: {4}.*\n+)+")
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def names(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


@pytest.fixture(params=PAGES, ids=names(PAGES))
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


@cache
def blocks(page: Path) -> list[tuple[str, str]]:
    """The code blocks of a page: the language that each names, and its text."""
    text = page.read_text(encoding="utf-8")
    fenced = FENCED.findall(text)
    return [*fenced, *(("", block) for block in INDENTED.findall(FENCED.sub("", text)))]


@cache
def prose(page: Path) -> str:
    """What is left of a page without its code blocks."""
    return INDENTED.sub("", FENCED.sub("", page.read_text(encoding="utf-8")))


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.replace(" ", "-") for title in kept}


def links(page: Path) -> list[str]:
    return LINK.findall(CODE.sub("code", prose(page)))


def target(page: Path, link: str) -> tuple[Path, str]:
    """The file that a relative link names, and the anchor in it."""
    path, _, anchor = link.partition("#")
    return (page.parent / path).resolve() if path else page, anchor


def words(line: str) -> list[str]:
    """The words of a line of a shell, without its comment and without where a program lies."""
    parts = shlex.split(line, comments=True)
    return [parts[0].removeprefix(".venv/bin/"), *parts[1:]] if parts else []


def shell_lines(page: Path) -> list[str]:
    texts = [text for language, text in blocks(page) if language in ("", "sh")]
    return [line.strip() for text in texts for line in text.splitlines() if line.strip()]


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page):
        if link.startswith(("http:", "https:")):
            continue
        path, anchor = target(page, link)
        inside = path.exists() and path.is_relative_to(ROOT)
        if not inside or (anchor and anchor not in anchors(path)):
            broken.append(link)
    assert broken == []


def test_page_has_a_title_and_a_way_back(page: Path) -> None:
    assert page.read_text(encoding="utf-8").startswith("# ")
    if page.parent != ROOT:
        assert README in [target(page, link)[0] for link in links(page)]


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            waiting += [target(page, link)[0] for link in links(page) if ":" not in link]
    assert names([page for page in PAGES if page not in reached]) == []


def test_commands_in_code_blocks_parse(page: Path) -> None:
    """By the command's own parser; what is a choice of Config is one that Config takes."""
    for line in shell_lines(page):
        if words(line)[:1] == ["bertile"]:
            options = main._parse(words(line)[1:])
            if options.command in ("compile", "export", "tune", "bench", "demo"):
                config_flags.read_config(options)


def test_flags_of_commands_in_sentences_exist(page: Path) -> None:
    _, parsers = main._parser(*main.COMMANDS)
    for text in CODE.findall(prose(page)):
        if re.match(r"bertile [a-z]", text):
            name = text.split()[1]
            assert name in parsers, text
            unknown = set(FLAG.findall(text)) - set(parsers[name]._option_string_actions)
            assert not unknown, text


def test_modules_that_python_is_told_to_run_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [name for name in re.findall(r"-m (bertile[\w.]*)", text) if not find_spec(name)]
    assert missing == []


def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    code = [*CODE.findall(prose(page)), *shell_lines(page)]
    told = {text.split()[1] for text in code if text.startswith("make ")}
    assert {name for name in told if not re.fullmatch(r"[a-z-]+", name)} == set()
    assert told <= known


def test_paths_in_sentences_exist(page: Path) -> None:
    paths = [
        text for text in CODE.findall(prose(page)) if re.match(rf"({'|'.join(PLACES)})/", text)
    ]
    assert [path for path in paths if not any(ROOT.glob(path.rstrip("/")))] == []


def test_python_blocks_are_python(page: Path) -> None:
    for language, text in blocks(page):
        if language == "python":
            ast.parse(text)


def test_results_have_each_place_that_make_writes_to_once() -> None:
    text = RESULTS.read_text(encoding="utf-8")
    names = (
        "",
        "-int8",
        "-bf16",
        "-sparse",
        "-acceptance",
        "-load",
        "-streams",
        "-texts",
        "-server",
        "-tuning",
        "-cuda",
    )
    for name in names:
        assert text.count(f"<!-- bench{name} -->") == text.count(f"<!-- /bench{name} -->") == 1
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"RESULTS ?= {RESULTS.relative_to(ROOT).as_posix()}\n" in makefile
    assert len(re.findall(r"--into \"?\$\(RESULTS\)", makefile)) == 10


def test_readme_quotes_the_results() -> None:
    """The front page's table is kept by hand: its times are those of the results."""
    quoted = re.findall(
        r"^\| (MiniLM|BERT-base)[^|]*\| (\w+) \| ([\d ×]+) \| ([\d.]+) \| ([\d.]+) \| (\w+) \|",
        README.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(quoted) == 9
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in RESULTS.read_text(encoding="utf-8").splitlines()
    ]
    medians = {tuple(row[:5]): row[5] for row in rows if len(row) == 13}
    versions = {row[1].split()[0]: row[1] for row in rows if len(row) == 13}
    for model, precision, tokens, ours, best, peer in quoted:
        batch, length = tokens.split(" × ") if "×" in tokens else ("1", tokens)
        name = {"MiniLM": "minilm", "BERT-base": "synthetic:bert-base"}[model]
        for engine, median in (("Bertile", ours), (peer, best)):
            assert medians[name, versions[engine], precision, batch, length] == median


def test_site_has_every_page_and_notebook() -> None:
    site = runpy.run_path(str(ROOT / ".ci" / "conf.py"))
    listed = {page for pages in site["PAGES"].values() for page in pages}
    notebooks = (ROOT / "pipeline" / "docs").glob("*.ipynb")
    wanted = {path.with_suffix("") for path in (*PAGES, *notebooks)} - {README.with_suffix("")}
    assert listed - {"pipeline/docs/api"} == {p.relative_to(ROOT).as_posix() for p in wanted}


@pytest.mark.slow
def test_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("myst_nb")
    pytest.importorskip("furo")
    line = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(ROOT / ".ci")]
    run = subprocess.run([*line, str(ROOT), str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    reference = (tmp_path / "pipeline" / "docs" / "api.html").read_text(encoding="utf-8")
    for name in ("bertile.compile", "bertile.load", "bertile.Model.labels", "bertile.Config"):
        assert f'id="{name}"' in reference
    assert (tmp_path / "index.html").is_file()


def test_table_of_passes_is_their_order():
    table = (ROOT / "pipeline" / "graph" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ((?:`\w+`(?:, )?)+) \|$", table, re.MULTILINE)
    assert [(phase, CODE.findall(names)) for phase, names in rows] == [
        (phase, [apply.__name__ for apply in passes]) for phase, passes in order.PHASES
    ]
