"""Names instructions on tiles (``intrinsics.amx``) as statements of a kernel that links them."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules.intrinsics import amx


def tile(name: str, *arguments: Any) -> None:
    """One instruction, or what opens and closes the tiles."""
    T.evaluate(tirx.call_extern("int32", f"bertile_{name}", *arguments))


def load_tile(number: int, buffer: Any, *index: Any) -> None:
    """16 rows of 64 bytes that lie one behind the other, from an element on."""
    tile(f"tile_load{number}", T.address_of(buffer[index]), _row())


def store_tile(number: int, buffer: Any, *index: Any) -> None:
    """The inverse of ``load_tile``."""
    tile(f"tile_store{number}", T.address_of(buffer[index]), _row())


def keep_whole(buffer: Any) -> None:
    """Write the last vector of a buffer that functions fill: TVM cuts a buffer to what it sees
    written, and does not see what a function writes.
    """
    *outer, lanes_ = (int(extent) for extent in buffer.shape)
    nothing = tirx.Broadcast(tirx.const(0, buffer.dtype), lanes_)
    T.buffer_store(buffer, nothing, [*(extent - 1 for extent in outer), tirx.Ramp(0, 1, lanes_)])


def _row() -> Any:
    return tirx.const(amx.BYTES, "int64")
