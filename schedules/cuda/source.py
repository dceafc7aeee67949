"""Describes a CUDA kernel as text, and how it is launched: what a schedule for CUDA gives in the
place of a PrimFunc.

Extents are written as arithmetic over symbols, which the loader evaluates for each shape of a
request: ``rows`` (what the kernel is run on: tokens in whole blocks of 16, or sequences),
``batch``, ``length`` and ``blocks`` (of tokens). A comparison (``rows < 1024``, ``rows >= 1024``)
is 1 or 0. An operand whose extent may be 1 or ``batch`` (or the number of heads) gives it as a
symbol of its own, ``NAME_AXIS``: ``mask_0``, ``ids0_1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Extent = int | str  # integers, symbols, + - * // < >= and parentheses; < and >= bind least


@dataclass(frozen=True)
class Launch:
    """One launch of an entry of the source.

    ``arguments`` are names of the kernel's operands and scratch buffers (pointers), or symbols
    (32-bit integers), in the order of the entry's parameters. Where ``when`` is not above 0 there
    is no such launch: a kernel has one way for few rows, say, and another for many.
    """

    entry: str
    grid: tuple[Extent, Extent, Extent]
    threads: int
    shared: int  # bytes of dynamic shared memory
    arguments: tuple[str, ...]
    when: Extent = 1


@dataclass(frozen=True)
class Kernel:
    """CUDA C++ in the words of ``prelude.cuh`` (which is not part of ``source``), and its launches
    in their order.

    ``operands`` name the activations, the packed weights and the results, in the order in which a
    schedule has them. ``scratch`` gives the bytes of buffers that live between the launches.
    """

    source: str
    operands: tuple[str, ...]
    launches: tuple[Launch, ...]
    scratch: Mapping[str, Extent] = field(default_factory=dict)
