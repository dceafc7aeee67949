"""Schedules for CPUs, by the operation they run. A new one: its file, and its line here."""

from bertile.schedules.cpu import layout
from bertile.schedules.cpu.attention import attention
from bertile.schedules.cpu.dense import dense
from bertile.schedules.cpu.embedding import embedding
from bertile.schedules.cpu.layer_norm import layer_norm
from bertile.schedules.cpu.narrow import narrow
from bertile.schedules.cpu.rotary import rotary
from bertile.schedules.cpu.sparse import sparse
from bertile.schedules.schedule import Schedule

SCHEDULES: dict[str, Schedule] = {
    schedule.operation: schedule
    for schedule in (
        dense,
        sparse,
        attention,
        layer_norm,
        embedding,
        narrow,
        rotary,
        layout.tokens_in,
        layout.tokens_out,
        layout.rows_in,
        layout.rows_out,
        layout.first_token,
        layout.key_mask,
        layout.query_bias,
    )
}
