"""What may go, and what is only moved. A run directory enters, and leaves with fewer checkpoints, never without the last one.

What stays is decided from the disk alone, so that a run that was started again knows what its earlier starts wrote: the steps
and metrics are in the records, and `verified.json` remembers which ones were read back and found good. A checkpoint leaves
the way it came, backwards: the record is renamed away first, so that no reader sees a directory that is being dismantled, and
a process that dies in between leaves names that `remove_leftovers` knows. The caller holds the lock.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from agentlightning.checkpoint.files import LEFTOVER, entries, fsync_directory, remove, replace_file, temporary
from agentlightning.checkpoint.manifest import is_whole
from agentlightning.checkpoint.record import RECORD_SUFFIX, CheckpointRecord, list_records, record_path
from agentlightning.errors import CheckpointError

POINTER = "latest_checkpointed_iteration.txt"
VERIFIED = "verified.json"
METRICS = "metrics"  # in a record's extra: what the step measured, name to number; the policy chooses the best by one of them
KEEP_KEY, BEST_KEY, EVERY_KEY = "trainer.max_actor_ckpt_to_keep", "trainer.keep_best_by", "trainer.keep_every"
_STEP_NAME = re.compile(r"global_step_(\d+)")
_ASIDE = re.compile(r"aside-(\d+)")


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """Which checkpoints stay: those that any of the three names. Example: `RetentionPolicy(3, "val-core/gsm8k/acc/mean@1")`.

    CheckpointError, with the override that mends it, for a number below 1 or an empty metric.
    """

    keep: int | None = None  # the newest so many; None keeps all, whatever the others say
    best_by: str | None = (
        None  # the metric whose best value stays: the largest, or the smallest of one written with a leading "-"
    )
    every: int | None = None  # steps that are multiples of this stay for good

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 1:
            raise CheckpointError(f"{KEEP_KEY}={self.keep}; expected at least 1, or null to keep all")
        if self.every is not None and self.every < 1:
            raise CheckpointError(f"{EVERY_KEY}={self.every}; expected at least 1, or null to keep none for its step")
        if self.best_by is not None and not self.metric:
            raise CheckpointError(f"{BEST_KEY}={self.best_by}; expected a metric's name, or null to keep none for its metric")

    @property
    def metric(self) -> str | None:
        """The name of the metric, without its sign."""
        return None if self.best_by is None else self.best_by.removeprefix("-")


@dataclass(frozen=True, slots=True)
class Kept:
    """A whole checkpoint of ours and why it stays; without a reason it goes at the next prune."""

    name: str
    step: int
    reasons: tuple[str, ...]  # ("newest 3", "best by val-core/gsm8k/acc/mean@1", "every 10", "last verified")


def name_of(step: int) -> str:
    """verl's name of the checkpoint after `step` batches."""
    return f"global_step_{step}"


def step_of(name: str) -> int | None:
    """The step in a name of verl's form, or None."""
    match = _STEP_NAME.fullmatch(name)
    return None if match is None else int(match[1])


def write_pointer(root: Path, step: int) -> None:
    """Write `latest_checkpointed_iteration.txt` for verl's tools. Nothing here reads it."""
    replace_file(root / POINTER, str(step).encode())


def _hidden(root: Path) -> list[tuple[str, Path]]:
    """(original name, path) of everything that a dead save or prune left."""
    found = ((LEFTOVER.fullmatch(path.name), path) for path in (root / entry for entry in entries(root)))
    return [(match["name"], path) for match, path in found if match is not None]


def is_leftover(root: Path, name: str) -> bool:
    """Whether the directory `name` lies there only because a save or a prune died: its record is hidden, not in place."""
    return not record_path(root, name).exists() and any(found == f"{name}{RECORD_SUFFIX}" for found, _ in _hidden(root))


def discard(root: Path, names: Iterable[str]) -> None:
    """Take checkpoints back: the records disappear durably, then the directories, then the bytes."""
    going = list(names)
    for name in going:
        record = record_path(root, name)
        if record.exists():
            record.rename(temporary(root, record.name))
    fsync_directory(root)
    for name in going:
        if (root / name).exists():
            (root / name).rename(temporary(root, name))
    fsync_directory(root)  # else a power cut may bring a directory's name back, and not the hidden record that explains it
    remove_leftovers(root, going)


