"""The few file-system steps of a commit. Bytes and paths enter; what a function returned from is on the disk.

Everything goes through `os`, one call a step, so that a test can stop the process before any single one of them. A leftover
of a dead process is always named `.NAME.<32 hex digits>.tmp`: hidden, and told apart from anything a person would have made.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path

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


def write_new(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write and fsync a file that must not exist yet. A failed fsync raises: the bytes may not be there after a power cut."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while len(rest):  # one write moves at most 2 GiB
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(path: Path) -> None:
    """Make the entries of a directory durable: what was created, renamed or removed in it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
