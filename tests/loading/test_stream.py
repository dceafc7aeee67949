"""Streams of one model answer callers at once, with one copy of the weights."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import tiny_bundle
from helpers.tiny_bundle import MANIFEST, PARAMS, assert_same, expected, random_ids

from bertile import loader
from bertile.base.errors import BertileError, InputError
from bertile.bundle import writer


@pytest.fixture(scope="module")
def directory(stages, tmp_path_factory):
    library, place = tiny_bundle.library(stages), tmp_path_factory.mktemp("streams") / "tiny"
    return writer.write(MANIFEST, library, PARAMS, [], place)


@pytest.fixture
def model(directory):
    with loader.load(directory, threads=1, streams=3) as model:
        yield model


def test_calls_of_several_threads_are_right(model):
    requests = [random_ids(1 + n % 2, 3 + 7 * n % 50, seed=n) for n in range(40)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda ids: model(input_ids=ids), requests))
    for ids, outputs in zip(requests, answers):
        assert_same(outputs, expected(ids))


def test_one_call_waits_for_no_other_as_long_as_a_stream_is_free(model):
    """The first two calls hold their streams until the third has been answered."""
    inside, go = threading.Barrier(3), threading.Event()

    def hold():
        inside.wait(timeout=30)
        return go.wait(timeout=30)

    with ThreadPoolExecutor(2) as pool:
        holding = [pool.submit(model._streams[n].host.run, hold) for n in (0, 1)]
        inside.wait(timeout=30)
        ids = random_ids(2, 9)
        assert_same(model(input_ids=ids), expected(ids))  # would wait for ever behind the others
        go.set()
        assert all(future.result(timeout=30) for future in holding)


def test_weights_are_in_memory_once(directory):
    """Every stream hands its function the same tensors, which lie where the file is mapped."""
    with loader.load(directory, threads=1, streams=4) as model:
        first = len(model.inputs) + 1
        handed = [
            [slot.value.pointer for slot in stream._entries[0].arguments[first:]]
            for stream in model._streams
        ]
        assert len(handed[0]) == len(PARAMS) and all(handed[0])
        assert handed == [handed[0]] * 4
        assert len({stream._machine.handle for stream in model._streams}) == 4


def test_closed_model_has_no_stream(directory):
    model = loader.load(directory, threads=1, streams=2)
    model(input_ids=[[1]])
    model.close()
    with pytest.raises(BertileError, match="the model is closed"):
        model(input_ids=[[1]])


def test_copy_has_as_many_streams(model):
    for again in (pickle.loads(pickle.dumps(model)), copy.copy(model)):
        with again:
            assert len(again._streams) == 3
            assert_same(again(input_ids=[[1, 2]]), expected(np.array([[1, 2]])))


def test_forked_child_has_all_streams(model):
    ids = random_ids(2, 5)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: model(input_ids=ids), range(9)))
    child = os.fork()
    if not child:
        code = 1
        try:
            with ThreadPoolExecutor(3) as pool:
                for outputs in pool.map(lambda _: model(input_ids=ids), range(9)):
                    assert_same(outputs, expected(ids))
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("streams", [0, -1, 1.5, "2", True, 257])
def test_wrong_number_of_streams_is_refused(directory, streams):
    with pytest.raises(InputError, match="streams is"):
        loader.load(directory, streams=streams)
