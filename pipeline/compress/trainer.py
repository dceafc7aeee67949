"""Trains a learner by a recipe's losses: in one process or in several, from wherever it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bertile.base.errors import require
from bertile.base.progress import Progress
from bertile.compress import distill, resume, schedules
from bertile.compress.batches import Batches
from bertile.compress.data import Example
from bertile.compress.learner import Learner, Opened
from bertile.compress.recipe import Recipe, Train
from bertile.compress.record import Record
from bertile.compress.tasks import IGNORED, Task, inputs_of


class Part(Protocol):
    """What a recipe does to a model while it trains."""

    def at(self, step: int) -> None:
        """Before a step, counted from 0; once more behind the last."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """What is taught to whom: `examples` with and without labels, and who knows better.

    `watch` gives "metric" and "zeros" of the learner as it is, for the record of every state that
    is saved, and of the last step.
    """

    learner: Learner
    opened: Opened
    task: Task
    examples: Sequence[Example]
    recipe: Recipe
    teacher: Learner | None = None
    parts: Sequence[Part] = ()
    watch: Callable[[], dict[str, float]] | None = None

    @property
    def steps(self) -> int:
        """How many there are in all."""
        return steps_of(self.recipe.train, len(self.examples))


def steps_of(train: Train, examples: int) -> int:
    """How many steps a recipe takes for so many examples."""
    if train.steps is not None:
        return train.steps
    return max(1, round(train.epochs * examples / train.batch))


def accelerator_of(precision: str) -> Any:
    """accelerate's own, of the processes that `accelerate launch` has started, or of this one."""
    (accelerate,) = require("train", "accelerate")
    # what a run before it in this process has chosen
    accelerate.state.AcceleratorState._reset_state()
    unused = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
    return accelerate.Accelerator(mixed_precision=precision, kwargs_handlers=[unused])


def train(lesson: Lesson, work: Path, accelerator: Any, progress: Progress) -> None:
    """Take all steps that are left; the learner is changed in place.

    Where it stands is saved in `work` every `train.save_every` steps. Several processes share each
    batch, and come to what one comes to, up to the order of sums and to dropout.
    """
    torch.manual_seed(lesson.recipe.train.seed)
    training = _Training(lesson, work, accelerator)
    try:
        training.run(progress)
    finally:
        if training.record is not None:
            training.record.close()


