"""Says in words which processors a row is for, for help texts and `bertile targets`."""

from __future__ import annotations

# By the name of a row. Nothing is imported here: `bertile compile --help` shows them.
PROCESSORS = {
    "x86-amx": "Intel Sapphire Rapids and newer",
    "x86-avx512-bf16": "AMD Zen 4 and newer, Intel Cooper Lake",
    "x86-avx512-vnni": "Intel Cascade Lake, Ice Lake",
    "x86-avx512": "Intel Skylake-X",
    "x86-avx2": "Intel Haswell and newer, AMD Zen and newer",
    "arm-v2": "Neoverse V2: Graviton 4",
    "arm-v1": "Neoverse V1: Graviton 3",
    "arm-a76": "Cortex-A76, Neoverse N1: Raspberry Pi 5, Graviton 2",
    "arm-a72": "Cortex-A72: Raspberry Pi 4, Graviton 1",
    "aarch64": "any 64-bit ARM: --mcpu NAME",
    "cuda-sm90": "NVIDIA H100, H200",
    "cuda-sm89": "NVIDIA L4",
    "cuda-sm86": "NVIDIA A10",
    "cuda-sm80": "NVIDIA A100",
    "cuda-sm75": "NVIDIA T4",
}
