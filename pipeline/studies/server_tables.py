"""Says what servers did under load: tables of the rows of `server_load`, and what was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bertile.base.machine import busy_sentence
from bertile.base.tables import table

Row = dict[str, Any]

LEAST_OF_ENCODE = 0.85  # of the texts a second of `encode`
LEAST_OF_PEER = 2.0  # times the texts a second of the better peer
MOST_P99 = 2.0  # times that at capacity, under overload
MOST_IDLE = 0.01  # of a core
LEAST_ALONE = 0.999  # cosine of an answer to that of the same text alone
LEAST_BESIDE_SLOW = 0.9  # of the texts a second without slow clients
MEANINGS = (
    "Of encode: of the texts a second of `encode` on the same texts; ratio: of Bertile's texts a"
    " second to this server's; alone: the least cosine of an answer to the vector of the same text"
    " from a call by itself; load: what sending a request and taking its answer cost on the same"
    " cores; accepted: answered with 200; MB: resident memory of all processes of the server."
)


def said(parts: Mapping[str, Sequence[Row]], markdown: bool = False) -> str:
    """The tables of all parts that there are rows of, each with a sentence on what is asked, and
    the circumstances.
    """
    texts, facts = [], []
    for part, written in WRITTEN.items():
        rows = [row for row in parts.get(part, ()) if not row.get("facts")]
        facts += [row for row in parts.get(part, ()) if row.get("facts")]
        if rows:
            own = facts[-1] if facts and facts[-1]["part"] == part else None
            texts += written(rows, own, markdown)
            if own is None:
                texts.append("This was stopped before its end.")
    return "\n\n".join([*texts, *([_circumstances(facts)] if facts else [])])


def _circumstances(facts: Sequence[Row]) -> str:
    """Where, when and how it was measured, what columns mean, and how busy the machine was."""
    first = facts[0]
    busiest = max((row["busy"] for row in facts), key=lambda busy: busy["others_percent"] or 0)
    budgets = {row["budget"] for row in facts if row.get("budget")}
    together = f"; at most {min(budgets)} tokens run together" if budgets else ""
    notes = dict.fromkeys(note for row in facts for note in row.get("notes", ()))
    return "\n".join(
        [
            f"{first['cpu']}; {first['threads']} threads{together}; after a warm-up;"
            f" {first['time']}.",
            MEANINGS,
            f"{_capital(busy_sentence(busiest))}.",
            *(f"{_capital(note)}." for note in notes),
        ]
    )


def _load(rows: Sequence[Row], facts: Row | None, markdown: bool) -> list[str]:
    medians = _medians(rows)
    encode = medians.pop("encode", {}).get("texts_per_s")
    ours = next((row for name, row in medians.items() if name.startswith("bertile")), None)
    versions = (facts or {}).get("versions", {})
    header = ("server", "texts/s", "of encode", "ratio", "p50 ms", "p99 ms", "alone", "load µs")
    lines: list[tuple[Any, ...]] = []
    if encode is not None:
        lines.append(("`encode`, no server", round(encode), *[None] * 6))
    for name, row in medians.items():
        rate, own = row["texts_per_s"], row is ours
        lines.append(
            (
                versions.get(name, name) + ("" if own else " in FastAPI"),
                round(rate),
                rate / encode if encode and own else None,
                ours["texts_per_s"] / rate if ours and not own else None,
                row["p50"],
                row["p99"],
                f"{row['cosine']:.5f}",
                round(row["load_us"]),
            )
        )
    how = ""
    if facts is not None:
        how = (
            f" {facts['clients']} clients, {facts['rounds']} rounds of {facts['seconds']:.0f} s in"
        )
        how += " turns, the median round of each."
    return [table(header, lines, markdown), _load_said(medians, ours, encode) + how]


def _load_said(medians: Mapping[str, Row], ours: Row | None, encode: float | None) -> str:
    if ours is None:
        return "Bertile's server was not measured."
    sentences = []
    rate = ours["texts_per_s"]
    if encode:
        kept = _kept(rate / encode >= LEAST_OF_ENCODE)
        sentences.append(f"{rate / encode:.2f} of encode (asked: {LEAST_OF_ENCODE}, {kept})")
    peers = {name: row for name, row in medians.items() if row is not ours}
    if peers:
        best = max(peers, key=lambda name: peers[name]["texts_per_s"])
        ratio = rate / peers[best]["texts_per_s"]
        kept = _kept(ratio >= LEAST_OF_PEER)
        sentences.append(
            f"{ratio:.2f} times the better peer, {best} (asked: {LEAST_OF_PEER}, {kept})"
        )
    bad = {status: n for status, n in ours["statuses"].items() if status != "200"}
    sentences.append(f"statuses other than 200: {bad or 'none'}")
    kept = _kept(ours["cosine"] >= LEAST_ALONE)
    sentences.append(
        f"the least cosine of an answer to that of its text alone is {ours['cosine']:.5f} (asked:"
        f" {LEAST_ALONE}, {kept})"
    )
    return f"{_capital('; '.join(sentences))}."


def _medians(rows: Sequence[Row]) -> dict[str, Row]:
    """Of each engine its round of median texts a second, with the least cosine and all statuses."""
    medians = {}
    for name in dict.fromkeys(row["engine"] for row in rows):
        own = sorted((r for r in rows if r["engine"] == name), key=lambda r: r["texts_per_s"])
        middle = dict(own[len(own) // 2])
        if "cosine" in middle:
            middle["cosine"] = min(row["cosine"] for row in own)
            statuses: dict[str, int] = {}
            for row in own:
                for status, count in row["statuses"].items():
                    statuses[status] = statuses.get(status, 0) + count
            middle["statuses"] = statuses
        medians[name] = middle
    return medians


def _overload(rows: Sequence[Row], facts: Row | None, markdown: bool) -> list[str]:
    header = ("sent", "requests/s", "accepted/s", "429", "other", "p99 ms", "429's p99 ms", "MB")
    row = rows[-1]
    other = {k: n for k, n in row["statuses"].items() if k not in ("200", "429")}
    lines = [
        (
            f"by {row['limit']} clients",
            round(row["capacity"]),
            round(row["capacity"]),
            0,
            0,
            row["capacity_p99"],
            None,
            round(row["held_mb"]),
        ),
        (
            "at four times that rate",
            round(row["asked"]),
            round(row["accepted"]),
            row["statuses"].get("429", 0),
            sum(other.values()),
            row["p99"],
            row["refused_p99"],
            round(row["most_mb"]),
        ),
    ]
    ratio = row["p99"] / row["capacity_p99"]
    seconds = f", {facts['seconds']:.0f} s each" if facts is not None else ""
    sentence = (
        f"At most {row['limit']} requests at a time in the house{seconds}. Refused or lost"
        f" other than by 429: {other or 'nothing'} (asked: nothing, {_kept(not other)});"
        f" {row['unsent']} requests were not sent, since all connections were in use; the p99 of"
        f" accepted ones is {ratio:.2f} times that at capacity (asked: {MOST_P99},"
        f" {_kept(ratio <= MOST_P99)})."
    )
    return [table(header, lines, markdown), sentence]


def _idle(rows: Sequence[Row], facts: Row | None, markdown: bool) -> list[str]:
    row = rows[-1]
    kept = _kept(row["share"] < MOST_IDLE)
    return [
        f"Idle: {100 * row['share']:.2f}% of a core (asked: under {100 * MOST_IDLE:.0f}%, {kept}),"
        f" {row['resident_mb']:.0f} MB resident."
    ]


def _slow(rows: Sequence[Row], facts: Row | None, markdown: bool) -> list[str]:
    header = ("slow clients", "texts/s", "p50 ms", "p99 ms", "not 200", "their answers")
    lines = [
        (
            row["beside"],
            round(row["texts_per_s"]),
            row["p50"],
            row["p99"],
            sum(n for status, n in row["statuses"].items() if status != "200"),
            ", ".join(f"{n} × {what}" for what, n in row["fate"].items() if n) or None,
        )
        for row in rows
    ]
    parts = [table(header, lines, markdown)]
    if len(rows) > 1:
        share = rows[-1]["texts_per_s"] / rows[0]["texts_per_s"]
        parts.append(
            f"Beside slow clients the others have {share:.2f} of their texts a second (asked:"
            f" {LEAST_BESIDE_SLOW}, {_kept(share >= LEAST_BESIDE_SLOW)})."
        )
    return parts


WRITTEN = {"load": _load, "overload": _overload, "idle": _idle, "slow": _slow}


def _kept(kept: Any) -> str:
    return "kept" if kept else "not kept"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
