"""`agl ckpt verify`: whether every byte is as it was saved. Directories enter; sizes, seconds and problems leave.

Files are streamed through a small buffer that each reader keeps, so memory stays flat and the speed is the disk's: neither
reading nor hashing holds the interpreter. What is found good is marked, which is what keeps retention from removing it.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from agentlightning.checkpoint.manifest import check_relative
from agentlightning.checkpoint.record import RECORD_SUFFIX, CheckpointRecord, list_records, read_record, record_path
from agentlightning.checkpoint.retention import mark_verified
from agentlightning.errors import CheckpointError
from agentlightning.tools.runs import find_checkpoint, sound_manifest

BLOCK_BYTES = 1 << 20  # a block is hashed while it is still in the processor's cache; larger ones read no faster
_READERS = 4  # files at a time
_HASHES = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}


class _Reader(threading.local):
    """What each thread keeps from file to file. Fresh memory would cost more than the read."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(BLOCK_BYTES))


_reader = _Reader()


@dataclass(frozen=True, slots=True)
class Verified:
    """What reading a checkpoint directory found."""

    bytes: int  # that were read
    seconds: float
    problems: tuple[str, ...]  # none: every file is there, with its size and digest
    digest: str | None  # of the manifest; None if it could not be read


@dataclass(frozen=True, slots=True)
class Report:
    """What was found of one name."""

    name: str
    state: Literal["good", "bad", "foreign", "gone"]  # gone: its run pruned it while it was read
    bytes: int
    seconds: float
    problems: tuple[str, ...] = ()
    note: str | None = None


def verify_checkpoint(directory: Path, expected_digest: str | None = None) -> Verified:
    """Read every file of a checkpoint directory and compare it with the manifest, several at a time.

    Never raises for bad bytes. `expected_digest` is what the record says of the manifest.
    """
    started = time.perf_counter()
    try:
        manifest = sound_manifest(directory, expected_digest)
    except CheckpointError as error:
        return Verified(0, time.perf_counter() - started, (str(error),), None)
    # The largest first: a reader that begins it last would end alone.
    files = sorted(manifest["files"].items(), key=lambda item: item[1]["size"], reverse=True)
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda item: _check(directory, *item), files))
    problems = tuple(sorted(problem for _, problem in found if problem is not None))
    return Verified(sum(size for size, _ in found), time.perf_counter() - started, problems, manifest["digest"])


def _check(directory: Path, relative: str, entry: dict[str, Any]) -> tuple[int, str | None]:
    """Bytes read of one file, and what is wrong with it."""
    try:
        path = directory / check_relative(relative)
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
            return 0, f"{relative} leads out of the checkpoint's directory, to {os.path.realpath(path)}"
        if not path.is_file():
            return 0, f"{relative} is missing"
        size = path.stat().st_size
        if size != entry["size"]:
            return 0, f"{relative} has {size:,} bytes, the manifest says {entry['size']:,}"
        algorithm = next(name for name in entry if name != "size")
        if algorithm not in _HASHES:
            return 0, f"{relative} has a digest of kind {algorithm}, this version knows {', '.join(_HASHES)}"
        read, digest = _digest(path, algorithm)
    except CheckpointError as error:
        return 0, str(error)
    except OSError as error:
        return 0, f"{relative} cannot be read ({error.strerror})"
    return read, None if digest == entry[algorithm] else f"{relative} does not match its digest"


def _digest(path: Path, algorithm: str) -> tuple[int, str]:
    buffer, hashed, done = _reader.buffer, _HASHES[algorithm](), 0
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := os.readv(descriptor, [buffer]):
            hashed.update(buffer[:count])
            done += count
    finally:
        os.close(descriptor)
    return done, hashed.hexdigest()


def verify_run(root: Path, names: Sequence[str] = ()) -> list[Report]:
    """Verify the checkpoints of a run that `names` mean (see `find_checkpoint`), or all of them; mark those that are good."""
    if names:
        directories = [find_checkpoint(name, root) for name in names]
        return [_report(path.parent, path.name, _record_beside(path)) for path in directories]
    readable, unreadable = list_records(root)
    reports = [_report(root, path.stem, record) for path, record in readable]
    return [*reports, *(Report(name.removesuffix(RECORD_SUFFIX), "bad", 0, 0.0, (reason,)) for name, reason in unreadable)]


def _record_beside(directory: Path) -> CheckpointRecord | str | None:
    """The record of a checkpoint that was asked for by name, what is wrong with it, or None if there is none."""
    path = record_path(directory.parent, directory.name)
    try:
        return read_record(path) if path.exists() else None
    except CheckpointError as error:
        return str(error)


def _report(root: Path, name: str, record: CheckpointRecord | str | None) -> Report:
    if record is None:
        found = verify_checkpoint(root / name)
        note = f"it has no record {name}{RECORD_SUFFIX}: a run does not find it by itself"
        return Report(name, "bad" if found.problems else "good", found.bytes, found.seconds, found.problems, note)
    if isinstance(record, str):
        found = verify_checkpoint(root / name)
        return Report(name, "bad", found.bytes, found.seconds, (f"{name}{RECORD_SUFFIX}: {record}", *found.problems))
    if record.digest is None:
        return Report(name, "foreign", 0, 0.0, note="another loop's record: it has no digests to compare with")
    if record.name != name:
        reason = f"its record is a copy of {record.name}{RECORD_SUFFIX}; expected them to have one name"
        return Report(name, "bad", 0, 0.0, (reason,))
    found = verify_checkpoint(root / name, record.digest)
    if not record_path(root, name).exists():
        return Report(name, "gone", found.bytes, found.seconds, note="its run has pruned it meanwhile")
    if found.problems:
        return Report(name, "bad", found.bytes, found.seconds, found.problems)
    return Report(name, "good", found.bytes, found.seconds, note=_mark(root, name, record.digest))


def _mark(root: Path, name: str, digest: str) -> str | None:
    """Mark it verified; a note where the directory cannot be written, which changes nothing about the checkpoint."""
    try:
        mark_verified(root, name, digest)
    except OSError as error:
        return f"good, but {root} cannot be written to mark it ({error.strerror})"
    return None
