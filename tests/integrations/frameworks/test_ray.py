"""Ray's workers give the vectors of the model, in order, also where a worker is killed."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import bertile
from bertile.base.errors import UsageError

pytestmark = pytest.mark.slow  # compiles MiniLM, starts Ray
ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
pytest.importorskip("ray.data", reason="the extra 'ray' is not installed")
WORKERS = 2


@pytest.fixture(scope="module")
def cluster():
    """A local Ray with a place for each of two workers."""
    with tempfile.TemporaryDirectory(prefix="ray") as place:  # a short path, for its sockets
        ray.init(
            num_cpus=WORKERS,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            _temp_dir=place,
        )
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def rows(minilm):
    """Texts of many lengths, and their vectors without Ray."""
    texts = [f"Row {number} says {'something ' * (number % 7)}." for number in range(240)]
    with bertile.open(minilm) as model:
        return texts, model.encode(texts)


def encoded(texts: list[str], encoder: type, *arguments: object):
    items = [{"text": text, "place": i} for i, text in enumerate(texts)]
    # blocks that are there: the workers hold all cores, what made blocks would wait for them
    return ray.data.from_items(items, override_num_blocks=12).map_batches(
        encoder,
        fn_constructor_args=arguments,
        batch_size=20,
        compute=ray.data.ActorPoolStrategy(size=WORKERS),
    )


def check(table: list[dict], rows: tuple[list[str], np.ndarray]) -> None:
    texts, vectors = rows
    assert [row["text"] for row in table] == texts
    assert [row["place"] for row in table] == list(range(len(texts)))
    got = np.stack([row["embedding"] for row in table])
    assert got.dtype == np.float32
    # a batch is padded otherwise than the whole list
    np.testing.assert_allclose(got, vectors, atol=1e-5)


def test_two_workers_give_the_vectors_of_the_model_in_order(cluster, minilm, rows, tmp_path):
    class Telling(bertile.ray.Encoder):
        def __call__(self, batch):
            self._wait_for_all()
            who = np.full(len(batch["text"]), os.getpid())
            cores = np.full(len(batch["text"]), self.model.model.threads)
            return {**super().__call__(batch), "worker": who, "cores": cores}

        def _wait_for_all(self):
            (tmp_path / str(os.getpid())).touch()
            until = time.monotonic() + 120
            while len(list(tmp_path.iterdir())) < WORKERS and time.monotonic() < until:
                time.sleep(0.1)

    table = encoded(rows[0], Telling, str(minilm)).take_all()
    check(table, rows)
    assert len({row["worker"] for row in table}) == WORKERS
    assert {row["cores"] for row in table} == {1}  # what Ray gives a worker


def test_killed_worker_loses_nothing(cluster, minilm, rows, tmp_path):
    killed = tmp_path / "killed"

    class Dying(bertile.ray.Encoder):
        batches = 0

        def __call__(self, batch):
            self.batches += 1
            if self.batches == 3 and self._is_first():
                os.kill(os.getpid(), signal.SIGKILL)  # in the middle of a batch
            return super().__call__(batch)

        def _is_first(self) -> bool:
            try:
                Path(killed).touch(exist_ok=False)
            except FileExistsError:
                return False
            return True

    table = encoded(rows[0], Dying, str(minilm)).take_all()
    assert killed.exists()
    check(table, rows)


def test_wrong_column_is_refused_with_the_nearest(minilm):
    encoder = bertile.ray.Encoder(minilm, column="txt")
    with pytest.raises(UsageError, match="column 'txt' is unknown; did you mean 'text'"):
        encoder({"text": np.array(["a"])})
