"""A bundle linked for musl, run as ARM code by musl."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from helpers import arm_code

from bertile import driver
from bertile.config import Config
from bertile.run import qemu

TINY = "synthetic:bert-tiny"


@pytest.mark.slow
def test_bundle_for_musl_gives_the_numbers_of_glibc(tmp_path):
    arm_code.need_emulator()
    config = Config(
        target="arm-a76",
        precision="int8",
        libc="musl",
        runtime="include",
        runtime_from=str(arm_code.RUNTIME),
        cache_dir=str(tmp_path / "cache"),
    )
    musl, glibc = tmp_path / "musl", tmp_path / "glibc"
    driver.compile(TINY, musl, config)
    arm_code.compile(TINY, glibc, str(tmp_path / "cache"), "arm-a76", "int8")
    assert b"libc.so.6" not in (musl / "lib.so").read_bytes()
    ids = np.random.default_rng(0).integers(1, 1000, (3, 37))
    np.savez(tmp_path / "in.npz", input_ids=ids)
    outputs = {}
    for bundle, start in (
        (musl, arm_code.musl_command(tmp_path, musl)),
        (glibc, [*qemu.command("aarch64", "cortex-a76"), str(glibc / "bertile-run")]),
    ):
        output = tmp_path / f"{bundle.name}.npz"
        line = [*start, "--input", str(tmp_path / "in.npz"), "--output", str(output)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        with np.load(output) as arrays:
            outputs[bundle.name] = dict(arrays)
    assert outputs["musl"].keys() == outputs["glibc"].keys() != set()
    for name, array in outputs["glibc"].items():
        assert np.array_equal(outputs["musl"][name], array)
