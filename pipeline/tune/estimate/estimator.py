"""Candidates come in, times by llvm-mca's model of the target's pipelines go out: for machines that
one does not have.

A kernel is built to assembly and cut where control may branch; llvm-mca says how many cycles each
stretch takes, ``loop_walk`` how often it is passed and what comes from farther caches. What is not
known: latencies of memory, branches that are guessed wrong, threads in each other's way.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm

from bertile.base.errors import PlatformError
from bertile.codegen import llvm
from bertile.schedules import BLOCK_TOKENS, trial_sample
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.task import Task
from bertile.targets import rows
from bertile.targets.rows import Target
from bertile.tune.estimate import loop_marks, mca
from bertile.tune.estimate.loop_walk import Walk

_MARK = re.compile(rf"\s*\S+ {loop_marks.MARK} (\d+)")
_LABEL = re.compile(r"[^\s#/]+:")
# Behind these the code may go on elsewhere; a call comes back.
_BRANCH = re.compile(r"\s*(j[a-z]+|retq?|b|b\.[a-z]+|cbn?z|tbn?z|br|ret)\b")
_JUMP = re.compile(r"\s*(?:jmp|b)\s+(\S+)")  # always
_RETURN = re.compile(r"\s*ret")
# What LLVM writes before a comment, by architecture.
COMMENTS = {"aarch64": "//", "x86_64": "#"}
_INSTRUCTION = re.compile(r"\s+[a-z]")
OVERLAP = 7
_NEVER = 1e-6  # passes: what divides nothing by nothing


class Estimator:
    """Says of a candidate what ``TrialRunner`` says, without running it. A context manager too."""

    parallel = 1

    def __init__(self, row: Target) -> None:
        self._row, self._model = row, mca.model_of(row)
        mca.tool(self._model)  # what is missing is said before anything is built
        self._here = rows.resolve("native", 1)

    def __enter__(self) -> Estimator:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def run(
        self, task: Task, knobs: Mapping[str, int], blocks: int, also: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Estimated microseconds on ``blocks`` blocks of tokens, and on other numbers of them."""
        try:
            cycles = self._cycles(task, dict(knobs), (blocks, *also))
        except PlatformError:
            raise
        except Exception as error:  # a candidate that cannot be built is its own result
            return {"error": f"{type(error).__name__}: {str(error).strip()[-300:]}"}
        times = [[total / self._model.gigahertz / 1e3] for total in cycles]
        rest = {str(count * BLOCK_TOKENS): time for count, time in zip(also, times[1:])}
        machine = {"cpu": f"{self._model.processor} by llvm-mca", "row": self._row.name}
        return {"microseconds": times[0], "also": rest, "machine": machine}

    def _cycles(self, task: Task, knobs: dict[str, int], counts: Sequence[int]) -> list[float]:
        """Of the whole kernel, on each of these numbers of blocks."""
        caches = self._model.caches
        code = Code.of(task, knobs, self._row)
        each = code.cycles(self._model)
        sizes = [cache.size for cache in caches]
        walk = Walk(code.func, code.marks, sizes, self._row.threads, self._here)
        weights = trial_sample(task, counts[0], self._row).weights
        packed = SCHEDULES[task.operation].pack(task, knobs, weights, self._row)
        totals = []
        for count in counts:
            sample = trial_sample(task, count, self._row)
            passes = walk.passes([*sample.activations, *packed, *sample.buffers()])
            computing = sum(cost * times for cost, times in zip(each, code.times(passes.marks)))
            moved = [lines * cache.cycles for lines, cache in zip(passes.fetched, caches)]
            totals.append(together(computing, *moved))
        return totals


def together(*cycles: float) -> float:
    """What several limits come to that hold at once: the largest, more where others are near it.

    The exponent is from dense kernels whose first-level cache fetches for as long as they compute:
    they take a tenth longer than either.
    """
    return sum(part**OVERLAP for part in cycles) ** (1 / OVERLAP)


@dataclass
class Block:
    """Instructions that follow each other, the marks among them, and what it is called."""

    instructions: list[str] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Code:
    """A kernel as marked TIR, and as blocks of the target's instructions."""

    func: tvm.tirx.PrimFunc
    marks: int
    blocks: list[Block]

    @classmethod
    def of(cls, task: Task, knobs: dict[str, int], row: Target) -> Code:
        """Build a candidate's assembly for its row."""
        comment = COMMENTS[row.arch]
        kernel = SCHEDULES[task.operation].kernel(task, knobs, row)
        func, marks = loop_marks.marked(kernel, comment)
        return cls(func, marks, blocks(assembly(func, row)))

    def cycles(self, model: mca.Model) -> list[float]:
        """What one pass of each block takes."""
        return [
            stretch.cycles for stretch in mca.analyse([b.instructions for b in self.blocks], model)
        ]

    def times(self, passes: Sequence[int]) -> list[float]:
        """How often each block is passed, where each mark is passed so often.

        A mark that LLVM has copied counts once for all its copies, each of which is passed as often
        as what comes next to it with a mark of its own: the loop for the last, padded panel is a
        copy of the loop for all others. A block without a mark is passed as often as the block
        before it.
        """
        copies = Counter(mark for block in self.blocks for mark in block.marks)
        at = {label: place for place, block in enumerate(self.blocks) for label in block.labels}
        likely = [self._likely(n, at, passes, copies) for n in range(len(self.blocks))]
        total: Counter[int] = Counter()
        for block, weight in zip(self.blocks, likely):
            for mark in block.marks:
                total[mark] += weight
        block_passes, last = [], 0.0
        for block, weight in zip(self.blocks, likely):
            if block.marks:
                last = max(passes[mark] * weight / total[mark] for mark in block.marks)
            block_passes.append(last)
        return block_passes

    def _likely(
        self,
        place: int | None,
        at: Mapping[str, int],
        passes: Sequence[int],
        copies: Mapping[int, int],
    ) -> float:
        """How often the next block from a place on is passed that has a mark without a copy."""
        seen: set[int] = set()
        while place is not None and place < len(self.blocks) and place not in seen:
            seen.add(place)
            block = self.blocks[place]
            if own := [passes[mark] for mark in block.marks if copies[mark] == 1]:
                return max(*own, _NEVER)
            end = block.instructions[-1] if block.instructions else ""
            if _RETURN.match(end):
                break
            jump = _JUMP.match(end)
            place = at.get(jump[1]) if jump else place + 1
        return _NEVER


def assembly(func: tvm.tirx.PrimFunc, row: Target) -> str:
    """The text that LLVM makes of a kernel."""
    return llvm.compiled(func, row).inspect_source("asm")


def blocks(text: str) -> list[Block]:
    """The text cut at labels and behind branches; directives are left out."""
    pieces = [Block()]
    for line in text.splitlines():
        if mark := _MARK.match(line):
            pieces[-1].marks.append(int(mark[1]))
        elif _LABEL.match(line):
            if pieces[-1].instructions or pieces[-1].marks:
                pieces.append(Block())
            pieces[-1].labels.append(line.split(":")[0])
        elif _INSTRUCTION.match(line):
            pieces[-1].instructions.append(line)
            if _BRANCH.match(line):
                pieces.append(Block())
    return [block for block in pieces if block.instructions or block.marks]
