"""Writes the text of a dense kernel: a task's constants and tiles around ``dense.cuh``."""

from __future__ import annotations

from bertile.schedules.cuda.dense_tile import Operands, Tile
from bertile.schedules.cuda.forms import code, constants, pitch
from bertile.schedules.cuda.source import Extent, Kernel, Launch
from bertile.schedules.schedule import Knobs, Row
from bertile.schedules.task import Task

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "tanh", "silu")  # the enum of dense_finish.cuh

# Code that newer GPUs compile for themselves has no wgmma.
_WITHOUT = "#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)"


def kernel(task: Task, knobs: Knobs, row: Row) -> Kernel:
    """(x, [range], [residual], [cos, sin], w, [scale, [shift]], b, [limits], y): an entry for few
    rows, one for some and one for many.
    """
    of = Operands.of(task)
    parameters = _parameters(of)
    names = tuple(name for _, name in parameters)
    launches, tiles, structs, entries = [], [], [], []
    for name, when in _ranges(knobs).items():
        of_entry = {key.removeprefix(f"{name}_"): value for key, value in knobs.items()}
        tile = Tile.of(task, of_entry, row.gpu)
        tiles.append(tile)
        struct = name.title()
        structs.append(tile.constants(struct))
        if tile.grouped:
            structs.append(tile.plain().constants(f"{struct}Plain"))
        entry = f"{task.name}_{name}"
        entries.append(_entry(parameters, tile, entry, task.name, struct))
        columns = -(-of.columns // tile.columns)
        grid = (f"(rows + {tile.rows - 1}) // {tile.rows} * {columns}", 1, 1)
        launches.append(Launch(entry, grid, tile.threads, tile.shared, (*names, "rows"), when))
    source = "\n".join(
        [
            f"namespace {task.name} {{",
            _types(of),
            *_templates(of, any(tile.grouped for tile in tiles)),
            *structs,
            "}",
            *entries,
            "",
        ]
    )
    return Kernel(source, names, tuple(launches))


def _ranges(knobs: Knobs) -> dict[str, Extent]:
    """When each entry is launched: those that never are, are left out."""
    few, some = knobs["few"], max(knobs["few"], knobs["some"])
    ranges: dict[str, Extent] = {}
    if few:
        ranges["few"] = f"rows < {few}"
    if some > few:
        ranges["some"] = f"(rows >= {few}) * (rows < {some})" if few else f"rows < {some}"
    return {**ranges, "many": f"rows >= {some}" if some else 1}


def _parameters(of: Operands) -> list[tuple[str, str]]:
    """Types and names of the pointers, in order."""
    read = {"x": of.read, "residual": of.wide, "w": "u8", "y": of.result}
    names = ["x", *(["range"] if of.ranges else []), *(["residual"] if of.residual else [])]
    names += [*(["cos", "sin"] if of.turned else []), "w"]
    names += [*("scale", "shift")[: of.vectors - 1], "b"]
    names += [*(["limits"] if of.result == "u8" else []), "y"]
    return [
        (f"{read.get(name, 'float')}" if name == "y" else f"const {read.get(name, 'float')}", name)
        for name in names
    ]


def _types(of: Operands) -> str:
    sums = "int" if of.precision.in_bytes else "float"
    values = constants(
        PANEL=128,
        INPUT_BYTES=of.input_bytes,
        PANELS=of.panels,
        CHANNELS=of.channels,
        W_COLUMNS=of.columns,
        Y_PITCH=pitch(of.channels),
        VECTORS=of.vectors,
        RANGES=of.ranges,
        RESIDUAL=of.residual,
        NARROW=of.result == "u8",
        WIDE_RESULT=of.result == "float",
        ACTIVATION=ACTIVATIONS.index(of.activation),
        GATED=of.gated,
        TURNED=of.turned,
        HALF=max(1, of.head_size // 2),
        ANGLES_PITCH=pitch(of.head_size),
    )
    return f"""
using Wide = {of.wide};
using Result = {of.result};
using Sum = {sums};
using Sums = {sums}4;
{values}
struct Operands {{
  const u8 *x, *w;
  const Wide* residual;
  const float *range, *cos, *sin, *scale, *shift, *b, *limits;
  Result* y;
  int rows;
}};
"""


def _templates(of: Operands, grouped: bool) -> list[str]:
    """The text that is the same for all tiles."""
    if not of.precision.multiply:
        multiply = code("dense_simt.cuh")
    else:
        multiply = f"""
WORD void multiply_add(Sum (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {{
  {of.precision.multiply}(d, a, b);
}}
WORD unsigned as_multiplied(unsigned x) {{ return {of.precision.as_multiplied}; }}
{code("dense_mma.cuh")}"""
    parts = [multiply, code("dense_finish.cuh"), code("dense.cuh")]
    if grouped:
        wgmma = "wgmma_u8s8<N>" if of.precision.in_bytes else f"wgmma<{of.read}, N>"
        group = f"""
template <int N>
WORD void multiply_group(Sum (&d)[N / 2], unsigned long long a, unsigned long long b) {{
  {wgmma}(d, a, b, true);
}}"""
        parts += [_WITHOUT, "#else", group, code("dense_wgmma.cuh"), "#endif"]
    return parts


def _entry(
    parameters: list[tuple[str, str]], tile: Tile, entry: str, space: str, struct: str
) -> str:
    signature = ", ".join(f"{kind}* __restrict__ {name}" for kind, name in parameters)
    sets = [
        f"  of.{name} = {'(const u8*)' if name in ('x', 'w') else ''}{name};"
        for _, name in parameters
    ]
    call = [f"  {space}::dense<{space}::{struct}>(of);"]
    if tile.grouped:
        plain = f"  {space}::dense<{space}::{struct}Plain>(of);"
        call = [_WITHOUT, plain, "#else", f"  {space}::dense_by_groups<{space}::{struct}>(of);"]
        call.append("#endif")
    return "\n".join(
        [
            f'extern "C" __global__ void __launch_bounds__({tile.threads}, 1)',
            f"{entry}({signature}, int rows) {{",
            f"  {space}::Operands of = {{}};",
            *sets,
            "  of.rows = rows;",
            *call,
            "}",
        ]
    )
