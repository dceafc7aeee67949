"""Joules by the files of RAPL and of batteries, and a sentence where there are none."""

from __future__ import annotations

from pathlib import Path

from bertile.bench import energy


def package(place: Path, number: int, microjoules: int) -> Path:
    path = place / f"intel-rapl:{number}"
    path.mkdir(parents=True)
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text("1000000\n")
    return path / "energy_uj"


def test_packages_add_up_and_counters_wrap(tmp_path):
    first, second = (package(tmp_path, number, 900_000) for number in range(2))
    package(tmp_path, "0:0", 5)  # a part of the first
    gauge = energy.gauge(tmp_path, tmp_path)
    assert gauge is not None and gauge.name == "RAPL"
    first.write_text("950000")
    assert round(gauge.joules(), 6) == 0.05
    first.write_text("100000")
    second.write_text("950000")
    assert round(gauge.joules(), 6) == round(-0.85 + 0.05 + 2.0, 6)


def test_battery_falls(tmp_path):
    supply = tmp_path / "BAT0"
    supply.mkdir()
    (supply / "energy_now").write_text("50000000")
    gauge = energy.gauge(tmp_path / "none", tmp_path)
    assert gauge is not None and gauge.name == "battery"
    (supply / "energy_now").write_text("49990000")
    assert round(gauge.joules(), 6) == 36.0


def test_machine_without_gauges_says_so(tmp_path):
    assert energy.gauge(tmp_path, tmp_path) is None
    assert "neither RAPL nor a battery" in energy.why_not(tmp_path)
    (tmp_path / "intel-rapl:0").mkdir()
    assert energy.gauge(tmp_path, tmp_path) is None
    assert "by root alone" in energy.why_not(tmp_path)
