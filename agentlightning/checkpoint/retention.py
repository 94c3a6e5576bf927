"""What may go, and what is only moved. A run directory enters, and leaves with fewer checkpoints, never without the last one.

A checkpoint leaves the way it came, backwards: the record is renamed away first, so that no reader sees a directory that
is being dismantled, and a process that dies in between leaves names that `remove_leftovers` knows. The caller holds the lock.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from agentlightning.checkpoint.files import LEFTOVER, entries, fsync_directory, remove, replace_file, temporary
from agentlightning.checkpoint.manifest import is_whole
from agentlightning.checkpoint.record import RECORD_SUFFIX, list_records, record_path

POINTER = "latest_checkpointed_iteration.txt"
_STEP_NAME = re.compile(r"global_step_(\d+)")
_ASIDE = re.compile(r"aside-(\d+)")


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
            remove(staged)
        remove(path)  # after its directory: it is the sign by which the directory is known
        removed.append(path.name)
    return removed


def prune(root: Path, keep: int, just_saved: str) -> list[str]:
    """Discard all but the newest `keep` checkpoints (by step) of this run; returns the names that went.

    `just_saved` never goes: it is the one that is known to be good.
    Only checkpoints that this layout wrote under their own name count, and only whole ones (sizes as in the manifest): a torn
    one neither pushes a good one out nor is deleted.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, expected at least 1: the last checkpoint is never removed")
    ours = [
        record.name
        for path, record in list_records(root)[0]
        if record.digest is not None and path.stem == record.name and is_whole(root / record.name)
    ]
    if going := [name for name in ours[keep:] if name != just_saved]:
        discard(root, going)
    return going


def move_aside(root: Path, paths: Sequence[Path]) -> Path:
    """Move `paths` into a new `<root>/aside-<n>/`; returns it. Nothing is deleted."""
    numbers = [int(match[1]) for match in map(_ASIDE.fullmatch, entries(root)) if match is not None]
    aside = root / f"aside-{max(numbers, default=0) + 1}"
    aside.mkdir()
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
