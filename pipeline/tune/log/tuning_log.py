"""Keeps measured schedule decisions, keyed by what a kernel computes, in append-only files that a
person can read.

One JSON record a line, in ``<directory>/<target log>/<operation>.jsonl``. A line is one write under
a lock, so that two tuners cannot mix theirs; a line that a killed process left half-written is
skipped and reported.

A record speaks of the processor that it was measured on. There it counts as tuned; elsewhere it is
a prior, which serves a build before the default does and never stops a search.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from bertile.base.errors import BertileError
from bertile.base.machine import identity, same_processor
from bertile.loader import cpu_features
from bertile.schedules import schedules_for
from bertile.schedules.task import Task
from bertile.targets.rows import Target, fits

try:
    import fcntl
except ImportError:  # not a POSIX system: one write per line is all that keeps writers apart
    fcntl = None  # type: ignore[assignment]

SCHEMA = 1
# Where a record is from, the one to be believed first; the summary of a compile counts them so.
ORIGINS = TUNED, ELSEWHERE, ESTIMATED = "tuned", "tuned elsewhere", "estimated"
# How many times as fast as the default knobs must be by estimate to be taken: nine in ten choices
# are promised less than this too much, by python -m bertile.studies.mca_rank.
SURE = 1.04
_DATA = os.environ.get("XDG_DATA_HOME", "")  # of files that a user's programs keep
USER_LOG = Path(_DATA if os.path.isabs(_DATA) else "~/.local/share") / "bertile" / "tuning_logs"


@dataclass(frozen=True)
class Record:
    """One measured choice of knobs. ``microseconds`` holds every repeat; a candidate that failed
    has none. ``estimated`` are those that a model of the machine gave, where nothing was run.
    ``reference`` is what the reference kernel took about the same time, None of older records:
    the machine's speed changes between two sessions, and within one. Records of one ``turn`` were
    measured one directly after the other, so that their times can be compared whatever it does;
    turns of one contest, in which the same knobs took part, begin with the same word and a point.
    """

    operation: str
    shape: Mapping[str, Any]
    target: str  # the log of the target row
    threads: int
    tokens: int  # how many tokens the trial ran on
    knobs: Mapping[str, int]
    microseconds: tuple[float, ...]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    time: str
    dtype: str = "float32"
    also: Mapping[str, tuple[float, ...]] = field(
        default_factory=dict
    )  # at other numbers of tokens
    error: str | None = None
    estimated: bool = False
    reference: float | None = None  # microseconds
    turn: str | None = None

    @property
    def task(self) -> Task:
        """What was measured."""
        return Task(self.operation, self.shape)

    @property
    def times(self) -> dict[int, float]:
        """Median microseconds by number of tokens; nothing of a candidate that failed."""
        if not self.microseconds:
            return {}
        also = {int(tokens): median(times) for tokens, times in self.also.items()}
        return {self.tokens: median(self.microseconds), **also}

    @property
    def median(self) -> float:
        """Median microseconds, over several numbers of tokens their geometric mean; infinite for
        a candidate that failed.
        """
        times = list(self.times.values())
        if len(times) < 2:  # the mean of one would be off in the last bit
            return times[0] if times else float("inf")
        return geometric_mean(times)

    def to_line(self) -> str:
        """The record as one line of a log file."""
        fields = {"schema": SCHEMA, **dataclasses.asdict(self)}
        for name in ("reference", "turn"):
            if fields[name] is None:
                del fields[name]
        return json.dumps(fields, sort_keys=True) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Record:
        """The inverse of :meth:`to_line`; ValueError for anything else."""
        fields = json.loads(line)
        if not isinstance(fields, dict) or fields.pop("schema", None) != SCHEMA:
            raise ValueError("not a record of this schema")
        try:
            record = cls(**{**fields, "microseconds": tuple(fields["microseconds"])})
            record.also.items()  # a mapping, or not a record
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a record: {error}") from error
        return record


class TuningLog:
    """The records of some directories; new ones go to the last. Nothing is ever taken out of a
    file.
    """

    def __init__(
        self,
        directories: Iterable[Path],
        warn: Callable[[str], None],
        processor: Mapping[str, Any] | None = None,
    ) -> None:
        paths = [Path(directory).expanduser().resolve() for directory in directories]
        self.directories = list(dict.fromkeys(paths))  # a checkout may tune into what it ships
        self._warn = warn
        self._processor = processor
        self._records: dict[str, dict[str, list[Record]]] = {}  # target log → task key → records
        self._rows_here: dict[Target, bool] = {}

    @classmethod
    def open(
        cls,
        directory: str | None = None,
        warn: Callable[[str], None] = print,
        shipped: bool = True,
        processor: Mapping[str, Any] | None = None,
    ) -> TuningLog:
        """What ships with the package, unless ``shipped`` is false, then the user's own log
        (``directory`` or USER_LOG).

        ``processor`` is the one whose records count as tuned, for rows that this machine runs;
        None: those of all.
        """
        import bertile.tuning_logs as packaged

        ours = map(Path, packaged.__path__) if shipped else ()
        return cls([*ours, Path(directory or USER_LOG)], warn, processor)

    def records(self, task: Task, row: Target) -> list[Record]:
        """What is known of a task on this kind of machine, failures included: of kernels that this
        row has. Rows that share a log may have several for a task, and versions too.
        """
        known, later = _knobs(task, row)
        records = [_with(r, later) for r in self._of(row.log).get(task.key, [])]
        return [r for r in records if known is None or set(r.knobs) == known]

    def tasks(self, row: Target) -> list[Task]:
        """Every task that has records on this kind of machine."""
        return [records[0].task for records in self._of(row.log).values()]

    def origin(self, record: Record, row: Target) -> str:
        """Whether a record is "tuned" on this machine, "tuned elsewhere" or "estimated"."""
        if record.estimated:
            return ESTIMATED
        if row not in self._rows_here:  # asked for each of thousands of records
            self._rows_here[row] = fits(row, cpu_features())
        here = self._processor if self._rows_here[row] else None
        known = here is None or same_processor(record.machine, here)
        return TUNED if known else ELSEWHERE

    def tuned(self, task: Task, row: Target, estimates: bool = False) -> list[Record]:
        """What is known of a task on this machine and number of threads, failures included; or by
        ``estimates`` too.
        """
        kinds = (TUNED, ESTIMATED) if estimates else (TUNED,)
        records = [r for r in self.records(task, row) if r.threads == row.threads]
        return [r for r in records if self.origin(r, row) in kinds]

    def best(self, task: Task, row: Target) -> Record | None:
        """The fastest record: one of this machine before one of another, the most like it, and
        that before an estimated one; then one of the same number of threads, where there is one,
        and one of all the lengths that count. Knobs that failed on a machine are not chosen by
        estimate, nor those that gain less than estimates are sure of: then it is the default's.
        """
        records = self.records(task, row)
        failed = [dict(r.knobs) for r in records if not r.microseconds and not r.estimated]
        candidates = [
            r for r in records if r.microseconds and not (r.estimated and dict(r.knobs) in failed)
        ]
        if not candidates:
            return None
        strangeness = [self._strangeness(r, row) for r in candidates]
        nearest = min(strangeness)
        candidates = [r for r, order in zip(candidates, strangeness) if order == nearest]
        best = fastest(candidates, row)
        return surely(best, candidates, row) if best.estimated else best

    def _strangeness(self, record: Record, row: Target) -> tuple[Any, ...]:
        """Sorts records by how little they say of this machine; times of two that are equal in it
        can be compared.
        """
        order, threads = ORIGINS.index(self.origin(record, row)), record.threads != row.threads
        if ORIGINS[order] != ELSEWHERE:
            return order, threads
        (maker, family, model), ours = identity(record.machine), identity(self._processor or {})
        apart = (maker != ours[0], abs(family - ours[1]), abs(model - ours[2]))
        return order, threads, *apart, maker, family, model

    def shares(self, task: Task, other: Task, row: Target) -> dict[int, float]:
        """What the best kernel of a task takes as a share of the best one's of another, by tokens:
        medians over the turns in which both were measured; empty where there was none.
        """
        mine, theirs = self.turns(task, row), self.turns(other, row)
        shares = defaultdict(list)
        for turn in mine.keys() & theirs.keys():
            times = theirs[turn].times
            for tokens, microseconds in mine[turn].times.items():
                if tokens in times:
                    shares[tokens].append(microseconds / times[tokens])
        return {tokens: median(each) for tokens, each in sorted(shares.items())}

    def turns(self, task: Task, row: Target) -> dict[str, Record]:
        """The records of a task's best kernel that were measured in turn with others, by turn."""
        best = self.best(task, row)
        return self._turns(best, row) if best is not None else {}

    def _turns(self, best: Record, row: Target) -> dict[str, Record]:
        ours = dict(best.knobs), best.threads, identity(best.machine)
        return {
            record.turn: record
            for record in self.records(best.task, row)
            if record.turn and record.microseconds
            if (dict(record.knobs), record.threads, identity(record.machine)) == ours
        }

    def append(self, record: Record) -> None:
        """Write a record to the user's log, now and for good."""
        known = self._of(record.target)  # read before the file has the new record too
        path = self.directories[-1] / record.target / f"{record.operation}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _append(path, record.to_line())
        except OSError as error:
            raise BertileError(
                f"the tuning log {path} cannot be written: {error.strerror}",
                "give another directory with --log-dir",
            ) from error
        known.setdefault(record.task.key, []).append(record)

    def targets(self) -> list[str]:
        """The target logs that there are."""
        paths = (path for directory in self.directories for path in directory.glob("*/*.jsonl"))
        return sorted({path.parent.name for path in paths})

    def all_records(self, target: str) -> list[Record]:
        """Every record of a target log, task by task, each task's in the order of their making."""
        return [record for records in self._of(target).values() for record in records]

    def digest(self, row: Target) -> str:
        """A hash of what the log would choose for this row, for the stage cache."""
        best = {task.key: self.best(task, row) for task in self.tasks(row)}
        # times too: they decide which of two kernels a layer gets; and where a record is from,
        # which a bundle says
        choices = {
            key: (
                dict(record.knobs),
                record.median,
                self.origin(record, row),
                dict(record.machine),
                record.time,
                sorted(self._turns(record, row)),
            )
            if record
            else None
            for key, record in best.items()
        }
        return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()

    def _of(self, target: str) -> dict[str, list[Record]]:
        if target not in self._records:
            by_task: dict[str, list[Record]] = {}
            for directory in self.directories:
                for record in self._read(directory / target):
                    by_task.setdefault(record.task.key, []).append(record)
            self._records[target] = by_task
        return self._records[target]

    def _read(self, directory: Path) -> Iterator[Record]:
        for path in sorted(directory.glob("*.jsonl")):
            bad = []
            with open(path, encoding="utf-8", errors="replace") as file:
                for number, line in enumerate(file, 1):
                    try:
                        yield Record.from_line(line)
                    except ValueError:
                        bad.append(number)
            if bad:
                self._warn(
                    f"{path}: line {', '.join(map(str, bad))} is not a tuning record and is skipped"
                )


