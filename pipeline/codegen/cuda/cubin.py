"""Reads a cubin (an ELF file): what each kernel takes of a GPU, and which instructions it is made
of. NVIDIA's own disassembler is in no pip package of its own, and nothing else is needed of it.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_REGISTERS, _FRAME = 0x2F, 0x11  # attributes in .nv.info: (symbol, number)
_WORDS = 0x04  # an attribute whose value is so many bytes
_RESERVED = 1024  # bytes of shared memory that the system takes of each block from sm_90 on
# The low 9 bits of an instruction (16 bytes), by the names that nvdisasm gives; the 3 bits above
# them say which operands are registers. The same from sm_75 to sm_90.
OPCODES = {
    0x03C: "HMMA",  # tensor cores: fp16, bf16 and tf32
    0x037: "IMMA",  # tensor cores: bytes
    0x1F0: "HGMMA",  # wgmma of fp16, bf16 and tf32
    0x1F1: "IGMMA",  # wgmma of bytes
    0x03B: "LDSM",  # ldmatrix
    0x1AE: "LDGSTS",  # cp.async
    0x183: "LDL",  # from local memory: arrays with unknown indices, and spills
    0x187: "STL",
    0x023: "FFMA",
}
TENSOR = ("HMMA", "IMMA", "HGMMA", "IGMMA")


@dataclass(frozen=True)
class Resources:
    """Of one kernel: registers and bytes of local memory (``local``) of a thread, bytes of static
    shared memory of a block, and how often each instruction of OPCODES stands in its code.
    """

    registers: int
    shared: int
    local: int
    instructions: Counter[str]

    @property
    def tensor(self) -> int:
        """Instructions of tensor cores."""
        return sum(self.instructions[name] for name in TENSOR)


def read(data: bytes) -> dict[str, Resources]:
    """The kernels of a cubin by their names."""
    sections = _sections(data)
    symbols = _symbols(*sections[".symtab"], sections[".strtab"][0])
    registers, frames = Counter(), Counter()
    for kind, values in _attributes(sections[".nv.info"][0]):
        if kind in (_REGISTERS, _FRAME):
            target = registers if kind == _REGISTERS else frames
            target[symbols[values[0]]] = values[1]
    reserved = _RESERVED if ".nv.shared.reserved.0" in sections else 0
    return {
        name: Resources(
            registers=registers[name],
            shared=max(0, sections.get(f".nv.shared.{name}", (b"", 0))[1] - reserved),
            local=frames[name],
            instructions=_count(code),
        )
        for section, (code, _) in sections.items()
        if (name := section.removeprefix(".text.")) != section
    }


def _sections(data: bytes) -> dict[str, tuple[bytes, int]]:
    """Content and size by name; a section that is only space in memory has no content."""
    header = _HEADER.unpack_from(data)
    if header[0][:4] != b"\x7fELF":
        raise ValueError("this is no ELF file")
    start, count, names = header[6], header[12], header[13]
    rows = [_SECTION.unpack_from(data, start + i * _SECTION.size) for i in range(count)]
    texts = data[rows[names][4] :]
    sections = {}
    for name, kind, _, _, offset, size, *_ in rows:
        no_bits = kind == 8
        content = b"" if no_bits else data[offset : offset + size]
        sections[_text(texts, name)] = (content, size)
    return sections


def _symbols(table: bytes, _size: int, texts: bytes) -> list[str]:
    return [_text(texts, row[0]) for row in _SYMBOL.iter_unpack(table)]


def _text(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()


def _attributes(data: bytes) -> list[tuple[int, tuple[int, ...]]]:
    attributes, place = [], 0
    while place < len(data):
        form, kind, size = struct.unpack_from("<BBH", data, place)
        place += 4
        if form == _WORDS:
            attributes.append((kind, struct.unpack_from(f"<{size // 4}I", data, place)))
            place += size
    return attributes


def _count(code: bytes) -> Counter[str]:
    words = struct.unpack(f"<{len(code) // 4}I", code)[::4]
    known = Counter(OPCODES.get(word & 0x1FF, "") for word in words)
    del known[""]
    return known