def remove_leftovers(root: Path, names: Iterable[str] | None = None) -> list[str]:
    """Delete what dead saves and prunes of this layout left (of checkpoints `names`, or of all); returns what went.

    Nothing that a person made is touched.
    """
    wanted = None if names is None else set(names)
    removed: list[str] = []
    for original, path in _hidden(root):
        name = original.removesuffix(RECORD_SUFFIX)
        if wanted is not None and name not in wanted:
            continue
        if original.endswith(RECORD_SUFFIX) and (root / name).is_dir() and is_leftover(root, name):
            staged = temporary(root, name)
            (root / name).rename(staged)
            fsync_directory(root)  # the name is gone for good before the record that explains it is
            remove(staged)
        remove(path)  # after its directory: it is the sign by which the directory is known
        removed.append(path.name)
    return removed


def _whole(root: Path, elsewhere: Callable[[str], bool]) -> list[CheckpointRecord]:
    """The checkpoints that retention is about, newest first: of this layout, under their own name, with the right sizes.

    A torn one neither pushes a good one out nor is deleted, and neither is anything that another loop wrote. `elsewhere`
    answers for those whose files are not in `root`.
    """
    return [
        record
        for path, record in list_records(root)[0]
        if record.digest is not None
        and path.stem == record.name
        and (is_whole(root / record.name) if (root / record.name).is_dir() else elsewhere(record.name))
    ]


def _nowhere(name: str) -> bool:
    """A checkpoint of a local run directory lies there or not at all."""
    return False


def metric_of(record: CheckpointRecord, metric: str) -> float | None:
    """What the record says of a metric; None where it says nothing that can be compared (no number, or NaN)."""
    metrics = record.extra.get(METRICS)
    value = metrics[metric] if isinstance(metrics, dict) and metric in metrics else None
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
        return None
    return float(value)


def _best(records: Sequence[CheckpointRecord], policy: RetentionPolicy) -> str | None:
    """The best by the policy's metric, the newest of equals; None without a metric or where no record has it."""
    if policy.best_by is None or policy.metric is None:
        return None
    sign = -1.0 if policy.best_by.startswith("-") else 1.0
    scores = {record.name: value for record in records if (value := metric_of(record, policy.metric)) is not None}
    return max(scores, key=lambda name: sign * scores[name], default=None)


