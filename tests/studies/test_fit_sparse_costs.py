"""Fitting the cost model: constants that made the times come out again, and stand in the table."""

from __future__ import annotations

import pytest

from bertile.lower.sparse_choice import sparse_task
from bertile.schedules.task import Task
from bertile.studies import fit_sparse_costs
from bertile.studies.fit_sparse_costs import Point, as_text, fit, measure
from bertile.targets import rows
from bertile.tune.log.tuning_log import TuningLog

STEP, LIST = {"fp32": 2.0, "int8": 1.5}, 12.0


def points() -> list[Point]:
    """Shares as the model has them, a tenth beside them to and fro."""
    measured = []
    for precision, step in STEP.items():
        for inputs in (384, 768, 3072):
            for density in (3, 10, 40):
                shape = {"inputs": inputs, "outputs": 768, "activation": "none", "residual": True}
                shape |= {} if precision == "fp32" else {"precision": precision}
                depth = inputs // (4 if precision == "int8" else 1)
                share = step * density / 100 + LIST / depth
                for noise in (1.1, 1 / 1.1):
                    task = sparse_task(Task("dense", shape), density)
                    measured.append(Point(task, share * noise))
    return measured


def test_constants_that_made_the_points_are_found() -> None:
    fitted = fit(points())
    assert fitted.step == {name: pytest.approx(value, rel=0.03) for name, value in STEP.items()}
    assert fitted.start == pytest.approx(LIST, rel=0.05)
    assert fitted.error == pytest.approx(1.1, abs=0.02)
    text = as_text(points()[:1], fitted)
    assert "sparse_384_768_residual_3" in text and "STEP fp32 1.97, int8 1.48; LIST 11.8" in text


@pytest.mark.slow
def test_points_are_measured_here(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(fit_sparse_costs, "LAYERS", ((256, 64, "none", False),))
    monkeypatch.setattr(fit_sparse_costs, "DENSITIES", (5, 100))
    row, log = rows.resolve("native", 1), TuningLog([tmp_path], print)
    sparse, full = measure(["fp32"], row, log, print)
    assert (sparse.task.name, full.task.shape["density"]) == ("sparse_256_64_5", 100)
    assert 0 < sparse.share < full.share
