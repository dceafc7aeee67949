"""Writes accuracy against latency as one HTML page, with its own CSS and SVG.

Nothing is fetched and nothing runs. The markup is well-formed XML too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from bertile.report.page import STYLE

WIDTH, HEIGHT = 960, 470
LEFT, RIGHT, TOP, BOTTOM = 52, 190, 12, 46
LETTER, LINE = 6.2, 13  # about the width of a letter, and the height of a line
GAP = 4.0  # of scores, against the range above it
LEAST_RANGE = 0.01  # of the axis of scores
SHAPES = {"bertile": "circle", "onnxruntime": "square", "openvino": "triangle"}
NAMES = {"bertile": "Bertile", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_LIGHT = (
    "svg { --card: #fff; --ink: #1c2330; --soft: #5d6778; --line: #dde1e8; --main: #1f6feb;"
    " --warm: #c2570c; }"
)
MORE = """
.frontier { fill: none; stroke: var(--main); stroke-width: 2; }
.bertile { fill: var(--main); stroke: var(--main); } .onnxruntime { fill: var(--warm);
  stroke: var(--warm); } .openvino { fill: var(--soft); stroke: var(--soft); }
.interval { stroke-width: 1.2; opacity: .55; } pre { margin: 0; font-size: 12px;
  white-space: pre-wrap; overflow-wrap: anywhere; } summary { cursor: pointer; }
svg text.name { fill: var(--ink); stroke: var(--card); stroke-width: 3; paint-order: stroke; }
tr.best td.name { font-weight: 600; }
.below { fill: none; stroke-width: 2; }
"""
AROUND = """
figure { overflow-x: auto; } figure svg { min-width: 720px; } td, th { padding-right: 14px; }
td.name { min-width: 9em; } td.engine { white-space: nowrap; }
"""


class Column(NamedTuple):
    """What not every row knows; a column that none knows is left out."""

    key: str
    title: str
    unit: float | None
    form: str


KNOWN = (
    Column("joules", "joules", 1, "{:.3f}"),
    Column("weight_bytes", "MB of weights", 1e6, "{:.2f}"),
    Column("multiply_adds", "million multiply-adds", 1e6, "{:.0f}"),
    Column("instructions", "million instructions", 1e6, "{:.0f}"),
    Column("left", "left behind", None, "{}"),
)


def html(content: Mapping[str, Any]) -> str:
    """The whole page: the picture, the table, and the command of each point."""
    title = f"Accuracy and latency: {escape(str(content['data']))}"
    body = [_facts(content), _picture(content), _table(content), _commands(content)]
    return (
        "<!DOCTYPE html>\n"
        f'<html lang="en"><head><meta charset="utf-8"/><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<style>{STYLE}{MORE}{AROUND}</style></head>\n<body>\n<h1>{title}</h1>\n"
        f"{chr(10).join(body)}\n</body></html>\n"
    )


def svg(content: Mapping[str, Any]) -> str:
    """The picture alone, on white, as a file that any page can show."""
    font = "font: 11px system-ui, 'DejaVu Sans', sans-serif; fill: var(--soft);"
    style = f"<style>{_LIGHT} text {{ {font} }} .axis {{ stroke: var(--line); }} {MORE}</style>"
    paper = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    head, _, rest = _svg(content).partition(">")
    size = f' xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"'
    return f"{head}{size}>{style}{paper}{rest}\n"


def best(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The places of the rows that no other beats in both latency and score, the fastest first."""
    highest, places = -math.inf, []
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["median_ms"], -rows[i]["score"]))
    for place in order:
        if rows[place]["score"] > highest:
            highest = rows[place]["score"]
            places.append(place)
    return places


def _facts(content: Mapping[str, Any]) -> str:
    versions = ", ".join(content["versions"].values())
    facts = {
        "texts": f"{content['texts']}; each point's bar is the 95% interval of a bootstrap",
        "latency": f"median of a text of {content['length']} tokens, {content['threads']} threads",
        "machine": content["cpu"],
        "engines": versions,
        "measured": content["time"],
    }
    pairs = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
    notes = "".join(f"<p>{escape(str(note))}</p>" for note in content["notes"])
    return f"<dl>{pairs}</dl>{notes}"