def _marks(root: Path) -> dict[str, dict[str, str]]:
    """`verified.json` as `mark_verified` wrote it; what is torn or somebody else's counts as empty.

    OSError if it is there and cannot be read: not knowing what was verified is no reason to remove it.
    """
    try:
        value = json.loads((root / VERIFIED).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    marks = value if isinstance(value, dict) else {}
    return {name: mark for name, mark in marks.items() if _is_mark(mark)}


def _is_mark(value: object) -> bool:
    return isinstance(value, dict) and set(value) == {"digest", "at"} and all(isinstance(text, str) for text in value.values())


def mark_verified(root: Path, name: str, digest: str) -> None:
    """Remember that every byte of the checkpoint `name` was read and found as its manifest, of this digest, says.

    Marks of checkpoints that are gone are dropped. OSError if the directory cannot be written.
    """
    marks = {known: mark for known, mark in _marks(root).items() if record_path(root, known).exists()}
    marks[name] = {"digest": digest, "at": datetime.now(UTC).isoformat(timespec="seconds")}
    replace_file(root / VERIFIED, (json.dumps(marks, indent=2) + "\n").encode())


def verified_at(root: Path, records: Iterable[CheckpointRecord]) -> dict[str, str]:
    """Name to time of those that were verified. A mark holds for one digest, not for the name."""
    marks = _marks(root)
    return {
        record.name: marks[record.name]["at"]
        for record in records
        if record.digest is not None and record.name in marks and marks[record.name]["digest"] == record.digest
    }


def last_verified(root: Path, records: Iterable[CheckpointRecord]) -> str | None:
    """The newest of `records`, by step, that was verified."""
    known = list(records)
    verified = verified_at(root, known)
    steps = {record.name: record.step for record in known if record.name in verified}
    return max(steps, key=lambda name: steps[name], default=None)


def reasons_to_keep(root: Path, policy: RetentionPolicy, elsewhere: Callable[[str], bool] = _nowhere) -> list[Kept]:
    """Every whole checkpoint of this run, newest first, with what keeps it. Nothing changes, and no tensor is read.

    `elsewhere` says whether a checkpoint whose files are not in `root` is whole where they are.
    """
    records = _whole(root, elsewhere)
    best, verified = _best(records, policy), last_verified(root, records)
    kept: list[Kept] = []
    for age, record in enumerate(records):
        reasons = {
            "all are kept": policy.keep is None,
            f"newest {policy.keep}": policy.keep is not None and age < policy.keep,
            f"best by {policy.best_by}": record.name == best,
            f"every {policy.every}": policy.every is not None and record.step % policy.every == 0,
            "last verified": record.name == verified,
        }
        kept.append(Kept(record.name, record.step, tuple(reason for reason, holds in reasons.items() if holds)))
    return kept


def prune(
    root: Path,
    policy: RetentionPolicy,
    just_saved: str | None,
    dry_run: bool = False,
    elsewhere: Callable[[str], bool] = _nowhere,
) -> list[str]:
    """Discard what no part of the policy keeps; returns the names that went, or with `dry_run` that would go.

    Three never go: the newest, the last verified one, and `just_saved`, which is known to be good even where going back has
    left it with a lower step than others. See `_whole` for what is looked at.
    """
    if policy.keep is None:
        return []
    going = [kept.name for kept in reasons_to_keep(root, policy, elsewhere) if not kept.reasons and kept.name != just_saved]
    if going and not dry_run:
        discard(root, going)
    return going


def move_aside(root: Path, paths: Sequence[Path]) -> Path:
    """Move `paths` into a new `<root>/aside-<n>/`; returns it. Nothing is deleted."""
    numbers = [int(match[1]) for match in map(_ASIDE.fullmatch, entries(root)) if match is not None]
    aside = root / f"aside-{max(numbers, default=0) + 1}"
    aside.mkdir()
    fsync_directory(root)  # before anything is in it: a directory that a power cut takes back takes along what was moved there
    for path in paths:
        path.rename(aside / path.name)
    fsync_directory(aside)
    fsync_directory(root)
    return aside


def set_aside(root: Path, later_than_step: int, also: Sequence[str] = ()) -> Path | None:
    """Move every checkpoint of a later step, and the files named in `also`, out of the run's way.

    A negative step moves all checkpoints, unreadable records too. Returns the new `<root>/aside-<n>/`, or None if there was
    nothing to move. Killed half-way, it is to be called again: it then moves the rest.
    """
    readable, unreadable = list_records(root)
    steps = {path.stem: record.step for path, record in readable}
    stems = [name.removesuffix(RECORD_SUFFIX) for name, _ in unreadable]
    steps |= {stem: _step_or(stem, -1) for stem in stems}
    later = {name for name, step in steps.items() if step > later_than_step or later_than_step < 0}
    bare = {entry for entry in entries(root) if (root / entry).is_dir() and _step_or(entry, -1) > later_than_step}
    # Newest first and records before directories: killed at any point, what is left is still a run that can be read.
    moving = sorted((record_path(root, name) for name in later), key=lambda path: steps[path.stem], reverse=True)
    moving += [root / name for name in sorted(later | bare) if (root / name).is_dir()]
    moving += [root / name for name in also if (root / name).exists()]
    if not moving:
        return None
    left = [step for name, step in steps.items() if name not in later and step >= 0]
    if (root / POINTER).exists():
        if left:
            write_pointer(root, max(left))
        else:
            moving.append(root / POINTER)
    return move_aside(root, moving)


def _step_or(name: str, otherwise: int) -> int:
    step = step_of(name)
    return otherwise if step is None else step
