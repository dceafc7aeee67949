"""Makes a smaller or faster model of a model, by recipes, on texts: `bertile compress`.

Before training: layers are left out, heads and neurons taken away, or zeros set at once. While it
trains: zeros grow, a teacher is followed, weights and activations are rounded as the compiler
rounds them. Behind it stands a plain Hugging Face directory, with REPORT beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bertile.base import directories, machine
from bertile.base.errors import UsageError, nearest, require
from bertile.base.progress import Progress
from bertile.compress import (
    data,
    fake_quant,
    learner,
    masks,
    resume,
    second_order,
    storage,
    structured,
    students,
    tasks,
    trainer,
)
from bertile.compress.data import Example, Split
from bertile.compress.distill import Distillation
from bertile.compress.learner import Learner, Opened
from bertile.compress.recipe import TRAINED, Distill, Recipe
from bertile.compress.record import FILE as STEPS
from bertile.compress.rewind import Rewind
from bertile.compress.tasks import Task, inputs_of
from bertile.evaluation import metrics
from bertile.export import early_heads, files
from bertile.export.learned_ranges import REPORT
from bertile.targets import rows

OBSERVED = 8  # batches by which learned ranges begin
WATCHED = 500  # texts that are evaluated in the middle of a training
EMBEDDING = Distill()  # what an embedding learns by, where no recipe says


def compress(
    model: str,
    output: str | Path,
    recipe: Recipe,
    task: str,
    dataset: str,
    evaluate: str | None = None,
    unlabelled: Sequence[str] = (),
    teacher: str | None = None,
    work: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train MODEL by a recipe, write it to `output`, and return what REPORT says there.

    `dataset`, `evaluate` and `unlabelled` are as `data.read` takes them; `teacher` None is the
    model itself as it was. `work` (default: `output` with ".work" behind it) keeps where the
    training is: a run that was killed goes on there. Raises UsageError or ModelError for what
    cannot be trained so; nothing half-written stays in `output`.
    """
    progress = progress or Progress(verbosity=-1)
    require("train", "accelerate", "tensorboard")
    if task not in tasks.TASKS:
        raise UsageError(f"task '{task}' is unknown{nearest(task, tasks.TASKS)}")
    directories.check(output, REPORT)
    run = _Run(model, recipe, tasks.TASKS[task], teacher, progress)
    place = Path(work) if work is not None else Path(f"{output}.work")
    accelerator = trainer.accelerator_of(recipe.train.precision)
    with progress.stage("data") as stage:
        split = data.read(task, dataset, evaluate, unlabelled)
        stage.detail = f"{len(split.train)} to train on, {len(split.test)} to evaluate on"
        stage.detail += f", {len(split.unlabelled)} unlabelled" if split.unlabelled else ""
    with progress.stage("load"):
        run.load(split)
    if accelerator.is_main_process:
        resume.begin(place, run.asked(split))
    accelerator.wait_for_everyone()
    with progress.stage("prepare") as stage:
        stage.detail = run.prepare(split)
    if recipe.trains:
        with progress.stage("train") as stage:
            lesson = run.lesson(split)
            trainer.train(lesson, place, accelerator, progress)
            stage.detail = f"{lesson.steps} steps"
    report: dict[str, Any] = {}
    if accelerator.is_main_process:
        with progress.stage("evaluate") as stage:
            report = run.report(split, dataset, evaluate, unlabelled)
            stage.detail = f"{report['metric']} {report['score']:.4f}"
        with progress.stage("write") as stage, directories.making(output, REPORT) as directory:
            run.write(directory)
            if recipe.trains:
                (directory / STEPS).write_bytes((place / STEPS).read_bytes())
            report = directories.mark(directory, REPORT, report)
            stage.detail = str(output)
        resume.end(place)
    accelerator.wait_for_everyone()
    return {**report, "output": str(output)}


