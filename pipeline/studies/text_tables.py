"""Says how engines made vectors of texts: a table of lists, a table of queries, what was asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bertile.base.tables import table
from bertile.bench import result_tables, sameness
from bertile.bench.engines import Engine
from bertile.loading.blocks import BLOCK_TOKENS
from bertile.studies.text_calls import Pass

Row = dict[str, Any]

QUERY_TOKENS = range(8, 17)


class Bound(NamedTuple):
    """What is asked for beside the best peer of the same precision."""

    texts: float  # at least so many times its texts a second
    query: float  # at most so much of its median time


BOUNDS = {"fp32": Bound(1.5, 0.55), "bf16": Bound(1.9, 0.34), "int8": Bound(2.0, 0.45)}
MOST_BESIDE = 0.08
MEANINGS = (
    "ratio: of Bertile's texts a second to this engine's, of Bertile's median to this engine's;"
    " cosine: the least of a text's vectors to those of PyTorch in fp32;"
    " beside the model: the share of its threads' time in which no call of the model runs."
)


def row_of(engine: Engine, passes: Sequence[Pass], times: Sequence[float], true: np.ndarray) -> Row:
    """An engine's row: the pass of median "seconds" with its "beside", percentiles of the queries'
    milliseconds (None without any), and the least ("cosine") and the "mean" cosine of its vectors
    to the `true` ones.
    """
    middle = sorted(passes, key=lambda outcome: outcome.seconds)[len(passes) // 2]
    own, true = middle.vectors.astype(np.float64), true.astype(np.float64)
    lengths = np.linalg.norm(own, axis=1) * np.linalg.norm(true, axis=1)
    cosines = (own * true).sum(axis=1) / np.maximum(lengths, 1e-30)
    p50, p99 = np.percentile(times, (50, 99)).tolist() if times else (None, None)
    return {
        "engine": engine.name,
        "kind": engine.kind,
        "precision": engine.precision,
        "seconds": middle.seconds,
        "beside": middle.beside,
        "p50": p50,
        "p99": p99,
        "cosine": float(cosines.min()),
        "mean": float(cosines.mean()),
    }


def rivals(rows: Sequence[Row], precision: str) -> list[Row]:
    """The rows of other libraries that compute the same model in that precision."""
    others = [row for row in rows if row["kind"] != "bertile" and row["precision"] == precision]
    return [row for row in others if doubt(row) is None]


def doubt(row: Row) -> str | None:
    """Why an engine cannot have computed the same model, None where it may have."""
    if row["mean"] >= sameness.least_cosine(row["precision"]):
        return None
    return f"{row['engine']}'s vectors have a mean cosine of {row['mean']:.4f}: not the same model"


def best_peer(rows: Sequence[Row], precision: str, key: str) -> Row | None:
    """The rival that is fastest by this column."""
    return min(rivals(rows, precision), key=lambda row: row[key], default=None)


def as_tables(report: dict[str, Any], markdown: bool = False) -> str:
    """The lists, then the queries, each with a sentence on what is asked."""
    rows, versions, count = report["rows"], report["versions"], report["texts"]
    ours = {row["precision"]: row for row in rows if row["kind"] == "bertile"}
    header = ("engine", "precision", "texts/s", "seconds", "ratio", "beside the model", "cosine")
    lists = [
        (
            versions[row["engine"]],
            row["precision"],
            round(count / row["seconds"]),
            row["seconds"],
            _ratio(row, ours, "seconds"),
            None if row["beside"] is None else f"{100 * row['beside']:.1f}%",
            f"{row['cosine']:.4f}",
        )
        for row in rows
    ]
    asked = [row for row in rows if row["p50"] is not None]
    query_header = ("engine", "precision", "p50 ms", "p99 ms", "ratio")
    queries = [
        (
            versions[row["engine"]],
            row["precision"],
            row["p50"],
            row["p99"],
            _ratio(row, ours, "p50", inverse=True),
        )
        for row in asked
    ]
    parts = [
        table(header, lists, markdown),
        " ".join(_lists_said(rows, row) for row in ours.values()),
    ]
    if queries:
        parts += [
            table(query_header, queries, markdown),
            " ".join(_queries_said(asked, row) for row in ours.values() if row in asked),
        ]
    return "\n\n".join(parts)


def _ratio(row: Row, ours: dict[str, Row], key: str, inverse: bool = False) -> float | None:
    own = ours.get(row["precision"])
    if own is None or own is row or own[key] is None:
        return None
    return own[key] / row[key] if inverse else row[key] / own[key]


def _lists_said(rows: Sequence[Row], ours: Row) -> str:
    precision, beside = ours["precision"], ours["beside"]
    best = best_peer(rows, precision, "seconds")
    kept = "kept" if beside <= MOST_BESIDE else "not kept"
    share = f"{100 * beside:.1f}% is not the model (asked: {100 * MOST_BESIDE:.0f}%, {kept})"
    if best is None:
        return f"{precision}: no peer; {share}."
    ratio = best["seconds"] / ours["seconds"]
    asked = BOUNDS[precision].texts
    return (
        f"{precision}: {ratio:.2f} times the fastest peer, {best['engine']}"
        f" (asked: {asked}, {'kept' if ratio >= asked else 'not kept'}); {share}."
    )


def _queries_said(rows: Sequence[Row], ours: Row) -> str:
    precision, best = ours["precision"], best_peer(rows, ours["precision"], "p50")
    if best is None:
        return f"{precision}: no peer."
    least_p99 = min(row["p99"] for row in rivals(rows, precision))
    ratio, asked = ours["p50"] / best["p50"], BOUNDS[precision].query
    ahead = "ahead" if ours["p99"] < least_p99 else "behind"
    return (
        f"{precision}: {ratio:.2f} of the best peer's median, {best['engine']}"
        f" (asked: {asked}, {'kept' if ratio <= asked else 'not kept'}), {ahead} in p99."
    )


def distribution(counts: Sequence[int]) -> str:
    """How long texts are, in words, and what blocks of 16 tokens add."""
    lengths = np.array(counts)
    blocks = -(-lengths // BLOCK_TOKENS) * BLOCK_TOKENS
    more = 100 * (blocks.sum() / lengths.sum() - 1)
    return (
        f"{len(lengths)} English texts of {lengths.min()} to {lengths.max()} tokens, mean"
        f" {lengths.mean():.0f}, median {np.median(lengths):.0f} (blocks of {BLOCK_TOKENS} tokens"
        f" make {more:.1f}% more of them)"
    )


def said(report: dict[str, Any], markdown: bool = False) -> str:
    """The whole report: tables, parts, and the circumstances."""
    how = (
        f"{distribution(report['lengths'])}, median of {report['rounds']} rounds;"
        f" {report['queries']} queries of {QUERY_TOKENS.start} to {QUERY_TOKENS.stop - 1} tokens"
    )
    doubts = filter(None, map(doubt, report["rows"]))
    noted = {**report, "notes": [*report["notes"], *doubts]}
    facts = result_tables.circumstances([noted], how, MEANINGS)
    return "\n\n".join([as_tables(report, markdown), *report["parts"], facts])