class _Training:
    def __init__(self, lesson: Lesson, work: Path, accelerator: Any) -> None:
        self.lesson, self.work, self.accelerator = lesson, work, accelerator
        self.choices = lesson.recipe.train
        groups = _groups(lesson)
        # fused: one pass over the weights, where the plain loop makes ten
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)
        self.model, self.optimizer = accelerator.prepare(lesson.learner, optimizer)
        self.rates = [group["lr"] for group in groups]
        if lesson.teacher is not None:
            lesson.teacher.to(accelerator.device).eval()
        lengths = [sum(map(len, example.texts)) for example in lesson.examples]
        self.batches = Batches(lengths, self.choices.batch, self.choices.seed)
        self.done = self._resumed()
        self.record = Record(work, self.done) if accelerator.is_main_process else None

    def run(self, progress: Progress) -> None:
        total = self.lesson.steps
        for part in self.lesson.parts:  # what a step before has switched on
            part.at(max(0, self.done - 1))
        self.model.train()
        with progress.bar("train", total) as bar:
            bar.advance(self.done)
            for step in range(self.done, total):
                loss = self._step(step, total)
                saves = (step + 1) % self.choices.save_every == 0
                if self.record is not None:
                    seen = self._seen() if saves or step + 1 == total else {}
                    rate = self.rates[0] * self._share(step)
                    self.record.add(step + 1, loss=loss, rate=rate, **seen)
                bar.advance(note=f"loss {loss:.4f}")
                if saves and step + 1 < total:
                    self._save(step + 1)
        for part in self.lesson.parts:
            part.at(total)
        for learner in (self.accelerator.unwrap_model(self.model, False), self.lesson.teacher):
            if learner is not None:
                learner.to("cpu")

    def _seen(self) -> dict[str, float]:
        return self.lesson.watch() if self.lesson.watch is not None else {}

    def _share(self, step: int) -> float:
        total = self.lesson.steps
        return schedules.warm_linear(step, round(self.choices.warmup * total), total)

    def _step(self, step: int, total: int) -> float:
        for part in self.lesson.parts:
            part.at(step)
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * self._share(step)
        loss = self._loss(self.batches.at(step))
        for part in self.lesson.parts:
            if hasattr(part, "penalty"):
                loss = loss + part.penalty(step)
        self.accelerator.backward(loss)
        if self.choices.clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.choices.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(self.accelerator.reduce(loss.detach(), "mean"))

    def _loss(self, places: Sequence[int]) -> Tensor:
        """The mean over the batch, of whose texts this process computes its share."""
        lesson, processes = self.lesson, self.accelerator.num_processes
        examples = [lesson.examples[place] for place in places]
        whole = lesson.opened.encode(lesson.task, examples, self.choices.longest)
        share = slice(self.accelerator.process_index, None, processes)
        batch = {name: value[share].to(self.accelerator.device) for name, value in whole.items()}
        inputs = inputs_of(batch)
        theirs = None
        if lesson.teacher is not None:
            from accelerate.utils import convert_to_fp32

            learns = lesson.learner.distillation
            with torch.no_grad(), self.accelerator.autocast():
                theirs = lesson.teacher(inputs, hidden=learns.hidden, attention=learns.attention)
            theirs = convert_to_fp32(theirs)  # as the student's are
        mine = self.model(inputs, theirs=theirs)
        count, total = len(examples), batch["input_ids"].new_zeros((), dtype=torch.float32)
        weight = 1.0 if lesson.teacher is None else lesson.recipe.distill.labels
        if weight:
            hard, _ = lesson.task.loss(mine, batch)
            total = total + weight * hard / max(1, _labelled(whole))
        if theirs is not None:
            total = total + mine["distance"].sum() / count
            total = total + self._similarities(mine, theirs) / count
        if "exits" in mine:
            total = total + self._exits(mine, batch, whole)
        return total * processes  # of which the mean over processes is taken

    def _similarities(self, mine: Any, theirs: Any) -> Tensor | float:
        distillation = self.lesson.recipe.distill
        if not distillation.similarities or "sentence_embedding" not in mine:
            return 0.0
        vectors, wanted = mine["sentence_embedding"], theirs["sentence_embedding"]
        others, their_others = vectors, wanted
        if self.accelerator.num_processes > 1:
            from torch.distributed.nn.functional import all_gather

            others, their_others = (torch.cat(all_gather(x)) for x in (vectors, wanted))
        apart = distill.similarities(vectors, wanted, others, their_others)
        return distillation.similarities * apart.sum()

    def _exits(self, mine: Any, batch: Any, whole: Any) -> Tensor:
        """Each early head learns from the last one's answers, and from labels where there are; a
        text counts as much with a label as without, or a few labels would outweigh all the rest.
        """
        weight, total = self.lesson.recipe.early_exit.weight, 0.0
        final = mine["logits"].detach()
        for logits in mine["exits"]:
            apart = distill.soft(logits, final, batch["attention_mask"], 1.0).sum()
            hard, _ = self.lesson.task.loss({"logits": logits}, batch)
            total = total + (apart + hard) / len(whole["input_ids"])
        return weight * total

    def _save(self, step: int) -> None:
        chance = self._everyone(torch.get_rng_state())
        if self.accelerator.is_main_process:
            scaler = getattr(self.accelerator, "scaler", None)
            state = {
                "step": step,
                "learner": self.accelerator.unwrap_model(self.model).state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "chance": chance,
                "parts": [_state_of(part) for part in self.lesson.parts],
            }
            resume.save(self.work, state)
        self.accelerator.wait_for_everyone()

    def _everyone(self, value: Any) -> list[Any]:
        if self.accelerator.num_processes == 1:
            return [value]
        values: list[Any] = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(values, value)
        return values

    def _resumed(self) -> int:
        state = resume.load(self.work)
        if state is None:
            return 0
        self.accelerator.unwrap_model(self.model).load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for part, held in zip(self.lesson.parts, state["parts"]):
            if held is not None:
                part.load_state(held)
        if len(state["chance"]) == self.accelerator.num_processes:
            torch.set_rng_state(state["chance"][self.accelerator.process_index])
        return int(state["step"])


def _state_of(part: Any) -> Any:
    return part.state() if hasattr(part, "state") else None


def _labelled(batch: Any) -> int:
    """How many numbers the loss of labels is a sum of, in the whole batch."""
    return sum(int((batch[name] != IGNORED).sum()) for name in batch if name.startswith("wanted_"))


def _groups(lesson: Lesson) -> list[dict[str, Any]]:
    """Parameters by their learning rate and decay: matrices, what does not decay, and scores."""
    train, prune = lesson.recipe.train, lesson.recipe.prune
    scores = {id(p) for part in lesson.parts for p in getattr(part, "scores", lambda: ())()}
    matrices, vectors, scored = [], [], []
    for parameter in lesson.learner.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in scores:
            scored.append(parameter)
        else:
            (matrices if parameter.dim() > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "lr": train.rate, "weight_decay": train.decay},
        {"params": vectors, "lr": train.rate, "weight_decay": 0.0},
        {"params": scored, "lr": prune.score_rate if prune else 0.0, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
