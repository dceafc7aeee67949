"""Writes the contents of a report as one HTML page with its own CSS and SVG.

Nothing is fetched and nothing runs: the page can be mailed, kept and read without a network. The
markup is well-formed XML too, which is how the tests read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from bertile.report.content import Curve, Page

WIDTH, HEIGHT = 340, 150
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 30
HEADROOM = 1.6  # trials slower than this many times the first best are drawn at the upper edge

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f9; --ink: #1c2330; --soft: #5d6778;
  --line: #dde1e8; --main: #1f6feb; --faint: #9fb4d6; --warm: #c2570c; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161d; --card: #1a2029; --ink: #e6eaf1;
  --soft: #9aa5b6; --line: #2d3542; --main: #6ea8fe; --faint: #4a6288; --warm: #f0883e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 28px 20px 60px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 24px; margin: 0 0 10px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 34px 0 10px; }
p, dd, dt { margin: 0; } p { color: var(--soft); max-width: 80ch; margin-bottom: 10px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; }
dt { color: var(--soft); } dd { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th.n, td.n { text-align: right; white-space: nowrap; } td.name { overflow-wrap: anywhere; }
td.knobs { color: var(--soft); font-size: 13px; }
.bar { display: inline-block; width: 90px; height: 8px; margin-right: 10px; border-radius: 4px;
  background: var(--line); overflow: hidden; text-align: left; }
.share { display: inline-block; min-width: 2.6em; }
.bar span { display: block; height: 8px; background: var(--main); }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 14px; }
figure { margin: 0; padding: 10px 12px; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; } figcaption { font-size: 13px; overflow-wrap: anywhere; }
figcaption b { display: block; } figcaption span { color: var(--soft); }
svg { display: block; width: 100%; height: auto; margin-top: 6px; }
svg text { font-size: 11px; fill: var(--soft); } .axis { stroke: var(--line); }
.steps { fill: none; stroke: var(--main); stroke-width: 2; }
.trial { fill: var(--faint); } .failed { stroke: var(--warm); stroke-width: 1.2; }
.default { stroke: var(--warm); stroke-dasharray: 4 3; }
"""


def html(page: Page) -> str:
    """The whole page as one text."""
    title = escape(page.title)
    sections = [_facts(page), _kernels(page), _gains(page.curves), _curves(page.curves)]
    return (
        "<!DOCTYPE html>\n"
        f'<html lang="en"><head><meta charset="utf-8"/><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n"
        f"{chr(10).join(part for part in sections if part)}\n</body></html>\n"
    )


def _facts(page: Page) -> str:
    pairs = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in page.facts.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _kernels(page: Page) -> str:
    if not page.kernels:
        return ""
    header = (("kernel", ""), ("origin", ""), ("calls", "n"), ("ms", "n"), ("time %", "n"))
    header += (("GFLOP/s", "n"), ("peak %", "n"))
    rows = [
        [
            _cell(row["kernel"], "name"),
            _cell(row["origin"]),
            _cell(row["calls"], "n"),
            _cell(f"{row['ms']:.3f}", "n"),
            _share(row["time %"]),
            _cell(_number(row["GFLOP/s"]), "n"),
            _share(row["peak %"]),
        ]
        for row in page.kernels
    ]
    text = "".join(f"<p>{escape(note)}</p>" for note in page.notes)
    if page.fallthrough:
        text += f"<p>Operators on TVM's own kernels: {escape(', '.join(page.fallthrough))}.</p>"
    return f"<h2>Time per kernel</h2>{text}{_table('kernels', header, rows)}"


def _gains(curves: Sequence[Curve]) -> str:
    if not curves:
        return "<h2>Tuning</h2><p>The log has no records of these kernels.</p>"
    header = (("task", ""), ("threads", "n"), ("trials", "n"), ("default µs", "n"))
    header += (("best µs", "n"), ("speed-up", "n"), ("best settings", ""))
    rows = []
    for curve in curves:
        gain = curve.default / curve.best if curve.default and curve.best else None
        knobs = ", ".join(f"{name} {value}" for name, value in curve.knobs.items())
        rows.append(
            [
                _cell(curve.name, "name"),
                _cell(curve.threads, "n"),
                _cell(len(curve.trials), "n"),
                _cell(_number(curve.default), "n"),
                _cell(_number(curve.best), "n"),
                _cell(f"{gain:.2f} ×" if gain else "–", "n"),  # noqa: RUF001
                _cell(knobs, "knobs"),
            ]
        )
    return f"<h2>Before and after tuning</h2>{_whole(curves)}{_table('gains', header, rows)}"