def _picture(content: Mapping[str, Any]) -> str:
    caption = "The line joins what no other point beats in both."
    if len(shown_on_axis(content["rows"])) < len(content["rows"]):
        caption += " An arrow at the lower edge is a point far below all others."
    return f"<figure>{_svg(content)}<figcaption>{caption}</figcaption></figure>"


def _svg(content: Mapping[str, Any]) -> str:
    rows = content["rows"]
    x_ticks = _powers(min(r["median_ms"] for r in rows), max(r["median_ms"] for r in rows))
    shown = shown_on_axis(rows)
    y_ticks = _steps(min(r["low"] for r in shown), max(r["high"] for r in shown))
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(milliseconds: float) -> float:
        first, last = math.log(x_ticks[0]), math.log(x_ticks[-1])
        share = (math.log(milliseconds) - first) / (last - first)
        return round(LEFT + share * (right - LEFT), 1)

    def y(score: float) -> float:
        share = (score - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(floor - max(0.0, share) * (floor - TOP), 1)

    parts = []
    for tick in y_ticks:
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(_text(LEFT - 8, y(tick) + 4, f"{tick:.3g}", "end"))
    for tick in x_ticks:
        parts.append(f'<line class="axis" x1="{x(tick)}" x2="{x(tick)}" y1="{TOP}" y2="{floor}"/>')
        parts.append(_text(x(tick), floor + 18, f"{tick:g}", "middle"))
    axis = f"milliseconds of a text of {content['length']} tokens, logarithmic"
    parts.append(_text((LEFT + right) / 2, floor + 38, axis, "middle"))
    parts.append(_text(LEFT + 6, TOP + 12, str(content["metric"]), "start"))
    line = [f"{x(rows[i]['median_ms'])} {y(rows[i]['score'])}" for i in best(rows)]
    parts.append(f'<path class="frontier" d="M{"L".join(line)}"/>')
    for row in rows:
        parts.append(_point(row, x, y) if row in shown else _far_below(row, x, floor))
    parts += _names(rows, x, y, floor)
    for place, (kind, shape) in enumerate(SHAPES.items()):
        if any(row["engine"] == kind for row in rows):
            top = TOP + 14 + 20 * place
            parts.append(_mark(shape, kind, right + 20, top))
            parts.append(_text(right + 32, top + 4, NAMES[kind], "start"))
    label = escape(f"{content['metric']} against milliseconds of {len(rows)} points", quote=True)
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return f"{head}{''.join(parts)}</svg>"


def shown_on_axis(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that the axis of scores reaches to: those below a gap of several times the range of
    all that is above it would press that into one line.
    """
    order = sorted(rows, key=lambda row: -row["score"])
    for count in range(1, len(order)):
        above, below = order[:count], order[count]["score"]
        reach = max(row["high"] for row in above) - min(row["low"] for row in above)
        if above[-1]["score"] - below > GAP * reach:
            return above
    return order


def _names(
    rows: Sequence[Mapping[str, Any]],
    x: Callable[[float], float],
    y: Callable[[float], float],
    floor: float,
) -> list[str]:
    """The name of each of Bertile's points beside it, moved up or down where two would overlap."""
    texts: list[str] = []
    taken: list[tuple[float, float, float]] = []
    mine = sorted(
        (row for row in rows if row["engine"] == "bertile"), key=lambda row: -row["score"]
    )
    for row in mine:
        name = str(row["model"])
        start, wanted = x(row["median_ms"]) + 9, min(y(row["score"]) - 6, floor - 8)
        end = start + LETTER * len(name)
        heights = (wanted + LINE * turn * side for turn in range(len(rows)) for side in (1, -1))
        height = next(
            (
                height
                for height in heights
                if TOP + LINE < height < floor - 4
                and not any(
                    abs(height - other) < LINE and start < there and here < end
                    for here, there, other in taken
                )
            ),
            wanted,
        )
        taken.append((start, end, height))
        texts.append(_text(start, height, name, "start", "name"))
    return texts


def _far_below(row: Mapping[str, Any], x: Callable[[float], float], floor: float) -> str:
    """An arrow at the lower edge, with the score."""
    place, kind = x(row["median_ms"]), str(row["engine"])
    arrow = f"M{place} {floor - 16}V{floor - 2}M{place - 4} {floor - 7}L{place} {floor - 2}"
    arrow += f"L{place + 4} {floor - 7}"
    title = f"<title>{escape(_said(row))}</title>"
    score = _text(place - 7, floor - 6, f"{row['score']:.3f}", "end")
    return f'<path class="below {kind}" d="{arrow}">{title}</path>{score}'


def _point(row: Mapping[str, Any], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    place, kind = x(row["median_ms"]), str(row["engine"])
    bar = (
        f'<line class="interval {kind}" x1="{place}" x2="{place}" y1="{y(row["low"])}"'
        f' y2="{y(row["high"])}"/>'
    )
    return bar + _mark(SHAPES.get(kind, "circle"), kind, place, y(row["score"]), _said(row))


def _said(row: Mapping[str, Any]) -> str:
    return f"{row['model']}, {row['engine']}: {row['score']:.4f}, {row['median_ms']:.2f} ms"


def _mark(shape: str, kind: str, x: float, y: float, title: str = "") -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    if shape == "square":
        return f'<rect class="{kind}" x="{x - 4}" y="{y - 4}" width="8" height="8">{inner}</rect>'
    if shape == "triangle":
        points = f"{x} {y - 5} {x + 5} {y + 4} {x - 5} {y + 4}"
        return f'<polygon class="{kind}" points="{points}">{inner}</polygon>'
    return f'<circle class="{kind}" cx="{x}" cy="{y}" r="4.5">{inner}</circle>'


def _table(content: Mapping[str, Any]) -> str:
    rows, front = content["rows"], set(best(content["rows"]))
    ours = [row for row in rows if row["engine"] == "bertile" and row["precision"] == "fp32"]
    base = ours[0] if ours else rows[0]
    known = [column for column in KNOWN if any(row[column.key] for row in rows)]
    names = [str(content["metric"]), "95% interval", "against fp32", "ms", "of fp32's time"]
    names += [column.title for column in known]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("model", "engine", "precision"))
    head += "".join(f'<th class="n">{escape(name)}</th>' for name in names)
    body = []
    for place, row in enumerate(rows):
        cells = [
            f'<td class="name">{escape(str(row["model"]))}</td>',
            f'<td class="engine">{escape(NAMES.get(row["engine"], row["engine"]))}</td>',
            f"<td>{escape(row['precision'])}</td>",
            _cell(f"{row['score']:.4f}"),
            _cell(f"{row['low']:.4f} … {row['high']:.4f}"),
            _cell(f"{100 * (row['score'] - base['score']):+.2f}"),
            _cell(f"{row['median_ms']:.2f}"),
            _cell(f"{row['median_ms'] / base['median_ms']:.2f}"),
            *(_cell(_known(row[column.key], column.unit, column.form)) for column in known),
        ]
        body.append(f'<tr class="{"best" if place in front else ""}">{"".join(cells)}</tr>')
    text = (
        "<p>Bold: on the frontier. Against fp32: points of 100. Joules, weights, multiply-adds"
        " and instructions are of one text. Of a model whose texts leave early, time and weights"
        " are the mean over the texts that it was evaluated on, by the head at which each left.</p>"
    )
    return (
        f'<h2>Every point</h2>{text}<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{chr(10).join(body)}</tbody></table></div>"
    )


def _commands(content: Mapping[str, Any]) -> str:
    lines = {row["model"]: row["command"] for row in content["rows"] if row["command"]}
    parts = [
        f"<details><summary>{escape(str(model))}</summary><pre>{escape(text)}</pre></details>"
        for model, text in lines.items()
    ]
    return f"<h2>How to make each point again</h2>{''.join(parts)}"


def _cell(text: str) -> str:
    return f'<td class="n">{escape(text)}</td>'


def _known(value: Any, unit: float | None, form: str) -> str:
    if value is None:
        return "–"  # noqa: RUF001
    return form.format(value if unit is None else value / unit)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _steps(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from `low` or less to `high` or more."""
    size = max(high - low, LEAST_RANGE)
    power = 10.0 ** math.floor(math.log10(size / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size / 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [place * step for place in range(first, max(last, first + 1) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Numbers 1, 2 or 5 times a power of ten, from `low` or less to `high` or more."""
    numbers = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        for factor in (1, 2, 5)
    ]
    first = max(number for number in numbers if number <= low)
    last = min(number for number in numbers if number >= high and number > first)
    return [number for number in numbers if first <= number <= last]
