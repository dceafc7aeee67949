"""Reads labelled texts that every Debian machine has: the package index, whose descriptions belong
to sections.

    python -m bertile.compress.sections -o DIR
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bertile.base.errors import BertileError

SECTIONS = 10
TRAIN, TEST = 400, 200  # of each section

Example = tuple[str, str]  # text, label


@dataclass(frozen=True)
class Split:
    """Examples to train on and others to test with, as many of each section."""

    train: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def labels(self) -> list[str]:
        """The sections, in the order of the alphabet."""
        return sorted({label for _, label in self.test})


def split(index: str | None = None) -> Split:
    """The examples of the ten largest sections of an index (default: this machine's).

    Which example is in which part follows from a hash of its text, so that a newer index moves
    none. Raises BertileError where there is no index, or too small a one.
    """
    examples = dict(descriptions(package_index() if index is None else index))
    sizes = Counter(examples.values())
    largest = [section for section, _ in sorted(sizes.items(), key=lambda x: (-x[1], x[0]))]
    by_section: dict[str, list[Example]] = defaultdict(list)
    for text in sorted(examples, key=_hash):
        by_section[examples[text]].append((text, examples[text]))
    chosen = [by_section[section] for section in largest[:SECTIONS]]
    if len(chosen) < SECTIONS or len(chosen[-1]) < TRAIN + TEST:
        raise BertileError(
            f"the package index has fewer than {TRAIN + TEST} packages in {SECTIONS} sections",
            "fetch all of it with: apt-get update",
        )
    test = [example for section in chosen for example in section[:TEST]]
    train = [example for section in chosen for example in section[TEST : TEST + TRAIN]]
    return Split(tuple(sorted(train, key=_order)), tuple(sorted(test, key=_order)))


def package_index() -> str:
    """What `apt-cache dumpavail` prints; BertileError where there is none."""
    command = shutil.which("apt-cache")
    if command is None:
        raise BertileError("this machine has no apt-cache", "run it on Debian or Ubuntu")
    run = subprocess.run([command, "dumpavail"], capture_output=True, text=True, check=False)
    if run.returncode or not run.stdout.strip():
        reason = run.stderr.strip().splitlines()
        what = reason[-1] if reason else "it is empty"
        raise BertileError(f"there is no package index: {what}", "fetch it with: apt-get update")
    return run.stdout


def descriptions(index: str) -> Iterator[Example]:
    """The short description and the section of each package; "contrib/" and the like left out."""
    for paragraph in index.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if _is_field(line))
        text = fields.get("Description") or fields.get("Description-en")
        if text and "Section" in fields:
            yield " ".join(text.split()), fields["Section"].rpartition("/")[2]


def write(path: Path, examples: Sequence[Example]) -> None:
    """A .tsv: text, tab, label."""
    path.write_text("".join(f"{text}\t{label}\n" for text, label in examples), encoding="utf-8")


def _is_field(line: str) -> bool:
    return ": " in line and not line.startswith(" ")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _order(example: Example) -> str:
    return _hash(example[0])


def main(arguments: Sequence[str] | None = None) -> None:
    """Write train.tsv and test.tsv."""
    parser = argparse.ArgumentParser(prog="python -m bertile.compress.sections")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="where to write")
    directory = Path(parser.parse_args(arguments).output)
    directory.mkdir(parents=True, exist_ok=True)
    examples = split()
    write(directory / "train.tsv", examples.train)
    write(directory / "test.tsv", examples.test)


if __name__ == "__main__":
    main()
