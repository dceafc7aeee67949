"""Keeps packages that cannot stand beside Bertile's own in directories that a peer alone sees.

The packages that sentence-transformers' backends need want older versions of transformers than the
pinned; FastEmbed wants an older huggingface_hub. A layer has just what differs: all else, torch and
the engines themselves among it, is that of every other engine.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from typing import Any

from bertile.base import cache
from bertile.base.progress import Progress
from bertile.bench.engines import LeftOut

_HTTP = ("httpx==0.28.1", "httpcore==1.0.9")
PACKAGES: dict[str, Sequence[str]] = {
    # the last sentence-transformers that takes the transformers that optimum-onnx takes
    "st-onnx": (
        "sentence-transformers==5.7.0",
        "optimum-onnx==0.1.0",
        "optimum==2.1.0",
        "transformers==4.57.6",
        "tokenizers==0.22.2",
        "huggingface_hub==0.36.2",
    ),
    "st-openvino": (
        "optimum-intel==2.2.0",
        "optimum==2.3.0",
        "transformers==5.5.4",
        "tokenizers==0.22.2",
        "huggingface_hub==1.21.0",
        *_HTTP,
    ),
    "fastembed": (
        "fastembed==0.9.1",
        "mmh3==5.3.1",
        "py_rust_stemmers==0.1.8",
        "loguru==0.7.3",
        "pillow==13.0.0",
        "huggingface_hub==1.33.0",
        *_HTTP,
    ),
}


# What some extras of Bertile bring, and libraries import where it is there: it wants a newer
# huggingface_hub than a layer has.
HIDDEN = ("datasets",)


class _Without(PathFinder):
    """Finds what lies in directories as Python does, but for what is hidden."""

    @classmethod
    def find_spec(cls, fullname: str, *where: Any) -> ModuleSpec | None:
        return None if fullname in HIDDEN else super().find_spec(fullname, *where)

    @classmethod
    def find_distributions(cls, context: DistributionFinder.Context) -> Iterable[Distribution]:
        return () if context.name in HIDDEN else super().find_distributions(context)


def enter(packages: Path) -> None:
    """Let this process see a layer's packages before all others, for its whole life."""
    sys.path.insert(0, str(packages))
    sys.meta_path[sys.meta_path.index(PathFinder)] = _Without


def layer(kind: str, cache_dir: str | None, progress: Progress) -> Path | None:
    """The directory of what an engine of this kind sees first, None for what needs none.

    It is installed into the cache at its first use. Raises LeftOut where that fails.
    """
    if kind not in PACKAGES:
        return None
    packages = PACKAGES[kind]
    key = cache.key("studies.peer_layers", *packages, sys.version_info[:2])

    def make(directory: Path) -> None:
        progress.say(f"bench     {packages[0]} is installed into the cache, once")
        # without what they depend on: a second torch would come along
        line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        done = subprocess.run(
            [*line, str(directory), *packages], capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise LeftOut(f"{kind} is left out: {packages[0]} cannot be installed: {reason}")

    directory, _ = cache.Cache(cache_dir).get_or_make(key, make)
    return directory
