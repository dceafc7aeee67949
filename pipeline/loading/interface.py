"""Writes in lines what a compiled library takes and gives, and compares two such texts.

A compile puts the text into the library; a loader writes it again from the manifest and the
header of the weights. So what is wrong in those is seen before anything runs:

    lanes 16
    max_length 512
    static 0 0 0 0
    input input_ids int64 30522 none
    output last_hidden_state float32 batch length 384
    weight model.embeddings.LayerNorm.bias F32 384
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

from bertile.loading.errors import AGAIN, BundleError

INTERFACE = "interface"  # the library's function, and plan.json's key, that have the text


def interface(manifest: dict, weights: Iterable[tuple[str, str, Sequence[int]]]) -> str:
    """Return the text for a checked manifest, and weights as (name, safetensors' dtype, shape).

    What is not limited is 0, and so is a size that is not static. The C loader writes the same.
    """
    static = manifest["static"]
    flags = (int(static.get(name, 0)) for name in ("together", "padded"))
    lines = [
        ("lanes", manifest["lanes"]),
        ("max_length", manifest["model"]["max_length"] or 0),
        ("static", static.get("batch") or 0, static.get("length") or 0, *flags),
    ]
    for spec in manifest["inputs"]:
        limit, fill = spec["below"] or 0, spec["default"] or "none"
        lines.append(("input", spec["name"], spec["dtype"], limit, fill))
    for spec in manifest["outputs"]:
        lines.append(("output", spec["name"], spec["dtype"], *spec["axes"]))
    lines += [("weight", name, dtype, *shape) for name, dtype, shape in weights]
    return "".join(" ".join(map(str, line)) + "\n" for line in lines)


def check_interface(said: str | None, wanted: str, path: Path) -> None:
    """Raise BundleError unless what the library at `path` says is the text that is wanted.

    A library of an older Bertile says nothing: None.
    """
    if said is None or said == wanted:
        return
    pairs = zip_longest(said.splitlines(), wanted.splitlines(), fillvalue="nothing more")
    ours, theirs = next(pair for pair in pairs if pair[0] != pair[1])
    what = f"it was compiled for '{ours}', the manifest or the weights say '{theirs}'"
    raise BundleError(f"cannot load {path}: {what}", AGAIN)
