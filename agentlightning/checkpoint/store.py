"""State in, directory out, and back. Arrays and JSON values enter; a committed checkpoint leaves, or what a verified one holds.

The order of a save is what makes it safe at every instant: stage `.NAME.<uuid>.tmp/` with its files and manifest, fsync all,
stage the record, rename the directory, rename the record. Before the last rename there is no checkpoint, after it a durable
one. The hidden record lies there before the directory gets its name, so that a directory without a record is known to be
the leftover of a dead save (and not a copy that somebody made) by the hidden record beside it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from agentlightning.checkpoint import layout
from agentlightning.checkpoint import manifest as manifests
from agentlightning.checkpoint.files import Buffer, entries, fsync_directory, make_directory, temporary, write_new
from agentlightning.checkpoint.manifest import MANIFEST, FileEntry, check_relative, encode_json, write_file
from agentlightning.checkpoint.record import (
    RECORD_SUFFIX,
    CheckpointRecord,
    commit_record,
    list_records,
    read_record,
    record_path,
    stage_record,
)
from agentlightning.checkpoint.retention import discard, is_leftover, move_aside, step_of
from agentlightning.errors import CheckpointError

SAMPLER_FILE = "actor/adapter_model.safetensors"  # where it is saved, its folder is what a sampler needs
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class PartWriter(Protocol):
    """Writes tensor files of a checkpoint that somebody else holds: snapshots of one or many workers."""

    @property
    def bytes(self) -> int:
        """About how many it will write."""
        ...

    def __call__(self, staging: Path, algorithm: str) -> Mapping[str, FileEntry]:
        """Write the files below `staging`, durable on return, and say what they are by relative path."""
        ...


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """All that one checkpoint holds.

    Example: `CheckpointFiles({"actor/adapter_model.safetensors": {"lora_A": array}}, {"trainer_state.json": {...}})`.
    """

    tensors: Mapping[str, Mapping[str, np.ndarray]]  # path ending in .safetensors -> tensor name -> array, whole, any shape
    parts: PartWriter | None = field(default=None, kw_only=True)  # further tensor files
    json: Mapping[str, Any] = field(default_factory=dict)  # path ending in .json -> plain values with string keys
    fingerprint: Mapping[str, Any] = field(default_factory=dict)  # see fingerprint.py
    extra: Mapping[str, Any] = field(default_factory=dict)  # plain values kept in the record itself


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A checkpoint that is durable."""

    path: Path
    name: str
    step: int
    bytes: int  # of its files, the manifest included
    seconds: float  # from the call to the commit
    notes: tuple[str, ...] = ()  # what went wrong after the commit, without harm to this checkpoint


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """What a verified checkpoint holds; every size and digest was checked before this object was made."""

    path: Path
    record: CheckpointRecord
    manifest: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, np.ndarray]]
    json: Mapping[str, Any]
    skipped: tuple[tuple[str, str], ...] = ()  # (file name, reason) of newer ones that were passed over
    notes: tuple[str, ...] = ()  # worth a line on the console

    @property
    def step(self) -> int:
        """Batches completed when it was saved."""
        return self.record.step

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What `CheckpointFiles.fingerprint` was."""
        return self.manifest["fingerprint"]


def _encode(files: CheckpointFiles) -> dict[str, list[Buffer]]:
    """What is to be written, by relative path, before the first byte is: a mistake in it costs nothing then."""
    for relative in (*files.tensors, *files.json):
        suffix = ".safetensors" if relative in files.tensors else ".json"
        if not check_relative(relative).endswith(suffix):
            raise ValueError(f"{relative!r} must end with {suffix}")
    contents = {relative: _safetensors(arrays) for relative, arrays in files.tensors.items()}
    for relative, value in files.json.items():
        try:
            contents[relative] = [encode_json(value)]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{relative} holds something that is no plain value: {error}") from error
    return contents


def _safetensors(arrays: Mapping[str, np.ndarray]) -> list[Buffer]:
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    plan = layout.Layout.of({name: (array.dtype, array.shape) for name, array in whole.items()})
    return [plan.header, *(whole[name].reshape(-1).view(np.uint8).data for name in plan.slots)]


def save(
    root: Path,
    name: str,
    step: int,
    files: CheckpointFiles,
    *,
    algorithm: str = "xxh3_128",
    committing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> SavedCheckpoint:
    """Commit `files` as the checkpoint `name` of the run directory `root`; it is durable when this returns.

    The record gets its name inside `committing()`, which may raise to forbid it (a lost lease). Raises CheckpointError, with
    the path and the bytes that were missing, if the file system refused anything: then there is no new checkpoint, and
    those before are as they were. Nothing is written over: a directory of that name without a record is moved aside, a
    committed checkpoint of that name is an error.
    """
    started = time.perf_counter()
    if not _NAME.fullmatch(name):
        raise ValueError(f"a checkpoint cannot be named {name!r}; use letters, digits, '.', '_' and '-'")
    contents = _encode(files)
    needed = sum(memoryview(piece).nbytes for pieces in contents.values() for piece in pieces)
    needed += files.parts.bytes if files.parts is not None else 0
    try:
        make_directory(root)
        if record_path(root, name).exists():
            raise CheckpointError(
                f"{record_path(root, name)} exists and is not written over; resume from it, "
                "or start over with trainer.resume_mode=disable, which moves it aside"
            )
        if (root / name).exists():
            move_aside(root, [root / name])
        try:
            path, size = _commit(root, name, step, files, contents, algorithm, committing)
        except BaseException:
            # Half a checkpoint must not look like one, and its bytes may be what fills the disk. If this fails too,
            # the next start finds what is left by its name.
            with contextlib.suppress(OSError):
                discard(root, [name])
            raise
    except OSError as error:
        raise CheckpointError(_refused(root, name, needed, error)) from error
    return SavedCheckpoint(path, name, step, size, time.perf_counter() - started)


def _commit(
    root: Path,
    name: str,
    step: int,
    files: CheckpointFiles,
    contents: Mapping[str, Sequence[Buffer]],
    algorithm: str,
    committing: Callable[[], AbstractContextManager[None]],
) -> tuple[Path, int]:
    staging = temporary(root, name)
    staging.mkdir()
    written = {**_write_parts(staging, files, algorithm), **_write_contents(staging, contents, algorithm)}
    size, seal = _seal(staging, name, step, files, written)
    sampler = f"{name}/{PurePosixPath(SAMPLER_FILE).parent}" if SAMPLER_FILE in written else None
    staged_record = stage_record(root, CheckpointRecord(name, step, step, name, sampler, seal, files.extra))
    fsync_directory(root)
    staging.rename(root / name)
    fsync_directory(root)
    with committing():
        commit_record(staged_record, root, name)
    return root / name, size


def _write_parts(staging: Path, files: CheckpointFiles, algorithm: str) -> dict[str, FileEntry]:
    """What others hold and write. They may sit on other hosts: what cannot be seen from here would not be a checkpoint."""
    if files.parts is None:
        return {}
    written = dict(files.parts(staging, algorithm))
    for relative, entry in written.items():
        path = staging / check_relative(relative)
        if not path.is_file() or path.stat().st_size != entry.size:
            raise CheckpointError(
                f"a worker wrote {relative} ({entry.size:,} bytes), but it is not in {staging}; the run directory must be on a "
                "file system that all hosts share, or a URL: trainer.default_local_dir=DIR"
            )
    return written


def _write_contents(staging: Path, contents: Mapping[str, Sequence[Buffer]], algorithm: str) -> dict[str, FileEntry]:
    written: dict[str, FileEntry] = {}
    for relative, pieces in contents.items():
        path = staging / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        written[relative] = write_file(path, pieces, algorithm)
    return written


def _seal(staging: Path, name: str, step: int, files: CheckpointFiles, written: Mapping[str, FileEntry]) -> tuple[int, str]:
    """Write the manifest and make every entry in every folder durable. Returns all bytes and the manifest's digest."""
    text, seal = manifests.build(name, step, written, files.fingerprint, files.extra)
    write_new(staging / MANIFEST, text)
    folders = {staging} | {
        parent for relative in written for parent in (staging / relative).parents if parent.is_relative_to(staging)
    }
    for folder in sorted(folders, reverse=True):  # the innermost first
        fsync_directory(folder)
    return sum(entry.size for entry in written.values()) + len(text), seal


