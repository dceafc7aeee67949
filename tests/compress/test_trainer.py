"""Training: one that was killed comes to the same weights, and two processes to those of one."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import tiny_training
from safetensors.torch import load_file

from bertile.compress import resume
from bertile.compress.distill import Distillation
from bertile.compress.learner import Learner
from bertile.compress.record import Record
from bertile.errors import UsageError

TESTS = Path(__file__).parents[1]
RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from helpers import tiny_training
directory, model, *settings = sys.argv[2:]
tiny_training.compress(Path(directory), Path(model), ("distill", "movement-90", "int8-static"),
                       "prune.pattern=4x1", "prune.sparsity=0.5", *settings)
"""
STEPS = ("train.steps=40", "train.save_every=5", "train.dropout=0.1", "prune.rewind=0.2")


def command(directory: Path, model: Path, *settings: str) -> list[str]:
    return [sys.executable, "-c", RUN, str(TESTS), str(directory), str(model), *settings]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "out" / "model.safetensors")


def assert_equal(some: Path, others: Path, tolerance: float = 0.0) -> None:
    mine, theirs = weights(some), weights(others)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, atol=tolerance, rtol=0)


def test_run_that_was_stopped_comes_to_the_same_weights(tmp_path, untrained, monkeypatch):
    """Masks, momentum, dropout, learned ranges and rewound weights go on where they were."""
    recipes = ("distill", "movement-90", "int8-static")
    settings = ("prune.sparsity=0.5", "train.steps=20", "train.save_every=3", *STEPS[2:])
    tiny_training.compress(tmp_path / "whole", untrained, recipes, *settings)
    add, stops = Record.add, [4, 8, 14, 17]

    def stopped(self: Record, step: int, **values: float) -> None:
        add(self, step, **values)
        if stops and step == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt

    monkeypatch.setattr(Record, "add", stopped)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            tiny_training.compress(tmp_path / "stopped", untrained, recipes, *settings)
    tiny_training.compress(tmp_path / "stopped", untrained, recipes, *settings)
    assert stops == []
    assert_equal(tmp_path / "whole", tmp_path / "stopped")
    rows = [(tmp_path / name / "out" / "steps.csv").read_text() for name in ("whole", "stopped")]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_run_that_was_killed_comes_to_the_same_weights(tmp_path, teacher):
    """kill -9 somewhere in the middle."""
    subprocess.run(command(tmp_path / "whole", teacher, *STEPS), check=True)
    process = subprocess.Popen(command(tmp_path / "killed", teacher, *STEPS))
    rows = tmp_path / "killed" / "out.work" / "steps.csv"
    deadline = time.monotonic() + 120
    while not rows.is_file() or len(rows.read_text().splitlines()) < 20:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    work = tmp_path / "killed" / "out.work"
    assert (work / resume.STATE).is_file() and not (tmp_path / "killed" / "out").exists()
    step = resume.load(work)["step"]
    assert 0 < step < 40
    subprocess.run(command(tmp_path / "killed", teacher, *STEPS), check=True)
    assert_equal(tmp_path / "whole", tmp_path / "killed")
    both = [
        list(csv.DictReader((tmp_path / name / "out" / "steps.csv").open()))
        for name in ("whole", "killed")
    ]
    assert both[0] == both[1] and [int(row["step"]) for row in both[0]] == list(range(1, 41))
    assert not work.exists()


@pytest.mark.slow
def test_two_processes_come_to_what_one_does(tmp_path, teacher):
    """By gloo, with batches shared; no dropout, whose chances differ."""
    settings = ("train.steps=12", "train.dropout=0")
    subprocess.run(command(tmp_path / "one", teacher, *settings), check=True)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    script = tmp_path / "run.py"
    script.write_text(RUN)
    arguments = command(tmp_path / "two", teacher, *settings)[3:]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    line = [*launch, str(script), *arguments]
    subprocess.run(line, check=True, env=environment)
    assert_equal(tmp_path / "one", tmp_path / "two", tolerance=2e-3)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_teacher_answers_in_the_precision_of_the_training(
    tmp_path, teacher, monkeypatch, precision
):
    """Half of a step is its own; what is compared with it is float32 all the same."""
    answer, compare, mixed, dtypes = Learner.forward, Distillation.forward, [], set()

    def answered(self: Learner, inputs: dict, **asked: object) -> dict:
        if {"hidden", "attention"} <= asked.keys():  # as the trainer asks the teacher
            mixed.append(torch.is_autocast_enabled("cpu"))
        return answer(self, inputs, **asked)

    def compared(self: Distillation, mine: dict, theirs: dict, mask: torch.Tensor) -> torch.Tensor:
        dtypes.update(state.dtype for state in (theirs["logits"], *theirs["hidden_states"]))
        return compare(self, mine, theirs, mask)

    monkeypatch.setattr(Learner, "forward", answered)
    monkeypatch.setattr(Distillation, "forward", compared)
    settings = ("train.steps=3", "distill.hidden=1", f"train.precision={precision}")
    tiny_training.compress(tmp_path, teacher, ("distill",), *settings)
    assert mixed == [precision == "bf16"] * 3 and dtypes == {torch.float32}


def test_seed_decides(tmp_path, untrained):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        settings = ("train.steps=4", f"train.seed={seed}", "train.dropout=0.1")
        tiny_training.compress(tmp_path / name, untrained, (), *settings)
    assert_equal(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_equal(tmp_path / "a", tmp_path / "c")


def test_directory_of_another_run_is_refused(tmp_path, untrained):
    work = tmp_path / "out.work"
    resume.begin(work, {"recipe": "another"})
    with pytest.raises(UsageError, match="holds another run"):
        tiny_training.compress(tmp_path, untrained, (), "train.steps=2")
    assert (work / resume.ASKED).exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        tiny_training.compress(tmp_path, untrained, (), "train.steps=2", work=tmp_path / "mine")


def test_state_is_replaced_whole(tmp_path, monkeypatch):
    resume.save(tmp_path, {"step": 5})

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        resume.save(tmp_path, {"step": 6})
    assert resume.load(tmp_path) == {"step": 5}


def test_curves_are_for_tensorboard_too(tmp_path, untrained):
    from tensorboard.backend.event_processing import event_accumulator

    work = tmp_path / "work"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "end", lambda _: None)
        tiny_training.compress(tmp_path, untrained, (), "train.steps=3", work=work)
    events = event_accumulator.EventAccumulator(str(work / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("loss")
    rows = list(csv.DictReader((tmp_path / "out" / "steps.csv").open()))
    assert [event.step for event in scalars] == [1, 2, 3]
    assert [event.value for event in scalars] == pytest.approx(
        [float(row["loss"]) for row in rows], rel=1e-4
    )
