"""The study that tries every model type: its rows, its table, what a crash and a hang leave."""

from __future__ import annotations

import json
import os
import time

from bertile.families import states
from bertile.studies import model_types

OWN = {"type": "bert", "state": "own", "median": 4e-8, "largest": 3e-7, "operators": ["add", "add"]}
REFUSED = {"type": "abc", "state": "refused", "reason": "it has no end"}


def test_every_type_is_there_once():
    assert len(model_types.TYPES) == len(set(model_types.TYPES)) > 90


def test_row_of_a_file_is_not_tried_again(tmp_path, monkeypatch):
    tried = []

    def apart(model_type, seconds, gigabytes):
        tried.append(model_type)
        return {**REFUSED, "type": model_type}

    monkeypatch.setattr(model_types, "_apart", apart)
    file, page = tmp_path / "types.jsonl", tmp_path / "types.md"
    file.write_text(json.dumps(OWN) + "\n")
    arguments = ["--into", str(file), "--only", "bert", "xlm", "--table", str(page)]
    assert model_types.main(arguments) == 0 and tried == ["xlm"]
    assert set(states.read(file)) == {"bert", "xlm"}
    assert model_types.main(arguments) == 0 and tried == ["xlm"]
    bert, xlm = page.read_text().splitlines()[2:]
    assert "| own row " in bert and "4.0e-08" in bert and "3.0e-07" in bert and "| add" in bert
    assert "refused: it has no end" in xlm


def test_process_that_crashes_or_hangs_is_a_row(monkeypatch):
    def send(end, model_type, memory):
        os._exit(9) if model_type == "crash" else time.sleep(60)

    monkeypatch.setattr(model_types, "_send", send)
    monkeypatch.setattr(model_types, "METHOD", "fork")
    assert model_types._apart("crash", 30, 4)["reason"] == "ends its process with code 9"
    assert model_types._apart("hangs", 1, 4)["reason"] == "takes more than 1 s"


def test_committed_rows_are_of_known_states_and_of_forty_types_at_least():
    rows = states.read()
    assert len(rows) >= 40
    for row in rows.values():
        assert row["state"] in (states.OWN, states.GENERAL, states.REFUSED)
        if row["state"] == states.REFUSED:
            assert row["reason"]
        else:
            assert 0 < row["median"] <= row["largest"] < 1e-4
