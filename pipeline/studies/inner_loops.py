"""Tells what llvm-mca says of the loops in which the kernels of target rows spend most of their
time.

python -m bertile.studies.inner_loops
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bertile.base.errors import BertileError
from bertile.base.progress import Progress
from bertile.base.tables import table
from bertile.schedules import trial_sample
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.task import Task
from bertile.targets import rows as targets
from bertile.tune.estimate import mca
from bertile.tune.estimate.estimator import Code
from bertile.tune.estimate.loop_walk import Walk
from bertile.tune.log.chooser import Chooser
from bertile.tune.log.tuning_log import TuningLog

CASES = (("arm-a76", "int8"), ("arm-v1", "int8"), ("arm-v1", "bf16"), ("arm-a72", "fp32"))
LAYER = {"inputs": 768, "outputs": 768, "activation": "none", "residual": True}
BLOCKS = 8
CHAINS = 30  # independent sums: more than latency × pipes of any processor
# Multiply-adds of one instruction on its widest operands: 128 bits on ARM, 512 on x86.
MULTIPLY_ADDS = {
    "fmla": 4,
    "sdot": 16,
    "udot": 16,
    "usdot": 16,
    "smmla": 32,
    "ummla": 32,
    "usmmla": 32,
    "bfdot": 8,
    "bfmmla": 16,
    "vfmadd231ps": 16,
    "vpdpbusd": 64,
    "vdpbf16ps": 32,
}


class Loop(NamedTuple):
    """The block of a kernel that takes most of its time; `share` is of the kernel's cycles."""

    instruction: str
    instructions: int
    cycles: float
    multiply_adds: int
    peak: float  # multiply-adds a cycle, where nothing else is to do
    share: float

    @property
    def per_cycle(self) -> float:
        """Multiply-adds a cycle."""
        return self.multiply_adds / self.cycles


def inner_loop(task: Task, row: targets.Target, knobs: dict[str, int]) -> Loop:
    """The innermost loop of a kernel, as its row's model runs it."""
    model, schedule = mca.model_of(row), SCHEDULES[task.operation]
    code = Code.of(task, knobs, row)
    sample = trial_sample(task, BLOCKS, row)
    arguments = [*sample.activations, *schedule.pack(task, knobs, sample.weights, row)]
    sizes = [cache.size for cache in model.caches]
    walk = Walk(code.func, code.marks, sizes, 1, targets.resolve("native", 1))
    passes = walk.passes([*arguments, *sample.buffers()])
    cycles = code.cycles(model)
    spent = np.array(cycles) * code.times(passes.marks)
    hot = int(spent.argmax())
    lines = code.blocks[hot].instructions
    used = Counter(name for line in lines if (name := line.split()[0]) in MULTIPLY_ADDS)
    if not used:
        raise BertileError(f"the hottest loop of {task.name} for {row.name} multiplies nothing")
    (name, _), *_ = used.most_common()
    return Loop(
        instruction=name,
        instructions=len(lines),
        cycles=cycles[hot],
        multiply_adds=sum(MULTIPLY_ADDS[multiply] * count for multiply, count in used.items()),
        peak=_peak(name, lines, model),
        share=float(spent[hot] / spent.sum()),
    )


def _peak(name: str, lines: Sequence[str], model: mca.Model) -> float:
    """What the pipes do of this loop's multiply-adds where they are alone and wait for nothing."""
    product = next(line for line in lines if line.split()[0] == name)
    arm = model.triple.startswith("aarch64")
    register = re.compile(r"\bv\d+" if arm else r"(?<=mm)\d+")
    count = len(register.findall(product))
    total = 0 if arm else count - 1  # the operand that is added to
    apart = []
    for n in range(CHAINS):
        numbers = [n if place == total else CHAINS for place in range(count)]
        names = iter([f"v{number}" if arm else str(number) for number in numbers])
        apart.append(register.sub(lambda _, names=names: next(names), product))
    (alone,) = mca.analyse([apart], model)
    return MULTIPLY_ADDS[name] * len(apart) / alone.cycles


def as_text(loops: Sequence[tuple[str, str, Loop]], markdown: bool = False) -> str:
    """A row per kernel."""
    header = ("processor", "kernel", "multiplies by", "instructions", "cycles")
    header += ("multiply-adds a cycle", "peak", "% of peak", "% of the kernel")
    rows = [
        (
            processor,
            kernel,
            loop.instruction,
            loop.instructions,
            round(loop.cycles, 1),
            round(loop.per_cycle, 1),
            round(loop.peak, 1),
            round(100 * loop.per_cycle / loop.peak),
            round(100 * loop.share),
        )
        for processor, kernel, loop in loops
    ]
    return table(header, rows, markdown)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the kernels, find their loops, print the table."""
    parser = argparse.ArgumentParser(prog="python -m bertile.studies.inner_loops")
    add = parser.add_argument
    add("--case", metavar="TARGET:PRECISION", nargs="+", help="of these rows instead")
    add("--log-dir", metavar="DIR", help="your own tuning logs, whose choice of knobs is looked at")
    add("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    say = Progress().say
    log = TuningLog.open(options.log_dir, say)
    loops = []
    for name, precision in [case.split(":") for case in options.case or ()] or CASES:
        row = targets.resolve(name, 1)
        of_precision = {} if precision == "fp32" else {"precision": precision}
        task = Task("dense", {**LAYER, **of_precision})
        knobs = Chooser(log, row, say).choose(task).knobs
        loop = inner_loop(task, row, knobs)
        loops.append((mca.model_of(row).processor, f"dense {precision}", loop))
    print(as_text(loops, options.markdown))


if __name__ == "__main__":
    main()
