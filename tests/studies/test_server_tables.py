"""The tables of servers: medians of rounds, what is kept and what is not, what was not measured."""

from __future__ import annotations

from bertile.studies import server_tables

FACTS = {
    "facts": True,
    "cpu": "a processor",
    "threads": 2,
    "time": "2026-01-01",
    "busy": {"others_percent": 1.0, "load": []},
    "clients": 64,
    "seconds": 20.0,
    "rounds": 3,
}


def served(engine: str, rate: float, cosine: float = 1.0, **statuses: int) -> list[dict]:
    return [
        {
            "engine": engine,
            "texts_per_s": rate * factor,
            "p50": 60.0,
            "p99": 90.0,
            "load_us": 30.0,
            "cosine": cosine if factor == 1 else 1.0,
            "statuses": statuses or {"200": 5},
        }
        for factor in (3, 1, 0.5)
    ]


def test_servers_are_compared_by_their_median_rounds() -> None:
    encode = [{"engine": "encode", "texts_per_s": rate} for rate in (900.0, 1000.0, 1200.0)]
    rows = [*encode, *served("bertile int8", 900), *served("openvino int8", 500)]
    rows += served("onnxruntime int8", 300, 0.97)
    facts = {
        **FACTS,
        "versions": {"openvino int8": "OpenVINO 1"},
        "budget": 512,
        "notes": ["a is b"],
    }
    text = server_tables.said({"load": [*rows, {**facts, "part": "load"}]})
    assert "0.90 of encode (asked: 0.85, kept)" in text
    assert "1.80 times the better peer, openvino int8 (asked: 2.0, not kept)" in text
    assert "OpenVINO 1 in FastAPI" in text and "0.97000" in text
    assert "at most 512 tokens run together" in text and "A is b." in text
    assert "statuses other than 200: none" in text


def test_what_was_stopped_is_said() -> None:
    text = server_tables.said({"load": served("bertile int8", 900, **{"200": 1, "0": 2})})
    assert "{'0': 6}" in text and "was stopped before its end" in text


def test_overload_asks_for_two_statuses_and_a_bounded_wait() -> None:
    row = {
        "capacity": 800.0,
        "capacity_p99": 100.0,
        "asked": 3200.0,
        "unsent": 0,
        "statuses": {"200": 8000, "429": 24000},
        "accepted": 790.0,
        "p99": 150.0,
        "refused_p99": 3.0,
        "held_mb": 300.0,
        "most_mb": 320.0,
        "limit": 64,
    }
    text = server_tables.said({"overload": [row, {**FACTS, "part": "overload"}]})
    assert "nothing (asked: nothing, kept)" in text
    assert "1.50 times that at capacity (asked: 2.0, kept)" in text
    worse = {**row, "statuses": {"200": 1, "500": 2}, "p99": 250.0}
    text = server_tables.said({"overload": [worse, {**FACTS, "part": "overload"}]})
    assert "{'500': 2} (asked: nothing, not kept)" in text and "2.50 times" in text


def test_idle_and_slow_clients_have_their_bounds() -> None:
    idle = {"share": 0.02, "resident_mb": 200.0}
    assert "Idle: 2.00% of a core (asked: under 1%, not kept)" in server_tables.said(
        {"idle": [idle, {**FACTS, "part": "idle"}]}
    )
    alone, beside = (
        {"beside": n, "texts_per_s": rate, "p50": 1.0, "p99": 2.0, "statuses": {}, "fate": {}}
        for n, rate in ((0, 1000.0), (200, 950.0))
    )
    text = server_tables.said(
        {"slow": [alone, {**beside, "fate": {"408": 200}}, {**FACTS, "part": "slow"}]}
    )
    assert "0.95 of their texts a second (asked: 0.9, kept)" in text and "200 × 408" in text
