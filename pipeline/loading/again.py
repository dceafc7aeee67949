"""Lets a loaded model travel by pickle, as the call that loads it again at the other end."""

from __future__ import annotations

from collections.abc import Callable

from bertile.loading.errors import AGAIN, BertileError, BundleError
from bertile.loading.manifest import SEAL


def load_again(load: Callable | None, manifest: dict, *, closed: bool) -> tuple:
    """Return what a model's __reduce__ returns; raises BertileError for a closed model."""
    if closed:
        raise BertileError("the model is closed", "load the bundle again")
    if load is None:
        raise BertileError("the model was not loaded from a directory", "load it with load()")
    return load_same, (load, manifest.get(SEAL))


def load_same(load: Callable, seal: str | None):
    """Load a model; raises BundleError where its directory holds another one by now."""
    model = load()
    if model.manifest.get(SEAL) == seal:
        return model
    model.close()
    directory = load.args[0]
    raise BundleError(f"{directory} is not the bundle that was pickled: it has changed", AGAIN)
