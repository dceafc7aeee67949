"""Joins the parts of a kernel's one entry into its text, each in a namespace of its own: all
kernels of a model are compiled as one program.
"""

from __future__ import annotations

from collections.abc import Sequence

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cuda.source import Extent, Kernel, Launch


def program(
    name: str,
    threads: int,
    grid: tuple[Extent, Extent, Extent],
    pointers: Sequence[tuple[str, str]],
    extents: Sequence[str],
    helpers: str,
    body: str,
    shared: int = 0,
    when: Extent = 1,
) -> Kernel:
    """The kernel whose operands are ``pointers`` (type, name); it also reads the symbols
    ``extents``.

    None of the pointers is ``__restrict__``: nvcc moves loads through such behind barriers, and
    with them the time in which other copies would be on their way.
    """
    operands = tuple(operand for _, operand in pointers)
    signature = ", ".join(
        [
            *(f"{kind}* {operand}" for kind, operand in pointers),
            *(f"int {extent}" for extent in extents),
        ]
    )
    source = f"""
namespace parts_of_{name} {{
constexpr int BLOCK_TOKENS = {BLOCK_TOKENS};
{helpers}
__device__ inline void run({signature}) {{{body}
}}
}}
extern "C" __global__ void __launch_bounds__({threads}) {name}({signature}) {{
  parts_of_{name}::run({", ".join([*operands, *extents])});
}}
"""
    launch = Launch(name, grid, threads, shared, (*operands, *extents), when)
    return Kernel(source, operands, (launch,))


def together(*kernels: Kernel) -> Kernel:
    """One kernel of several that have the same operands: their launches follow each other."""
    source = "".join(kernel.source for kernel in kernels)
    launches = tuple(launch for kernel in kernels for launch in kernel.launches)
    return Kernel(source, kernels[0].operands, launches)