def _knobs(task: Task, row: Target) -> tuple[set[str] | None, Mapping[str, int]]:
    """The names of the knobs of the row's kernel for a task, and those that came later; None where
    no schedule knows it.
    """
    schedule = schedules_for(row).get(task.operation)
    if schedule is None:
        return None, {}
    try:
        known = set(schedule.space(task, row))
    except (KeyError, TypeError, ValueError):  # a shape of another version's schedule
        return None, {}
    return known, {name: value for name, value in schedule.later.items() if name in known}


def _with(record: Record, later: Mapping[str, int]) -> Record:
    """The record with the knobs that it lacks."""
    if set(later) <= set(record.knobs):
        return record
    return dataclasses.replace(record, knobs={**later, **record.knobs})


def fastest(records: Sequence[Record], row: Target) -> Record:
    """The fastest of some records that can be compared: what won the last contest in turns, where
    there was one; else of all the lengths that count, and by these. Times are taken as they are: a
    slow spell makes none too short. It may end between the reference and a trial, which divided by
    it would be that of a kernel as much faster.
    """
    turns = last_contest(records)
    if not turns:
        return min(records, key=lambda r: (missing(r, row), fair_time(r, row)))
    standings = defaultdict(list)  # by knobs: times beside those of the same turn
    for turn in turns:
        times = {_frozen(record): fair_time(record, row) for record in turn}
        mean = geometric_mean(times.values())
        for knobs, microseconds in times.items():
            standings[knobs].append(microseconds / mean)
    winner = min(standings, key=lambda knobs: median(standings[knobs]))
    own = [record for turn in turns for record in turn if _frozen(record) == winner]
    return sorted(own, key=lambda r: fair_time(r, row))[len(own) // 2]


def last_contest(records: Sequence[Record]) -> list[list[Record]]:
    """The turns of a task's last contest, each with its records: those in which all of the knobs
    that took part, several, were measured one after the other. A contest that has no such turn,
    since its time was up, does not count.
    """
    contests: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.turn and record.microseconds:
            contests[record.turn.partition(".")[0]][record.turn].append(record)
    whole = []
    for turns in contests.values():
        knobs = {_frozen(record) for turn in turns.values() for record in turn}
        complete = [turn for turn in turns.values() if set(map(_frozen, turn)) == knobs]
        if len(knobs) > 1 and complete:
            whole.append(complete)
    return max(whole, key=lambda turns: turns[-1][-1].time, default=[])


def _frozen(record: Record) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(record.knobs.items()))


