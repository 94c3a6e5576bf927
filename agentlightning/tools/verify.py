"""`agl ckpt verify`: whether every byte is as it was saved. Directories enter; sizes, seconds and problems leave.

Files are streamed through a small buffer that each reader keeps, so memory stays flat and the speed is the disk's: neither
reading nor hashing holds the interpreter. What is found good is marked, which is what keeps retention from removing it.
Where the bytes come from is a `Source`'s to know: the disk, or a URL.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from agentlightning.checkpoint.files import Buffer
from agentlightning.checkpoint.manifest import FileEntry, locate, new_hash
from agentlightning.checkpoint.record import RECORD_SUFFIX, CheckpointRecord, list_records, read_record, record_path
from agentlightning.checkpoint.remote_objects import words
from agentlightning.checkpoint.retention import VERIFIED, mark_verified
from agentlightning.errors import CheckpointError
from agentlightning.tools.runs import find_checkpoint, sound_manifest

BLOCK_BYTES = 1 << 20  # a block is hashed while it is still in the processor's cache; larger ones read no faster
_READERS = 4  # files at a time


class _Reader(threading.local):
    """What each thread keeps from file to file. Fresh memory would cost more than the read."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(BLOCK_BYTES))


_reader = _Reader()


class Source(Protocol):
    """Where the files of a run directory are read from. Names and sizes are looked up in the directory, whatever it is."""

    def find(self, text: str) -> Path:
        """The checkpoint directory that a person means by `text`."""
        ...

    def blocks(self, path: Path) -> Iterator[Buffer]:
        """The bytes of a file, piece by piece; each piece is good until the next. OSError if it cannot be read."""
        ...

    def has(self, path: Path) -> bool:
        """Whether a file of the directory is still there."""
        ...

    def mark(self, root: Path, name: str, digest: str) -> None:
        """Remember that a checkpoint was verified. OSError or CheckpointError if that cannot be written."""
        ...


class Disk:
    """A run directory that is what it seems."""

    def __init__(self, root: Path):
        """Checkpoints that are asked for by name are looked for in `root`."""
        self._root = root

    def find(self, text: str) -> Path:
        """As `find_checkpoint`."""
        return find_checkpoint(text, self._root)

    def blocks(self, path: Path) -> Iterator[Buffer]:
        """Through one buffer of the thread."""
        buffer = _reader.buffer
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while count := os.readv(descriptor, [buffer]):
                yield buffer[:count]
        finally:
            os.close(descriptor)

    def has(self, path: Path) -> bool:
        """Whether the file is there."""
        return path.exists()

    def mark(self, root: Path, name: str, digest: str) -> None:
        """As `mark_verified`."""
        mark_verified(root, name, digest)


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


def verify_checkpoint(directory: Path, expected_digest: str | None = None, source: Source | None = None) -> Verified:
    """Read every file of a checkpoint directory and compare it with the manifest, several at a time.

    Never raises for bad bytes. `expected_digest` is what the record says of the manifest; `source` is the disk by default.
    """
    started = time.perf_counter()
    try:
        manifest = sound_manifest(directory, expected_digest)
    except CheckpointError as error:
        return Verified(0, time.perf_counter() - started, (str(error),), None)
    read_from = Disk(directory.parent) if source is None else source
    # The largest first: a reader that begins it last would end alone.
    files = sorted(manifest["files"].items(), key=lambda item: item[1]["size"], reverse=True)
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda item: _check(directory, item[0], item[1], read_from), files))
    problems = tuple(sorted(problem for _, problem in found if problem is not None))
    return Verified(sum(size for size, _ in found), time.perf_counter() - started, problems, manifest["digest"])


def _check(directory: Path, relative: str, told: Any, source: Source) -> tuple[int, str | None]:
    """Bytes read of one file, and what is wrong with it."""
    try:
        path, entry = locate(directory, relative), FileEntry.parse(relative, told)
        if not path.is_file():
            return 0, f"{relative} is missing"
        size = path.stat().st_size
        if size != entry.size:
            return 0, f"{relative} has {size:,} bytes, the manifest says {entry.size:,}"
        read, digest = _digest(source, path, entry.algorithm)
    except CheckpointError as error:
        return 0, str(error)
    except OSError as error:
        return 0, f"{relative} cannot be read ({words(error)})"
    return read, None if digest == entry.hexdigest else f"{relative} does not match its digest"


def _digest(source: Source, path: Path, algorithm: str) -> tuple[int, str]:
    hashed, done = new_hash(algorithm), 0
    for block in source.blocks(path):
        view = memoryview(block)
        hashed.update(view)
        done += view.nbytes
    return done, hashed.hexdigest()


def verify_run(root: Path, names: Sequence[str] = (), source: Source | None = None) -> list[Report]:
    """Verify the checkpoints of a run that `names` mean (see `find_checkpoint`), or all of them; mark those that are good."""
    read_from = Disk(root) if source is None else source
    if names:
        directories = [read_from.find(name) for name in names]
        return [_report(path.parent, path.name, _record_beside(path), read_from) for path in directories]
    readable, unreadable = list_records(root)
    reports = [_report(root, path.stem, record, read_from) for path, record in readable]
    return [*reports, *(Report(name.removesuffix(RECORD_SUFFIX), "bad", 0, 0.0, (reason,)) for name, reason in unreadable)]


def _record_beside(directory: Path) -> CheckpointRecord | str | None:
    """The record of a checkpoint that was asked for by name, what is wrong with it, or None if there is none."""
    path = record_path(directory.parent, directory.name)
    try:
        return read_record(path) if path.exists() else None
    except CheckpointError as error:
        return str(error)


def _report(root: Path, name: str, record: CheckpointRecord | str | None, source: Source) -> Report:
    if record is None:
        found = verify_checkpoint(root / name, None, source)
        note = f"it has no record {name}{RECORD_SUFFIX}: a run does not find it by itself"
        return Report(name, "bad" if found.problems else "good", found.bytes, found.seconds, found.problems, note)
    if isinstance(record, str):
        found = verify_checkpoint(root / name, None, source)
        return Report(name, "bad", found.bytes, found.seconds, (f"{name}{RECORD_SUFFIX}: {record}", *found.problems))
    if record.digest is None:
        return Report(name, "foreign", 0, 0.0, note="another loop's record: it has no digests to compare with")
    if record.name != name:
        reason = f"its record is a copy of {record.name}{RECORD_SUFFIX}; expected them to have one name"
        return Report(name, "bad", 0, 0.0, (reason,))
    found = verify_checkpoint(root / name, record.digest, source)
    if not source.has(record_path(root, name)):
        return Report(name, "gone", found.bytes, found.seconds, note="its run has pruned it meanwhile")
    if found.problems:
        return Report(name, "bad", found.bytes, found.seconds, found.problems)
    return Report(name, "good", found.bytes, found.seconds, note=_mark(root, name, record.digest, source))


def _mark(root: Path, name: str, digest: str, source: Source) -> str | None:
    """Mark it verified; a note where that cannot be written, which changes nothing about the checkpoint."""
    try:
        source.mark(root, name, digest)
    except CheckpointError as error:
        return f"good, but {root / VERIFIED} was not written to remember it ({error})"
    except OSError as error:
        return f"good, but {root / VERIFIED} cannot be written to remember it ({words(error)})"
    return None
