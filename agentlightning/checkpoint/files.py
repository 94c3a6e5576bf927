"""The few file-system steps of a commit. Bytes and paths enter; what a function returned from is on the disk.

Everything goes through `os`, one call a step, so that a test can stop the process before any single one of them. A leftover
of a dead process is always named `.NAME.<32 hex digits>.tmp`: hidden, and told apart from anything a person would have made.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

Buffer = bytes | bytearray | memoryview  # of bytes: of an array of another type it is `array.view(np.uint8).data`
BLOCK = 8 << 20  # bytes written or read at a time: large enough to be fast, small enough that other threads get their turn

_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
_SYNC_FILE_RANGE_WRITE = 2

LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.tmp")


def temporary(parent: Path, name: str) -> Path:
    """A path in `parent` that nobody has used, under which `name` can be prepared or dismantled out of readers' sight."""
    return parent / f".{name}.{uuid.uuid4().hex}.tmp"


def entries(directory: Path) -> list[str]:
    """The sorted names in a directory, none if it is not there. OSError if it cannot be read.

    `Path.glob` would give nothing then, and a run would start from scratch in a directory that holds its checkpoints.
    """
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def _begin_writeback(descriptor: int, start: int, size: int) -> None:
    """A hint to the disk, without waiting; only Linux has it, and nothing depends on it (whence the error is not looked at)."""
    if _SYNC_FILE_RANGE is not None:
        _SYNC_FILE_RANGE(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)


def write_new(path: Path, *pieces: Buffer, update: Callable[[memoryview], object] | None = None) -> None:
    """Write `pieces` one after the other into a file that must not exist yet, and fsync it.

    `update` sees each block once it was written, while it is still in the processor's cache, and the disk begins with the block
    then, so that the fsync finds little left to do. A failed fsync raises: the bytes may not be there after a power cut.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    at = 0
    try:
        for piece in pieces:
            rest = memoryview(piece)
            while len(rest):
                written = os.write(descriptor, rest[:BLOCK])
                if written == BLOCK:
                    _begin_writeback(descriptor, at, written)
                at += written
                if update is not None:
                    update(rest[:written])
                rest = rest[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_into(path: Path, buffer: memoryview, update: Callable[[memoryview], object]) -> int:
    """Fill `buffer` from a file, `update` seeing each block; returns how many bytes the file gave, one more if it is longer."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < len(buffer):
            count = os.readv(descriptor, [buffer[done : done + BLOCK]])
            if not count:
                return done
            update(buffer[done : done + count])
            done += count
        return done + len(os.read(descriptor, 1))
    finally:
        os.close(descriptor)


def fsync_directory(path: Path) -> None:
    """Make the entries of a directory durable: what was created, renamed or removed in it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def missing_directories(path: Path) -> list[Path]:
    """Which of `path` and the directories above it are not there, the outermost first."""
    return [directory for directory in (path, *path.parents) if not directory.exists()][::-1]


def fsync_entries(paths: list[Path]) -> None:
    """Make the entries of `paths` in the directories above them durable: when a new one goes, all below it goes along."""
    for path in paths:
        fsync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Make `path` and what is missing above it, durably; nothing if it is there."""
    missing = missing_directories(path)
    path.mkdir(parents=True, exist_ok=True)
    fsync_entries(missing)


def replace_file(path: Path, data: bytes) -> None:
    """Give `path` new contents at once: a reader sees the old bytes or the new ones, never a mixture."""
    staged = temporary(path.parent, path.name)
    write_new(staged, data)
    os.replace(staged, path)
    fsync_directory(path.parent)


def remove(path: Path) -> None:
    """Delete a file or a whole directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        os.unlink(path)