class _Run:
    """One compression, step by step in the order of its methods."""

    def __init__(
        self, model: str, recipe: Recipe, task: Task, teacher: str | None, progress: Progress
    ) -> None:
        self.model, self.recipe, self.task, self.progress = model, recipe, task, progress
        self.teacher_name = teacher
        self.quantization: fake_quant.Quantization | None = None
        self.pruning: masks.Pruning | None = None
        self.removed: dict[str, int] = {}
        self.kept_layers: tuple[int, ...] | None = None
        _check(recipe, task)

    def load(self, split: Split) -> None:
        """The student, and the teacher where one is asked or needed."""
        labels = (
            data.labels_of((*split.train, *split.test)) if self.task.name != "answers" else None
        )
        torch.manual_seed(self.recipe.train.seed)
        self.opened = learner.open_model(self.model, self.task, labels, self.recipe.train.dropout)
        self.learner = Learner(self.opened, self.task.outputs)
        self.teacher: Opened | None = None
        if self.recipe.distill is not None or self.task.name == "embedding":
            self.teacher = learner.open_model(self.teacher_name or self.model, self.task, labels)
            _must_agree(self.opened, self.teacher)

    def asked(self, split: Split) -> dict[str, Any]:
        """What a run that goes on must have in common with the one that was stopped."""
        return {
            "bertile": version("bertile"),
            "model": files.fingerprint(self.model),
            "teacher": files.fingerprint(self.teacher_name) if self.teacher_name else None,
            "task": self.task.name,
            "recipe": self.recipe.to_dict(),
            "data": data.fingerprint(split),
        }

    def prepare(self, split: Split) -> str:
        """All that is done to the model before it trains; gives words on it."""
        recipe, opened, words = self.recipe, self.opened, []
        if recipe.depth is not None:
            self.kept_layers = students.shorten(opened.model, opened.family, recipe.depth)
            words.append(f"layers {', '.join(map(str, self.kept_layers))} kept")
        if recipe.structured is not None:
            self.removed = structured.remove(
                opened.model,
                opened.family,
                recipe.structured,
                self._batches(split.train, recipe.structured.batches),
                self._loss,
            )
            words.append(
                ", ".join(f"{count} {kind} taken away" for kind, count in self.removed.items())
            )
        if recipe.prune is not None and recipe.prune.method not in TRAINED:
            self._prune_at_once(split)
            words.append(f"{recipe.prune.sparsity:.0%} of weights set to zero")
        self._install(split)
        return "; ".join(words)

    def _prune_at_once(self, split: Split) -> None:
        prune, opened = self.recipe.prune, self.opened
        if prune.method == "second-order":
            size = self.recipe.train.batch
            batches = self._batches(split.train, -(-prune.texts // size))
            second_order.prune(
                opened.model, opened.family, prune, [inputs_of(batch) for batch in batches]
            )
            return
        for name, linear in self._encoder_linears().items():
            masks.check(name, linear.weight, prune.pattern)
            blocks = masks.in_blocks(linear.weight.detach().abs(), prune.pattern)
            stays = masks.spread(masks.kept(blocks, prune.sparsity, prune.pattern), prune.pattern)
            linear.weight.data *= stays

    def _install(self, split: Split) -> None:
        """What works while the model trains, in the order in which a weight goes through it."""
        recipe, linears = self.recipe, self._encoder_linears()
        if recipe.prune is not None and recipe.prune.method in TRAINED:
            self.pruning = masks.Pruning(linears, recipe.prune, self._steps(split))
        elif recipe.prune is not None and recipe.trains:
            for linear in linears.values():
                mask = masks.Held(linear.weight.detach() != 0)
                nn.utils.parametrize.register_parametrization(linear, "weight", mask)
        if recipe.storage is not None:
            storage.install(linears, recipe.storage)
        if recipe.quantize is not None:
            observed = [inputs_of(batch) for batch in self._batches(split.train, OBSERVED)]
            self.quantization = fake_quant.Quantization(
                self.opened.model, recipe.quantize, observed, self._bf16(), self._steps(split)
            )
        if recipe.early_exit is not None:
            self.learner.exits = early_heads.heads(
                self.opened.model, self.opened.family, recipe.early_exit.layers
            )
        if self.teacher is not None:
            distillation = recipe.distill or EMBEDDING
            self.learner.distillation = Distillation(
                distillation, self.task.outputs, self.opened.model, self.teacher.model
            )

    def lesson(self, split: Split) -> trainer.Lesson:
        """What the trainer is handed."""
        teacher = Learner(self.teacher, self.task.outputs) if self.teacher else None
        parts: list[Any] = [part for part in (self.pruning, self.quantization) if part is not None]
        if self.pruning is not None and self.recipe.prune.rewind is not None:
            early = round(self.recipe.prune.rewind * self._steps(split))
            parts.append(Rewind(self.learner, self.pruning, early))
        return trainer.Lesson(
            self.learner,
            self.opened,
            self.task,
            self._examples(split),
            self._whole_recipe(),
            teacher,
            parts,
            lambda: self._watched(split.test[:WATCHED]),
        )

    def _watched(self, examples: Sequence[Example]) -> dict[str, float]:
        """The metric on some texts, and the share of zeros, in the middle of a training."""
        linears = self._encoder_linears()
        shares = [(linear.weight == 0).float().mean() for linear in linears.values()]
        metric = self.score(examples)["score"]
        return {"metric": metric, "zeros": float(torch.stack(shares).mean())}

    def report(
        self, split: Split, dataset: str, evaluate: str | None, unlabelled: Sequence[str]
    ) -> dict[str, Any]:
        """What REPORT says, of the model as it will be compiled."""
        if self.quantization is not None:
            self.quantization.at(self.quantization.begin)
        score = self.score(split.test)
        linears = self._encoder_linears()
        zeros = masks.density(linears)
        weights = sum(linear.weight.numel() for linear in linears.values())
        share = sum(zeros[name] * linears[name].weight.numel() for name in linears) / weights
        report = {
            "model": self.model,
            "task": self.task.name,
            "data": {"train": dataset, "eval": evaluate, "unlabelled": list(unlabelled)},
            "examples": {
                "train": len(split.train),
                "test": len(split.test),
                "unlabelled": len(split.unlabelled),
            },
            "recipe": self.recipe.to_dict(),
            "steps": self._steps(split) if self.recipe.trains else 0,
            "teacher": self.teacher_name or (self.model if self.teacher else None),
            **score,
            "zeros": share,
            "layers": [{"layer": name, "zeros": value} for name, value in zeros.items()],
            "cpu": machine.cpu_name(),
            "versions": {"torch": torch.__version__, "bertile": version("bertile")},
        }
        if self.quantization is not None:
            report["attention"] = "bf16" if self.quantization.bf16 else "fp32"
            report["ranges"] = {n: list(ends) for n, ends in self.quantization.ends().items()}
        if self.kept_layers is not None:
            report["kept_layers"] = list(self.kept_layers)
        if self.removed:
            report["removed"] = self.removed
        if self.recipe.storage is not None:
            report["storage"] = storage.report(linears, self.recipe.storage)
        return report

    def score(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The metric of the task on some examples, and of a teacher on the same."""
        longest = self.recipe.train.longest
        mine = learner.answers(self.learner, self.opened, self.task, examples, longest)
        if self.task.name != "embedding":
            right = [self.task.correct(outputs, batch) for outputs, batch in mine]
            score = {"metric": self.task.metric, "score": float(np.concatenate(right).mean())}
            if self.learner.exits is not None:
                score["exits"] = [
                    float(
                        np.concatenate(
                            [
                                self.task.correct({"logits": outputs["exits"][place]}, batch)
                                for outputs, batch in mine
                            ]
                        ).mean()
                    )
                    for place in range(len(self.learner.exits))
                ]
            return score
        teacher = Learner(self.teacher, self.task.outputs)
        theirs = learner.answers(teacher, self.teacher, self.task, examples, longest)
        vectors, wanted = (
            np.concatenate([outputs["sentence_embedding"].numpy() for outputs, _ in answers])
            for answers in (mine, theirs)
        )
        return {
            "metric": self.task.metric,
            "score": metrics.similarity_spearman(vectors, wanted),
            "cosine": metrics.mean_cosine(vectors, wanted),
        }

    def write(self, directory: Path) -> None:
        """The model with all that was trained folded into plain weights."""
        if self.quantization is not None:
            self.quantization.remove()
        learner.fold(self.learner)
        learner.write(self.opened, directory)
        if self.learner.exits is not None:
            early_heads.write(self.learner.exits, directory)

    def _batches(self, examples: Sequence[Example], count: int) -> list[dict[str, Any]]:
        """The first texts, in batches."""
        size = self.recipe.train.batch
        return [
            self.opened.encode(self.task, examples[start : start + size], self.recipe.train.longest)
            for start in range(0, min(len(examples), count * size), size)
        ]

    def _loss(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """What structured pruning sees effects on: labels, or a teacher's vectors."""
        if self.teacher is None or self.task.name != "embedding":
            total, count = self.task.loss(self.learner(inputs_of(batch)), batch)
            return total / count.clamp(min=1)
        # a student that is its own teacher is at no distance: a random direction instead
        vectors = self.learner(inputs_of(batch))["sentence_embedding"]
        chance = torch.Generator().manual_seed(self.recipe.train.seed)
        return (vectors @ torch.randn(vectors.shape[1], generator=chance)).sum()

    def _examples(self, split: Split) -> tuple[Example, ...]:
        """With a teacher, unlabelled texts too."""
        return (*split.train, *(split.unlabelled if self.teacher is not None else ()))

    def _steps(self, split: Split) -> int:
        return trainer.steps_of(self.recipe.train, len(self._examples(split)))

    def _whole_recipe(self) -> Recipe:
        if self.teacher is not None and self.recipe.distill is None:
            return dataclasses.replace(self.recipe, distill=EMBEDDING)
        return self.recipe

    def _encoder_linears(self) -> dict[str, nn.Linear]:
        family, model = self.opened.family, self.opened.model
        return {k: v for layer in family.encoder_layers(model) for k, v in layer.items()}

    def _bf16(self) -> bool:
        """Whether attention multiplies in bfloat16."""
        asked = self.recipe.quantize.attention
        return rows.resolve().bf16 if asked == "auto" else asked == "bf16"


def _check(recipe: Recipe, task: Task) -> None:
    """Refuse what a task does not have."""
    if recipe.early_exit is not None and task.head != "sequence-classification":
        raise UsageError(
            f"early_exit is for texts that are classified, not for '{task.name}'",
            "leave the section out",
        )
    if recipe.early_exit is not None and recipe.quantize is not None:
        raise UsageError(
            "early_exit and quantize do not go together in one run",
            "train the heads first, then compile with --precision int8",
        )


def _must_agree(student: Opened, teacher: Opened) -> None:
    """A teacher answers with the same labels, about the same pieces of words."""
    if student.labels != teacher.labels:
        raise UsageError(
            "the teacher has other labels than the student, or in another order",
            "give the model that was fine-tuned on this data",
        )
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise UsageError(
            "the teacher's tokenizer has another vocabulary than the student's",
            "give a teacher whose tokens are the same",
        )
