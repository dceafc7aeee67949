"""Keeps torch and transformers at arm's length: what a program has set in them, what they raise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bertile.base.errors import BertileError, ModelError, require


@contextlib.contextmanager
def ordinary() -> Iterator[None]:
    """Compute on the CPU in float32 and without gradients, whatever the program around has set.

    That may be a default device or dtype, autocast, or inference mode, whose tensors cannot be
    changed later.
    """
    (torch,) = require("export", "torch")
    dtype = torch.get_default_dtype()
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
    ):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextlib.contextmanager
def explained(failure: str, known: tuple[str, str] | None = None) -> Iterator[None]:
    """Raise ModelError, "`failure`: cause", for what libraries raise that is no BertileError.

    `known` is the cause, and what to do, where both are known; it takes the place of a ModelError's
    too.
    """
    try:
        yield
    except ModelError as error:
        if known is None:
            raise
        raise ModelError(f"{failure}: {known[0]}", known[1]) from error
    except BertileError:
        raise
    except Exception as error:  # models run anyone's code, and libraries raise anything
        cause, remedy = known or (reason(error), None)
        raise ModelError(f"{failure}: {cause}", remedy) from error


def reason(error: BaseException) -> str:
    """The first line of what an exception says; its name where that alone tells nothing.

    torch's exporter wraps what a model raises, so that the cause is looked at first.
    """
    error = error.__cause__ or error
    lines = str(error).strip().splitlines()
    if not lines or isinstance(error, (KeyError, AttributeError, TypeError)):
        return repr(error)
    return lines[0]
