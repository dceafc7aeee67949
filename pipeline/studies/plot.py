"""Lines of measured points come in; an SVG image of them, beside each other in panels, goes out.

Nothing is fetched and nothing runs in it: colours are written out, so that it looks the same
wherever an <img> shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 330  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 34, 40
ROW = 16  # of the legend
COLOURS = ("#1f6feb", "#c2570c", "#1a7f37", "#8250df", "#bf3989", "#57606a", "#9a6700", "#0a7ea4")
TEXT = 'font-family="system-ui, DejaVu Sans, sans-serif" font-size="12" fill="#57606a"'


@dataclass(frozen=True)
class Line:
    """(x, y) points; ``level`` is drawn without its points, dashed."""

    name: str
    points: tuple[tuple[float, float], ...]
    level: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes; y begins at 0."""

    title: str
    lines: tuple[Line, ...]
    x_name: str = ""
    y_name: str = ""


def svg(panels: Sequence[Panel]) -> str:
    """The image as a text: panels from left to right, under each what its colours mean."""
    rows = max(len(panel.lines) for panel in panels)
    width, height = WIDTH * len(panels), HEIGHT + ROW * rows + 8
    body = "".join(
        f'<g transform="translate({WIDTH * place} 0)">{_panel(panel)}</g>'
        for place, panel in enumerate(panels)
    )
    title = escape("; ".join(panel.title for panel in panels), quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" role="img" aria-label="{title}">'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>{body}</svg>\n'
    )


def _panel(panel: Panel) -> str:
    xs = [x for line in panel.lines for x, _ in line.points]
    x_ticks = _ticks(min(xs), max(xs))
    y_ticks = _ticks(0.0, max(y for line in panel.lines for _, y in line.points))
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(value: float) -> float:
        share = (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return round(LEFT + share * (right - LEFT), 1)

    def y(value: float) -> float:
        return round(floor - value / y_ticks[-1] * (floor - TOP), 1)

    parts = [_text(LEFT, TOP - 16, panel.title, "start", "#1c2330")]
    for tick in y_ticks:
        parts.append(
            f'<line x1="{LEFT}" x2="{right}" y1="{y(tick)}" y2="{y(tick)}" stroke="#dde1e8"/>'
        )
        parts.append(_text(LEFT - 6, y(tick) + 4, f"{tick:g}", "end"))
    parts += [_text(x(tick), floor + 16, f"{tick:g}", "middle") for tick in x_ticks]
    parts.append(_text((LEFT + right) / 2, floor + 33, panel.x_name, "middle"))
    parts.append(_text(LEFT - 6, TOP - 16, panel.y_name, "end"))
    for place, line in enumerate(panel.lines):
        colour = COLOURS[place % len(COLOURS)]
        parts.append(_line(line, colour, x, y))
        top = HEIGHT + ROW * place + 6
        parts.append(_stroke(f"M{LEFT} {top}H{LEFT + 24}", colour, line.level))
        parts.append(_text(LEFT + 32, top + 4, line.name, "start"))
    return "".join(parts)


def _line(line: Line, colour: str, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    places = [f"{x(a)} {y(b)}" for a, b in sorted(line.points)]
    parts = [_stroke(f"M{'L'.join(places)}", colour, line.level)]
    if not line.level:
        for a, b in line.points:
            parts.append(f'<circle cx="{x(a)}" cy="{y(b)}" r="3" fill="{colour}"/>')
    return "".join(parts)


def _stroke(path: str, colour: str, dashed: bool) -> str:
    dashes = ' stroke-dasharray="6 4"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'


def _text(x: float, y: float, text: str, anchor: str, fill: str = "") -> str:
    style = TEXT.replace("#57606a", fill) if fill else TEXT
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {style}>{escape(text)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Some five round numbers from `low` or less to `high` or more."""
    span = (high - low) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 4))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if span / (unit * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]
