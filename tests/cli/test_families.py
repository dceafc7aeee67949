"""`bertile families`: each type with a row, each that was tried, and what is said of it."""

from __future__ import annotations

import json

from bertile.cli import main
from bertile.families import states
from bertile.families.table import FAMILIES


def listed(capsys, *arguments):
    assert main.main(["families", *arguments]) == 0
    return capsys.readouterr().out


def test_json_has_every_type_with_its_state(capsys):
    rows = json.loads(listed(capsys, "--json"))
    own = {row["type"]: row for row in rows if row["state"] == states.OWN}
    assert set(own) == {name for family in FAMILIES for name in family.model_types}
    for family in FAMILIES:
        assert own[family.model_types[0]]["heads"] == list(family.heads)
        assert "int8" in own[family.model_types[0]]["precisions"]
    assert {row["type"] for row in rows} == set(own) | set(states.read())


def test_table_says_errors_operators_and_why_a_type_is_refused(capsys):
    rows = states.roads()
    text = listed(capsys)
    refused = next(row for row in rows if row["state"] == states.REFUSED)
    line = next(line for line in text.splitlines() if line.startswith(f"{refused['type']} "))
    assert refused["reason"][:40] in line
    general = next(row for row in rows if row["state"] == states.GENERAL)
    line = next(line for line in text.splitlines() if line.startswith(f"{general['type']} "))
    assert f"{general['median']:.0e}" in line and "general road" in line


def test_state_lists_types_of_that_alone(capsys):
    rows = json.loads(listed(capsys, "--state", "general", "--json"))
    assert rows and {row["state"] for row in rows} == {states.GENERAL}


def test_type_that_has_a_row_since_it_was_tried_is_its_own(monkeypatch):
    tried = {"bert": {"type": "bert", "state": states.GENERAL, "median": 1e-8, "largest": 1e-7}}
    monkeypatch.setattr(states, "read", lambda: tried)
    (bert,) = (row for row in states.roads() if row["type"] == "bert")
    assert bert["state"] == states.OWN and bert["median"] == 1e-8


def test_type_that_was_never_tried_says_so(capsys, monkeypatch):
    monkeypatch.setattr(states, "read", lambda: {})
    lines = listed(capsys, "--state", states.OWN).splitlines()
    bert = next(line for line in lines if line.startswith("bert "))
    assert bert.split()[1:7] == ["own", "row", "not", "tried", "not", "tried"]
