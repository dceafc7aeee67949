"""The block of tokens has one size and one name, in what compiles and in what loads."""

from __future__ import annotations

import ast
from pathlib import Path

from bertile import cuda_loader
from bertile.schedules import BLOCK_TOKENS

ROOT = Path(__file__).parents[2]


def test_the_loader_of_gpus_cuts_blocks_as_kernels_take_them():
    """It may import nothing of Bertile beside loaders, and so says the number again."""
    assert cuda_loader.BLOCK_TOKENS == BLOCK_TOKENS


def test_the_number_is_said_in_no_third_place():
    said = [
        file.relative_to(ROOT).as_posix()
        for folder in ("pipeline", "schedules")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.parse(file.read_bytes()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BLOCK_TOKENS"
    ]
    assert said == ["pipeline/loading/blocks.py", "schedules/__init__.py"]
