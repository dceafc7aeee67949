"""Schedules for NVIDIA GPUs, by the operation they run. A new one: its file, and its line here."""

from bertile.schedules.schedule import Schedule

SCHEDULES: dict[str, Schedule] = {schedule.operation: schedule for schedule in ()}