def _whole(curves: Sequence[Curve]) -> str:
    """The gain over a whole request, for each number of threads that all is known of."""
    text = ""
    for threads in sorted({curve.threads for curve in curves}):
        known = [c for c in curves if c.threads == threads and c.calls and c.default and c.best]
        if known:
            before = sum(c.calls * c.default for c in known) / 1e3
            after = sum(c.calls * c.best for c in known) / 1e3
            text += (
                f"<p>{len(known)} kernels whose defaults were measured, as often as a request"
                f" calls them, on {threads} threads: {before:.2f} ms before, {after:.2f} ms"
                " after.</p>"
            )
    return text


def _curves(curves: Sequence[Curve]) -> str:
    if not curves:
        return ""
    legend = (
        "<p>Line: best time so far against trials. Dots: each trial (at the upper edge: slower"
        " than the scale). Short strokes below: failed trials. Dashes: the untuned default.</p>"
    )
    figures = "\n".join(map(_figure, curves))
    return f'<h2>Tuning curves</h2>{legend}<div class="curves">{figures}</div>'


def _figure(curve: Curve) -> str:
    failed = sum(trial is None for trial in curve.trials)
    best = f"best {_number(curve.best)} µs" if curve.best else "every trial failed"
    detail = f"{curve.threads} threads, {len(curve.trials)} trials, {failed} failed, {best}"
    origin = ", ".join(part for part in (curve.machine, curve.when) if part)
    caption = f"<b>{escape(curve.name)}</b><span>{escape(detail)}</span>"
    caption += f"<br/><span>{escape(origin)}</span>" if origin else ""
    return f"<figure><figcaption>{caption}</figcaption>{_svg(curve)}</figure>"


def _svg(curve: Curve) -> str:
    steps = curve.best_so_far
    low, high = _scale(curve)
    count = max(2, len(curve.trials))

    def x(trial: float) -> float:
        return round(LEFT + (trial - 1) / (count - 1) * (WIDTH - LEFT - RIGHT), 1)

    def y(microseconds: float) -> float:
        share = (min(microseconds, high) - low) / (high - low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    floor = HEIGHT - BOTTOM
    parts = []
    for value in (low, (low + high) / 2, high):
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 6}" y="{y(value) + 4}" text-anchor="end">'
            f"{_tick(value, high - low)}</text>"
        )
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 8}">1</text>')
    parts.append(
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">'
        f"{len(curve.trials)} trials</text>"
    )
    parts.append(f'<text x="{LEFT - 6}" y="{HEIGHT - 8}" text-anchor="end">µs</text>')
    for number, trial in enumerate(curve.trials, 1):
        if trial is None:
            parts.append(
                f'<line class="failed" x1="{x(number)}" x2="{x(number)}"'
                f' y1="{floor + 2}" y2="{floor + 7}"/>'
            )
        else:
            parts.append(f'<circle class="trial" cx="{x(number)}" cy="{y(trial)}" r="2"/>')
    if curve.default is not None:
        parts.append(
            f'<line class="default" x1="{LEFT}" x2="{WIDTH - RIGHT}"'
            f' y1="{y(curve.default)}" y2="{y(curve.default)}"/>'
        )
    if steps:
        path = f"M{x(steps[0][0])} {y(steps[0][1])}"
        for trial, microseconds in steps[1:]:
            path += f"H{x(trial)}V{y(microseconds)}"
        parts.append(f'<path class="steps" d="{path}H{x(len(curve.trials))}"/>')
    label = escape(f"tuning curve of {curve.name}, {curve.threads} threads", quote=True)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _scale(curve: Curve) -> tuple[float, float]:
    """Microseconds at the lower and upper edge: the best and the default, and most trials."""
    works = [trial for trial in curve.trials if trial is not None]
    if not works:
        return 0.0, 1.0
    start = curve.best_so_far[0][1]
    high = max(start, curve.default or 0.0, min(max(works), HEADROOM * start))
    low = min(works)
    margin = 0.08 * (high - low) or 0.05 * high
    return max(0.0, low - margin), high + margin


def _table(name: str, header: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th class="{kind}">{escape(text)}</th>' for text, kind in header)
    body = "".join(f"<tr>{''.join(row)}</tr>\n" for row in rows)
    return (
        f'<div class="wide"><table id="{name}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any, kind: str = "") -> str:
    return f'<td class="{kind}">{escape(str(value))}</td>'


def _share(percent: float | None) -> str:
    if percent is None:
        return _cell("–", "n")  # noqa: RUF001
    width = max(0.0, min(100.0, percent))
    bar = f'<span class="bar"><span style="width:{width:.0f}%"></span></span>'
    return f'<td class="n">{bar}<span class="share">{percent:.1f}</span></td>'


def _number(value: float | None) -> str:
    if value is None:
        return "–"  # noqa: RUF001
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _tick(value: float, span: float) -> str:
    return f"{value:.0f}" if span >= 20 else f"{value:.1f}" if span >= 1 else f"{value:.2f}"
