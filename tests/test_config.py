"""Config: JSON in and out, unknown keys and bad values refused with what to type instead."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bertile.base.errors import UsageError
from bertile.config import CHECKS, Config


def test_json_round_trip_gives_an_equal_config() -> None:
    config = Config(
        target="x86-avx2", tune="quick", trials=64, timeout=1.5, threads=2, head="encoder"
    )
    assert Config.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["trials"] == 64


def test_from_json_keeps_defaults_for_missing_keys() -> None:
    assert Config.from_json('{"tune": "full"}') == Config(tune="full")


def test_every_field_has_a_check() -> None:
    assert list(CHECKS) == [field.name for field in dataclasses.fields(Config)]


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().tune = "full"  # type: ignore[misc]


def test_paths_become_text() -> None:
    assert Config(cache_dir=Path("a") / "b").cache_dir == "a/b"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"targets": "native"}, "configuration key 'targets' is unknown; did you mean 'target'?"),
        ({"target": "x86-avx521"}, "target 'x86-avx521' is unknown; did you mean 'x86-avx512'?"),
        ({"target": None}, "target 'None' is unknown"),
        ({"precision": "fp23"}, "precision 'fp23' is unknown; did you mean 'fp32'?"),
        ({"tune": "ful"}, "did you mean 'full'?"),
        ({"runtime": "includes"}, "did you mean 'include'?"),
        ({"head": "embeddings"}, "did you mean 'embedding'?"),
        ({"shipped_log": "no"}, "shipped_log is 'no'"),
        ({"trials": 0}, "trials is 0"),
        ({"trials": True}, "trials is True"),
        ({"trials": 1.5}, "trials is 1.5"),
        ({"threads": -1}, "threads is -1"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"timeout": float("inf")}, "timeout is inf"),
        ({"log_dir": ""}, "log_dir is ''"),
        ({"cache_dir": 3}, "cache_dir is 3"),
        ({"group_size": 48}, "group_size is 48"),
        ({"precision": "int8", "group_size": 64}, "group_size has no effect without 4-bit"),
        ({"precision": "int8", "rounding": "gptq"}, "rounding has no effect without 4-bit"),
        ({"precision": "int4", "rounding": "gptq"}, "rounding needs samples to calibrate on"),
        (
            {"precision": "int4", "ranges": "mse", "calibrate": "x"},
            "ranges has no effect without 8",
        ),
        ({"calibrate": "x.txt"}, "calibrate has no effect without quantization"),
    ],
)
def test_bad_values_are_refused_with_the_nearest_name(values: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Config.from_dict(values)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the configuration is not JSON"),
        ("[]", "a configuration is an object of keys, not list"),
        ('{"tune": "none", "tune": "full"}', "configuration key 'tune' is there twice"),
    ],
)
def test_text_that_is_no_configuration_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Config.from_json(text)


@pytest.mark.parametrize(
    ("asked", "fraction"),
    [("0.5%", 0.005), ("0.005", 0.005), (0.005, 0.005), ("100 %", 1.0), (0, 0)],
)
def test_accepted_loss_is_a_fraction_or_percent(asked, fraction):
    config = Config(precision="int8", max_drop=asked, eval="x.tsv")
    assert config.max_drop == pytest.approx(fraction)
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize("asked", ["0.5 points", "", "%", "101%", 1.5, -0.1, True, "nan%"])
def test_accepted_loss_without_a_meaning_is_refused(asked):
    with pytest.raises(UsageError, match=r"max_drop is .*0\.5%"):
        Config(precision="int8", max_drop=asked, eval="x.tsv")
