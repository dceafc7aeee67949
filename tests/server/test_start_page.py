"""The page at /: a browser shows how alike two texts are, a ranking, and the throughput."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers.server_at_port import at_port

SHOWN = ("chromium", "chromium-browser", "google-chrome")
TEXTS = "A cat sat on the mat.", "A kitten rests on a rug."


def test_the_page_is_there_and_loads_nothing_from_elsewhere(serve: Any) -> None:
    client = serve("dense")
    answer = client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert not re.search(r"(src|href)=\"?https?:|@import|url\(", answer.text)
    assert client.post("/", json={"inputs": "a"}).status_code == 200  # which is TEI's


def browser() -> str:
    """The browser of this machine."""
    path = next(filter(None, map(shutil.which, SHOWN)), None)
    if path is None:
        pytest.skip(f"no browser is there: {', '.join(SHOWN)}")
    return path


def shown(url: str, directory: Path, *flags: str) -> str:
    """The page as it stands some seconds after it was opened."""
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", f"--user-data-dir={directory}", "--window-size=900,900"]
    command += ["--virtual-time-budget=8000", *flags, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.slow
def test_a_browser_shows_similarity_and_throughput(
    directories: Any, open_stand_in: Any, original: Any, tmp_path: Path
) -> None:
    from bertile.server.application import application
    from bertile.server.settings import Settings

    app = application({"dense": directories["dense"]}, Settings(max_batch_tokens=512, quiet=True))
    with at_port(app) as port:
        page = shown(f"http://127.0.0.1:{port}/", tmp_path / "profile", "--dump-dom")
        picture = tmp_path / "page.png"
        shown(f"http://127.0.0.1:{port}/", tmp_path / "again", f"--screenshot={picture}")
    first, second = original.encode(list(TEXTS), normalize_embeddings=True)
    score = re.search(r'id="similarity">(-?\d\.\d{4})<', page)
    assert score is not None, page
    assert float(score[1]) == pytest.approx(float(first @ second), abs=1e-4)
    assert "Answered in" in page and "tiny" in page
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_a_browser_shows_a_ranking(directories: Any, open_stand_in: Any, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    from bertile.server.application import application
    from bertile.server.settings import Settings

    app = application({"score": directories["score"]}, Settings(max_batch_tokens=512, quiet=True))
    with at_port(app) as port:
        url = f"http://127.0.0.1:{port}/#rank"
        page = shown(url, tmp_path / "profile", "--dump-dom")
    query = re.search(r'id="query" value="([^"]*)"', page)[1]
    documents = re.search(r'id="documents"[^>]*>([^<]*)<', page)[1].split("\n")
    scores = CrossEncoder(str(directories["score"])).predict([(query, text) for text in documents])
    rows = re.findall(r"<li><b>(-?\d\.\d{4})</b><span>([^<]*)</span>", page)
    assert [text for _, text in rows] == [documents[i] for i in (-scores).argsort()]
    assert [float(score) for score, _ in rows] == pytest.approx(sorted(scores)[::-1], abs=1e-4)
