"""Copies the bundle of a loaded model to where another library saves its own."""

from __future__ import annotations

import os

from bertile.base.directories import copy_file, making
from bertile.loader import MANIFEST, Model


def copy_bundle(model: Model, output: str | os.PathLike[str]) -> None:
    """Copy the files of the bundle that `model` was loaded from to `output`, whole or not at all.

    What else lies in the bundle's directory stays behind. Raises UsageError where `output` holds
    what is not Bertile's, BertileError where the disk does not take it.
    """
    with making(output, MANIFEST) as directory:
        for name in (MANIFEST, *model.manifest["files"]):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(model.directory / name, directory / name)
