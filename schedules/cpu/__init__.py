"""Schedules for CPUs, by the operation they run. A new one: its file, and its line here."""

from functools import lru_cache

import numpy as np

from bertile.schedules.cpu import layout
from bertile.schedules.cpu.attention import attention
from bertile.schedules.cpu.dense import dense
from bertile.schedules.cpu.embedding import embedding
from bertile.schedules.cpu.layer_norm import layer_norm
from bertile.schedules.cpu.narrow import narrow
from bertile.schedules.cpu.sparse import sparse
from bertile.schedules.schedule import Sample, Schedule
from bertile.schedules.task import Task

SCHEDULES: dict[str, Schedule] = {
    schedule.operation: schedule
    for schedule in (
        dense,
        sparse,
        attention,
        layer_norm,
        embedding,
        narrow,
        layout.tokens_in,
        layout.tokens_out,
        layout.rows_in,
        layout.rows_out,
        layout.first_token,
        layout.key_mask,
        layout.query_bias,
    )
}


@lru_cache(maxsize=32)  # a search goes from task to task and comes back
def trial_sample(task: Task, blocks: int) -> Sample:
    """What a task is tried on, wherever that is: the same numbers every time, and the same weights
    for any number of blocks.
    """
    return SCHEDULES[task.operation].sample(task, blocks, np.random.default_rng(0))
