"""The report: one page that stands alone, with the numbers of the log and of the kernels."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from bertile.base.errors import BertileError
from bertile.cli import main
from bertile.report import collector
from bertile.report.content import Curve, Page
from bertile.report.page import html
from bertile.schedules.task import Task
from bertile.tune.log.tuning_log import Record, TuningLog

CURVE = Curve(
    name="dense_64_32",
    threads=2,
    trials=(90.0, 120.0, None, 60.0, 75.0, 30.0, 900.0),
    default=90.0,
    best=30.0,
    knobs={"unroll": 4},
    calls=6,
)
KERNEL = {
    "kernel": "dense_64_32",
    "origin": "tuned",
    "calls": 6,
    "ms": 1.25,
    "time %": 62.5,
    "GFLOP/s": 400.0,
    "peak %": 80.0,
}
PAGE = Page(
    title="Bertile: minilm",
    facts={"target": "x86-avx512"},
    curves=(CURVE, replace(CURVE, name="layer_norm_64", calls=12)),
    kernels=(KERNEL, {**KERNEL, "kernel": "cast", "GFLOP/s": None, "peak %": None}),
    fallthrough=("astype (lv)",),
)
NORM = Task("layer_norm", {"channels": 64, "epsilon": 1e-12})


def parsed(page: Page) -> ElementTree.Element:
    return ElementTree.fromstring(html(page))


def rows(root: ElementTree.Element, table: str) -> list[list[str]]:
    body = root.find(f".//table[@id='{table}']/tbody")
    assert body is not None
    return [["".join(cell.itertext()) for cell in row] for row in body]


def write_log(directory: Path) -> None:
    """Ten trials of a LayerNorm, the third of them failed, the default among them."""
    pytest.importorskip("tvm")
    from bertile.schedules.cpu import SCHEDULES
    from bertile.targets.rows import resolve

    default = SCHEDULES["layer_norm"].default(NORM, resolve("x86-avx512", 2))
    log = TuningLog([directory], print)
    for number in range(10):
        microseconds = () if number == 2 else (20.0 - number,)
        log.append(
            Record(
                operation=NORM.operation,
                shape=dict(NORM.shape),
                target="x86-avx512",
                threads=2,
                tokens=128,
                knobs=default if number == 0 else {"sums": 100 + number},
                microseconds=microseconds,
                machine={"cpu": "a <processor>"},
                versions={"apache-tvm": "0.27"},
                time=f"2026-01-01T00:00:{number:02}+00:00",
            )
        )


def test_best_so_far_has_a_step_wherever_the_time_improves() -> None:
    assert CURVE.best_so_far == ((1, 90.0), (4, 60.0), (6, 30.0))
    assert replace(CURVE, trials=(None, None)).best_so_far == ()


def test_page_is_well_formed_and_has_a_curve_per_task() -> None:
    root = parsed(PAGE)
    labels = [svg.get("aria-label") for svg in root.iter("svg")]
    assert labels == [
        "tuning curve of dense_64_32, 2 threads",
        "tuning curve of layer_norm_64, 2 threads",
    ]
    first = next(root.iter("svg"))
    marks = [mark.get("class") for mark in first]
    assert marks.count("trial") == 6 and marks.count("failed") == 1 and marks.count("default") == 1


def test_curve_falls_at_the_trials_that_improve_it() -> None:
    path = next(element for element in parsed(PAGE).iter("path") if element.get("class") == "steps")
    numbers = re.findall(r"([MHV])([\d.]+)(?: ([\d.]+))?", path.get("d") or "")
    across = [float(value) for kind, value, _ in numbers if kind != "V"]
    heights = [float(rest or value) for kind, value, rest in numbers if kind != "H"]
    # seven trials over 278 units from 52 on: the first, the fourth, the sixth, the last
    assert across == [52.0, 191.0, pytest.approx(283.7), 330.0]
    assert heights == sorted(heights) and len(set(heights)) == 3


def test_tables_hold_the_numbers_of_kernels_and_of_tuning() -> None:
    root = parsed(PAGE)
    kernel, cast = rows(root, "kernels")
    assert kernel == ["dense_64_32", "tuned", "6", "1.250", "62.5", "400.0", "80.0"]
    assert cast[5:] == ["–", "–"]  # noqa: RUF001
    dense, norm = rows(root, "gains")
    assert dense == ["dense_64_32", "2", "7", "90.0", "30.0", "3.00 ×", "unroll 4"]
    assert norm[0] == "layer_norm_64"
    # 18 calls of 90 µs, then of 30 µs
    text = "".join(root.itertext())
    assert "on 2 threads: 1.62 ms before, 0.54 ms after" in text and "astype (lv)" in text


def test_curves_say_on_which_machine_they_were_measured(tmp_path) -> None:
    """Not on the one that writes the page."""
    write_log(tmp_path)
    log = TuningLog([tmp_path], print)
    (curve,) = collector.curves(log, "x86-avx512")
    assert (curve.machine, curve.when) == ("a <processor>", "2026-01-01")
    text = html(replace(PAGE, curves=(curve,)))
    assert "a &lt;processor&gt;, 2026-01-01" in text
    last = log.all_records("x86-avx512")[-1]
    other = {"time": "2026-03-01T00:00:00+00:00", "estimated": True}
    log.append(replace(last, **other))
    assert collector.curves(log, "x86-avx512")[0].when == "2026-01-01 to 2026-03-01"
    log.append(replace(last, machine={"cpu": "another"}, **other))
    machines = {curve.machine for curve in collector.curves(log, "x86-avx512")}
    assert machines == {"a <processor>", "another, by estimate"}


def test_text_from_a_log_or_a_model_is_escaped() -> None:
    evil = "<script>alert('x')</script> & \"quoted\""
    page = replace(
        PAGE,
        title=evil,
        facts={evil: evil},
        curves=(replace(CURVE, name=evil, knobs={evil: evil}),),
        kernels=({**KERNEL, "kernel": evil},),
        fallthrough=(evil,),
    )
    assert "<script" not in html(page)
    root = parsed(page)
    assert "".join(next(root.iter("h1")).itertext()) == evil
    assert next(root.iter("svg")).get("aria-label") == f"tuning curve of {evil}, 2 threads"


def test_page_needs_nothing_from_elsewhere() -> None:
    text = html(PAGE)
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\(|@import|<script|<link", text)


@pytest.mark.parametrize("trials", [(), (None,), (5.0,), (5.0, 5.0)])
def test_page_holds_for_tasks_with_hardly_a_trial(trials: tuple) -> None:
    best = min((trial for trial in trials if trial), default=None)
    parsed(Page("few", {}, (replace(CURVE, trials=trials, default=None, best=best),)))


def test_page_without_records_says_so() -> None:
    assert "The log has no records" in "".join(parsed(Page("none", {}, ())).itertext())


def test_report_of_a_log_has_before_and_after(tmp_path: Path) -> None:
    write_log(tmp_path / "log")
    summary = collector.write(tmp_path / "log", tmp_path / "report.html")
    root = ElementTree.parse(tmp_path / "report.html").getroot()
    ((name, *numbers, _),) = rows(root, "gains")
    assert name == "layer_norm_64_1em12, x86-avx512"
    assert numbers == ["2", "10", "20.0", "11.0", "1.82 ×"]
    assert "10, of which 1 failed" in "".join(root.itertext())
    assert summary["tasks"] == 1 and summary["kernels"] == 0
    # one target's directory gives the same
    collector.write(tmp_path / "log" / "x86-avx512", tmp_path / "again.html")
    again = ElementTree.parse(tmp_path / "again.html").getroot()
    assert rows(again, "gains") == rows(root, "gains")


def test_report_of_a_bundle_takes_the_records_of_its_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_log(tmp_path / "log")
    kernel = {"operation": NORM.operation, "calls": 12, "shape": dict(NORM.shape)}
    manifest = {
        "model": {"source": "minilm", "family": "bert", "head": "embedding"},
        "target": {"name": "x86-avx512-bf16", "arch": "x86_64"},
        "versions": {"tvm": "0.27", "llvm": "22", "python": "3.11"},
        "kernels": [kernel, {"operation": "generic", "calls": 1, "shape": {}}],
        "fallthrough": [],
    }
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").touch()
    monkeypatch.setattr(collector.loader, "read_manifest", lambda directory: manifest)
    page = tmp_path / "r.html"
    line = ["report", str(tmp_path / "bundle"), "-o", str(page), "--no-measure", "-q"]
    assert main.main([*line, "--log-dir", str(tmp_path / "log")]) == 0
    root = ElementTree.parse(page).getroot()
    assert [row[0] for row in rows(root, "gains")] == ["layer_norm_64_1em12"]
    assert "0.24 ms before, 0.13 ms after" in "".join(root.itertext())  # 12 × 20 µs, 12 × 11 µs


@pytest.mark.parametrize("exists", [True, False])
def test_directory_that_is_neither_is_refused(tmp_path: Path, exists: bool) -> None:
    source = tmp_path / "empty"
    if exists:
        source.mkdir()
    with pytest.raises(BertileError, match=r"neither a bundle nor|no bundle and no log"):
        collector.write(source, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_page_is_drawn_by_a_browser(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no chromium on this machine")
    (tmp_path / "report.html").write_text(html(PAGE), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    flags += " --disable-background-networking --disable-component-update --disable-sync"
    command = [browser, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1100,1400"]
    address = (tmp_path / "report.html").as_uri()
    shot = tmp_path / "page.png"
    run = [*command, f"--screenshot={shot}", address]
    subprocess.run(run, check=True, capture_output=True, timeout=120)
    assert shot.read_bytes().startswith(b"\x89PNG") and shot.stat().st_size > 20_000
    dump = [*command, "--dump-dom", address]
    drawn = subprocess.run(dump, check=True, capture_output=True, text=True, timeout=120).stdout
    assert drawn.count("<svg") == 2 and drawn.count("</figure>") == 2
