"""Spreads the cases of a large product over its rows: quick tests have a share of each row's, the
slow ones all.

The lines that write a kernel for a case (a shape, a form of its result) are the same for every row
and precision, and the other way round. A fault in them shows wherever a case and a row meet.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import pytest

from bertile.targets import rows as targets


def spread(
    names: str,
    rows: Sequence[str],
    kinds: Sequence[str],
    cases: Sequence[Any],
    share: int = 2,
    late: Container[tuple[str, str]] = (),
) -> pytest.MarkDecorator:
    """A test of the kernels of ``rows``, with each of ``kinds`` and each of ``cases``: ``names``.

    Quick is one case in ``share`` of a row and kind, the next row's and the next kind's being the
    neighbours; none where (row, kind) is among the ``late``. Kinds that are precisions which a row
    has not are left out: such a kernel cannot be built.
    """
    parameters = []
    for r, row in enumerate(rows):
        for k, kind in enumerate(kinds):
            if kind == "bf16" and not targets.resolve(row).bf16:
                continue
            for c, case in enumerate(cases):
                marks = [pytest.mark.slow] if (r + k + c) % share or (row, kind) in late else []
                words = "x".join(map(str, case)) if isinstance(case, tuple) else str(case)
                name = f"{row}-{kind}-{words}"
                parameters.append(pytest.param(row, kind, case, marks=marks, id=name))
    return pytest.mark.parametrize(("kernels", *names.split()), parameters, indirect=["kernels"])