def _refused(root: Path, name: str, needed: int, error: OSError) -> str:
    where = error.filename if error.filename is not None else root / name
    message = f"checkpoint {name} was not saved: {error.strerror or error} at {where}; it needs {needed:,} bytes"
    try:
        message += f", {shutil.disk_usage(root).free:,} are free in {root}"
    except OSError as gone:
        message += f", and {root} cannot be looked at ({gone.strerror})"
    if error.errno in _FULL:
        return f"{message}. Free some space, or keep fewer with trainer.max_actor_ckpt_to_keep=N"
    return f"{message}. Mend the directory, or give another with trainer.default_local_dir=DIR"


def _verify_and_parse(directory: Path, expected_digest: str | None) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Manifest, tensors and JSON of a directory; CheckpointError with the reason if it is not as it was saved."""
    try:
        manifest = manifests.read(directory)
        if expected_digest is not None and manifest["digest"] != expected_digest:
            raise CheckpointError("the directory is not the one that its record was written for")
        contents = manifests.verified_bytes(directory, manifest)
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory} cannot be read ({error.strerror})") from error
    tensors = {
        relative: layout.views(relative, data) for relative, data in contents.items() if relative.endswith(".safetensors")
    }
    json = {
        relative: manifests.decode_json(relative, data.data)
        for relative, data in contents.items()
        if relative.endswith(".json")
    }
    return manifest, tensors, json


def _read(directory: Path, record: CheckpointRecord) -> LoadedCheckpoint:
    if "://" in record.state_path:
        raise CheckpointError(f"its state is at {record.state_path}, not in a directory")
    manifest, tensors, json = _verify_and_parse(directory, record.digest)
    return LoadedCheckpoint(directory, record, manifest, tensors, json)


def load(path: Path) -> LoadedCheckpoint:
    """Read one checkpoint directory. CheckpointError with the reason unless every byte is as it was saved.

    The record beside it is used if it can be; a directory that was copied without its record loads by its manifest alone.
    """
    try:
        return _read(path, _record_of(path))
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be resumed from: {error}") from error


def _record_of(directory: Path) -> CheckpointRecord:
    """The record of a directory that was asked for by name, made up from its manifest where there is none."""
    with contextlib.suppress(CheckpointError):
        record = read_record(record_path(directory.parent, directory.name))
        if record.digest is not None:
            return record
    try:
        manifest = manifests.read(directory)
    except OSError as error:
        raise CheckpointError(f"{directory / MANIFEST} cannot be read ({error.strerror})") from error
    sampler = str(directory / PurePosixPath(SAMPLER_FILE).parent) if SAMPLER_FILE in manifest["files"] else None
    step = manifest["step"]
    return CheckpointRecord(manifest["name"], step, step, str(directory), sampler, manifest["digest"], manifest["extra"])


def _here(record: CheckpointRecord) -> None:
    """A checkpoint of a local directory needs no preparation."""


def find_valid(root: Path, prepare: Callable[[CheckpointRecord], None] = _here) -> LoadedCheckpoint | None:
    """The newest checkpoint of a run directory that is as it was saved; None if the directory holds none at all.

    Newest by the step in the record. `prepare` may fetch a checkpoint before it is read; a CheckpointError of it counts as one
    of the checkpoint. Those passed over are in `.skipped` with the reason. CheckpointError, naming them all, if
    there are some and none is good: starting from scratch must be asked for.
    """
    readable, skipped = list_records(root)
    for path, record in readable:
        try:
            prepare(record)
            return replace(_read(Path(record.state_path), record), skipped=tuple(skipped))
        except CheckpointError as error:
            skipped.append((path.name, str(error)))
    skipped += [(path.name, f"a directory without its record {path.name}{RECORD_SUFFIX}") for path in _uncommitted(root)]
    if not skipped:
        return None
    reasons = "\n".join(f"  {name}: {reason}" for name, reason in skipped)
    raise CheckpointError(
        f"{root} holds checkpoints, and none of them is valid:\n{reasons}\n"
        "Put a good copy there, or start over with trainer.resume_mode=disable (what is there is moved aside, not deleted)"
    )


def _uncommitted(root: Path) -> list[Path]:
    """Whole directories named as checkpoints that have no record and are no leftover: copies that somebody made."""
    return [
        path
        for path in (root / entry for entry in entries(root))
        if step_of(path.name) is not None
        and not record_path(root, path.name).exists()
        and (path / MANIFEST).is_file()
        and not is_leftover(root, path.name)
    ]


def resolve(root: Path, resume_from_path: str | int) -> Path:
    """The checkpoint directory that a person means by `trainer.resume_from_path`.

    A step number, the name of a checkpoint in `root`, a checkpoint's directory (with or without a slash at the end, or a folder
    in it), or its record. CheckpointError says what is there instead.
    """
    given = str(resume_from_path).strip()
    if not given:
        raise CheckpointError("trainer.resume_from_path is empty; give a step number, a name, a directory or a record file")
    name = f"global_step_{int(given)}" if given.isdecimal() else given
    for path in (root / name, Path(os.path.abspath(Path(given).expanduser()))):
        record = path if path.suffix == RECORD_SUFFIX else record_path(path.parent, path.name)
        if record.is_file() and (path == record or not path.is_dir()):
            return _directory_of(record)
        for directory in (path, path.parent):
            if path.exists() and (directory / MANIFEST).is_file():
                return directory
    known = ", ".join(record.name for _, record in list_records(root)[0]) or "none"
    raise CheckpointError(
        f"trainer.resume_from_path={given} is no checkpoint: expected a step number, a name, a directory with a {MANIFEST}, "
        f"or a record file; {root} holds: {known}"
    )


def _directory_of(record_file: Path) -> Path:
    try:
        state_path = read_record(record_file).state_path
    except CheckpointError as error:
        raise CheckpointError(f"{record_file} cannot be resumed from: {error}") from error
    if "://" in state_path:
        raise CheckpointError(f"{record_file} cannot be resumed from: its state is at {state_path}, not in a directory")
    return Path(state_path)
