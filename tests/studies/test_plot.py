"""The image of measured lines: well-formed, to scale, and readable without colours."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from bertile.studies.plot import Line, Panel, _ticks, svg

SPACE = "{http://www.w3.org/2000/svg}"


def drawn(*lines: Line) -> ElementTree.Element:
    return ElementTree.fromstring(svg([Panel("a < b", lines, "x", "ms")]))


def test_points_lie_to_scale() -> None:
    root = drawn(Line("one", ((0.0, 10.0), (50.0, 5.0), (100.0, 0.0))))
    places = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SPACE}circle")]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x0 < x1 < x2 and y0 < y1 < y2  # y grows downwards
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)


def test_every_line_is_named_and_levels_are_dashed() -> None:
    root = drawn(Line("level", ((0, 3), (9, 3)), level=True), Line("other", ((0, 1), (9, 2))))
    texts = [text.text for text in root.iter(f"{SPACE}text")]
    assert {"level", "other", "a < b", "x", "ms"} <= set(texts)
    dashed = [path for path in root.iter(f"{SPACE}path") if path.get("stroke-dasharray")]
    assert len(dashed) == 2  # the line, and its sample in the legend
    assert len({path.get("stroke") for path in root.iter(f"{SPACE}path")}) == 2


def test_panels_stand_side_by_side() -> None:
    panel = Panel("one", (Line("line", ((0, 1), (1, 2))),))
    single, double = (ElementTree.fromstring(svg([panel] * count)) for count in (1, 2))
    assert float(double.get("width")) == 2 * float(single.get("width"))
    assert single.get("height") == double.get("height")


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 98.0, [0, 20, 40, 60, 80, 100]),
        (0.0, 0.3, [0, 0.1, 0.2, 0.3]),
        (80.0, 80.0, [80.0, 80.2]),
        (0.0, 104.0, [0, 25, 50, 75, 100, 125]),
    ],
)
def test_ticks_are_round_and_reach_both_ends(low: float, high: float, ticks: list) -> None:
    assert _ticks(low, high) == pytest.approx(ticks)
