"""Time against sparsity: what is measured, where sparse kernels begin to pay, the files."""

from __future__ import annotations

import csv
from xml.etree import ElementTree

import pytest

from bertile.base.progress import Progress
from bertile.config import Config
from bertile.studies.sparse_curve import (
    DENSE,
    SPARSE,
    Row,
    Series,
    as_csv,
    as_svg,
    crossover,
    measure,
    named,
)


def rows(dense: float, **sparse: float) -> list[Row]:
    """Of one series: the dense kernels' time, and the sparse ones' as at50=3.0."""
    points = {float(name.removeprefix("at")) / 100: time for name, time in sparse.items()}
    others = [Row("int8", "4x1", share, SPARSE, time, time) for share, time in points.items()]
    return [Row("int8", "4x1", 0.0, DENSE, dense, dense), *others]


@pytest.mark.parametrize(
    ("times", "where"),
    [
        ({"at0": 20.0, "at50": 12.0, "at90": 4.0}, 0.6),
        ({"at0": 20.0, "at50": 10.0, "at90": 4.0}, 0.5),
        ({"at0": 9.0, "at90": 4.0}, 0.0),
        ({"at0": 20.0, "at90": 11.0}, None),
        ({"at0": 9.0, "at50": 14.0, "at90": 6.0}, 0.7),  # the last time that it gets faster counts
    ],
)
def test_crossover_lies_between_two_points(times: dict[str, float], where: float | None) -> None:
    sparsity = crossover(rows(10.0, **times))
    assert sparsity == (where if where is None else pytest.approx(where))


def test_files_hold_every_row() -> None:
    curve = [*rows(10.0, at0=12.0, at90=3.0), Row("int8", "4x1", 0.9, "Peer 1", 5.0, 6.0)]
    read = list(csv.DictReader(as_csv(curve).splitlines()))
    assert [line["engine"] for line in read] == [DENSE, SPARSE, SPARSE, "Peer 1"]
    assert [float(line["sparsity"]) for line in read] == [0.0, 0.0, 0.9, 0.9]
    text = as_svg([*curve, Row("fp32", "unstructured", 0.0, DENSE, 99.0, 99.0)], "a model")
    ElementTree.fromstring(text)
    for name in ("int8, a model", "fp32, a model", f"Bertile, {DENSE}", "Bertile, 4x1", "Peer 1"):
        assert f">{name}<" in text


def test_zero_sparsity_is_the_model_itself() -> None:
    assert named("bert-tiny", 0.0, "4x1") == "synthetic:bert-tiny"
    assert named("bert-tiny", 0.9, "4x1") == "synthetic:bert-tiny@0.9:4x1"


@pytest.mark.slow
def test_curve_of_a_small_model(tmp_path) -> None:
    config = Config(threads=1, cache_dir=str(tmp_path), runtime="none")
    series = Series("int8", "4x1", (0.0, 0.9), (0.9,), ("onnxruntime",))
    curve = measure("bert-tiny", series, config, 16, 2, Progress(-1))
    assert [(row.sparsity, row.engine.split()[0]) for row in curve] == [
        (0.0, "dense"),
        (0.0, "sparse"),
        (0.9, "sparse"),
        (0.9, "ONNX"),
    ]
    assert all(0 < row.median_ms <= row.p90_ms for row in curve)
