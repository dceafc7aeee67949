"""Names what can go wrong with a bundle, and the exit code that a command ends with."""

from __future__ import annotations

AGAIN = "compile the bundle again"  # the remedy for a damaged bundle


class BertileError(Exception):
    """What happened and, where there is one, the remedy; printed as one sentence."""

    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.what, self.remedy = what, remedy

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what


class BundleError(BertileError):
    """A bundle that is missing, damaged, changed or of an unknown schema."""


class InputError(BertileError):
    """Ids, masks or options that the model cannot take."""

    exit_code = 2


class PlatformError(BertileError):
    """This machine lacks an architecture, a CPU feature or a library that the bundle needs."""

    exit_code = 3
