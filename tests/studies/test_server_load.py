"""The study of the server: rows are kept as they come, the last run of a part counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bertile.base.errors import UsageError
from bertile.studies import server_load
from bertile.studies.http_load import Reply, Traffic


def test_the_last_run_of_each_part_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows" / "kept.jsonl"
    first, second = server_load.Log(path), server_load.Log(path)
    second._run += "b"
    for log, part, value in (
        (first, "load", 1),
        (first, "idle", 2),
        (second, "load", 3),
        (second, "load", 4),
    ):
        log.add(part, value=value)
    parts = server_load.rows_of(path)
    values = {part: [row["value"] for row in rows] for part, rows in parts.items()}
    assert values == {"load": [3, 4], "idle": [2]}


def test_answers_are_compared_with_those_of_the_same_text_alone() -> None:
    pytest.importorskip("orjson")
    alone = np.eye(3, 4, dtype=np.float32)
    vectors = {0: [2.0, 0, 0, 0], 2: [0, 0, 3.0, 4.0]}
    traffic = Traffic(
        [Reply(n, 0.0, 200, 1.0, json.dumps([row]).encode()) for n, row in vectors.items()]
        + [Reply(1, 0.0, 429, 1.0, b"")]
    )
    assert server_load.cosines(traffic, alone).tolist() == pytest.approx([1.0, 0.6])


def test_tables_come_of_the_rows_that_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    server_load.Log(rows).add("idle", share=0.001, resident_mb=100.0)
    page.write_text("<!-- bench-server -->\nold\n<!-- /bench-server -->\n")
    server_load.main(["--rows", str(rows), "--into", str(page)])
    assert "Idle: 0.10% of a core" in page.read_text() and "old" not in page.read_text()
    assert "Idle: 0.10% of a core" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, what", [(["--against", "tei"], "engine 'tei'"), (["idel"], "part 'idel'")]
)
def test_what_is_unknown_is_refused(words: list[str], what: str) -> None:
    with pytest.raises(UsageError, match=f"{what} is unknown"):
        server_load.main(words)
