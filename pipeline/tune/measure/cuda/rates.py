"""Measures what the tensor cores of a GPU give by themselves: warps that multiply registers and
wait for nothing, with dense operands and with 2:4 sparse ones.

A sparse product counts the multiply-adds of the dense one that it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass

from bertile.schedules.cuda.source import Kernel, Launch
from bertile.targets.rows import Target
from bertile.tune.measure.cuda.card import Card

CHAINS, ROUNDS, WARPS, BLOCKS = 8, 2048, 8, 4  # independent sums of a warp; blocks of a processor
NAME = "rates.cubin"


@dataclass(frozen=True)
class Instruction:
    """``words`` of an instruction for 16 × 8 results, over ``depth`` values each."""

    words: str
    depth: int
    result: str = "float"
    sparse: bool = False

    def text(self, entry: str) -> str:
        """A kernel that does nothing else."""
        kind = "f" if self.result == "float" else "r"
        b = ", ".join(f"%{8 + n}" for n in range(4 if self.sparse else 2))
        operands = f"{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{{b}}}, {{%0, %1, %2, %3}}"
        operands += ", %12, 0x0" if self.sparse else ""
        sums = ", ".join(f'"+{kind}"(d[c][{n}])' for n in range(4))
        values = [*(f"a[{n}]" for n in range(4)), *(f"b[{n}]" for n in range(len(b.split())))]
        values += ["0x44444444u"] if self.sparse else []  # the first two of each four
        inputs = ", ".join(f'"r"({value})' for value in values)
        return f"""
extern "C" __global__ void __launch_bounds__({32 * WARPS}) {entry}(float* y) {{
  {self.result} d[{CHAINS}][4] = {{}};
  unsigned a[4], b[4];
  for (int i = 0; i < 4; ++i) a[i] = b[i] = threadIdx.x * 0x01020304u + i;
  for (int i = 0; i < {ROUNDS}; ++i)
#pragma unroll
    for (int c = 0; c < {CHAINS}; ++c)
      asm volatile("{self.words} {operands};" : {sums} : {inputs});
  {self.result} sum = 0;
  for (int c = 0; c < {CHAINS}; ++c) sum += d[c][0] + d[c][1] + d[c][2] + d[c][3];
  if (sum == 12345) y[0] = sum;  // so that the products are wanted
}}
"""


_SPARSE = "mma.sp::ordered_metadata.sync.aligned"
INSTRUCTIONS = {
    "fp16": Instruction("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", 16),
    "fp16_2_4": Instruction(f"{_SPARSE}.m16n8k32.row.col.f32.f16.f16.f32", 32, sparse=True),
    "int8": Instruction("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32", 32, "int"),
    "int8_2_4": Instruction(f"{_SPARSE}.m16n8k64.row.col.s32.s8.u8.s32", 64, "int", True),
}


def build(row: Target) -> bytes:
    """The cubin of all of them; the row is one with asynchronous copies, from cuda-sm80 on."""
    from bertile.codegen.cuda import compiler  # where this measures there is none

    text = "".join(instruction.text(f"rate_{name}") for name, instruction in INSTRUCTIONS.items())
    return compiler.find().run(compiler.prelude() + text, compiler.machine(row))


def measure(card: Card, image: bytes) -> dict[str, float]:
    """TFLOP/s (or 10^12 integer operations a second) of each kind of product."""
    rates = {}
    grid = BLOCKS * card.facts()["multiprocessors"]
    with card, card.memory() as memory, card.module(image) as module:
        place = {"y": memory.empty(4)}
        for name, instruction in INSTRUCTIONS.items():
            launch = Launch(f"rate_{name}", (grid, 1, 1), 32 * WARPS, 0, ("y",))
            with card.graph(module, [(Kernel("", ("y",), (launch,)), place, {})]) as graph:
                card.milliseconds(graph, 3)
                times = sorted(card.milliseconds(graph, 3) / 3 for _ in range(5))
            operations = 2.0 * 16 * 8 * instruction.depth * CHAINS * ROUNDS * WARPS * grid
            rates[name] = round(operations / times[2] / 1e9, 1)
    return rates
