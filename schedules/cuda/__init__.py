"""Schedules for NVIDIA GPUs, by the operation they run. A new one: its file, and its line here."""

from bertile.schedules.cuda import layout
from bertile.schedules.cuda.attention import attention
from bertile.schedules.cuda.dense import dense
from bertile.schedules.cuda.embedding import embedding
from bertile.schedules.cuda.layer_norm import layer_norm
from bertile.schedules.cuda.narrow import narrow
from bertile.schedules.cuda.rotary import rotary
from bertile.schedules.cuda.running_sum import cumsum
from bertile.schedules.schedule import Schedule

SCHEDULES: dict[str, Schedule] = {
    schedule.operation: schedule
    for schedule in (
        attention,
        dense,
        layer_norm,
        rotary,
        embedding,
        narrow,
        layout.tokens_in,
        layout.tokens_out,
        layout.rows_in,
        layout.rows_out,
        layout.first_token,
        layout.key_mask,
        cumsum,
    )
}