def missing(record: Record, row: Target) -> int:
    """How many of the lengths that count the record has no time of."""
    return sum(weight > 0 and tokens not in record.times for tokens, weight in row.mix)


def fair_time(record: Record, row: Target) -> float:
    """Microseconds of a record by the lengths that count: a weighted geometric mean."""
    times = record.times
    weights = {tokens: weight for tokens, weight in row.mix if weight > 0 and tokens in times}
    if not weights:
        return record.median
    whole = sum(weights.values())
    return math.exp(sum(w * math.log(times[tokens]) for tokens, w in weights.items()) / whole)


def surely(best: Record, records: Sequence[Record], row: Target) -> Record:
    """An estimate of a task, or the default's estimate among its records where that is hardly
    slower.
    """
    schedule = schedules_for(row).get(best.operation)
    try:
        knobs = schedule and schedule.default(best.task, row)
    except (KeyError, TypeError, ValueError):  # a shape of another version's schedule
        return best
    same = [r for r in records if r.estimated and r.threads == best.threads]
    default = next((r for r in same if r.microseconds and dict(r.knobs) == knobs), None)
    return default if default and default.median < SURE * best.median else best


def _append(path: Path, line: str) -> None:
    """One write at the end of the file; a line that a killed writer left open is closed first."""
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with _locked(handle):
            size = os.lseek(handle, 0, os.SEEK_END)
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            data = ("\n" if torn else "") + line
            if os.write(handle, data.encode()) != len(data.encode()):
                raise OSError(28, "no space left on the device")
            os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(handle: int) -> Iterator[None]:
    if fcntl:
        fcntl.flock(handle, fcntl.LOCK_EX)  # closing the file gives it back, a killed process too
    yield
