"""The tensor cores by themselves: the code has the products that are counted, sparse ones too."""

from __future__ import annotations

import contextlib

import pytest

from bertile.base.errors import PlatformError
from bertile.codegen.cuda import compiler, cubin
from bertile.targets.rows import resolve
from bertile.tune.measure.cuda import rates


@pytest.mark.parametrize("name", ["cuda-sm80", "cuda-sm90"])
def test_code_multiplies_as_often_as_it_is_counted(name):
    """Eight chains and a loop that the compiler unrolls; sparse products are instructions too."""
    try:
        compiler.find()
    except PlatformError as error:
        pytest.skip(str(error))
    kernels = cubin.read(rates.build(resolve(name)))
    assert set(kernels) == {f"rate_{kind}" for kind in rates.INSTRUCTIONS}
    for entry, used in kernels.items():
        product = "IMMA" if "int8" in entry else "HMMA"
        assert used.instructions[product] % rates.CHAINS == 0 < used.instructions[product]
        assert used.local == 0


class Clock:
    """A card on which every graph takes two milliseconds."""

    def facts(self):
        return {"multiprocessors": 132}

    @contextlib.contextmanager
    def memory(self):
        yield self

    module = graph = lambda self, *arguments: contextlib.nullcontext(arguments)

    def empty(self, size):
        return 256

    def milliseconds(self, graph, replays):
        return 2.0 * replays

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def test_sparse_products_count_what_they_stand_for():
    measured = rates.measure(Clock(), b"")
    operations = 2 * 16 * 8 * 16 * rates.CHAINS * rates.ROUNDS * rates.WARPS * rates.BLOCKS * 132
    assert measured["fp16"] == pytest.approx(operations / 2e-3 / 1e12, abs=0.1)
    assert measured["fp16_2_4"] == pytest.approx(2 * measured["fp16"], abs=0.2)
    assert measured["int8_2_4"] == pytest.approx(2 * measured["int8"], abs=0.2)
