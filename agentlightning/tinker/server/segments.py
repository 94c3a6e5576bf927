"""Payloads outside the database: append-only files whose bytes are hashed, fsynced in groups, and deleted file by file.

`<root>/journal/<requests|results>-<number>.seg`. A file goes when no operation refers to it any more. A process that starts
never appends to an old file, so a torn end does no harm: nothing that was acknowledged lies in it.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from agentlightning.checkpoint.files import entries, fsync_directory, make_directory
from agentlightning.checkpoint.manifest import digest
from agentlightning.errors import CheckpointError
from agentlightning.tinker.server.records import Blob

SEGMENT_BYTES = 64 << 20
_NAME = re.compile(r"(requests|results)-(\d+)\.seg")


class Segments:
    """`append` and `sync` are called by one thread; `read`, `keep` and `release` by any."""

    def __init__(self, directory: Path, referred: Iterable[Blob], segment_bytes: int = SEGMENT_BYTES) -> None:
        make_directory(directory)
        self._directory, self._limit = directory, segment_bytes
        self._lock = threading.Lock()
        self._references = Counter((blob.chain, blob.segment) for blob in referred)
        self._files: dict[str, int] = {}  # chain -> descriptor of the file that is appended to
        self._current: dict[str, int] = {}
        self._dirty: set[str] = set()
        found = [(match[1], int(match[2])) for match in map(_NAME.fullmatch, entries(directory)) if match]
        self._next = max((number for _, number in found), default=0) + 1
        for chain, number in found:
            if not self._references[chain, number]:
                self._path(chain, number).unlink()

    def _path(self, chain: str, number: int) -> Path:
        return self._directory / f"{chain}-{number:08d}.seg"

    def append(self, blob: Blob) -> None:
        """Give the blob its place. Durable after `sync`. OSError if the disk is full; the blob can be appended again then."""
        assert blob.data is not None
        size = os.fstat(self._files[blob.chain]).st_size if blob.chain in self._files else self._limit
        if size >= self._limit:
            self._open_next(blob.chain)
            size = 0
        written = os.write(self._files[blob.chain], blob.data) if blob.data else 0
        while written < len(blob.data):
            written += os.write(self._files[blob.chain], memoryview(blob.data)[written:])
        self._dirty.add(blob.chain)
        blob.segment, blob.offset, blob.size = self._current[blob.chain], size, len(blob.data)
        blob.digest = digest(blob.data)

    def _open_next(self, chain: str) -> None:
        if chain in self._files:
            os.fsync(self._files[chain])
            os.close(self._files.pop(chain))
            self._remove_unused(chain, self._current.pop(chain))
        number, self._next = self._next, self._next + 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._files[chain] = os.open(self._path(chain, number), flags, 0o600)
        self._current[chain] = number
        fsync_directory(self._directory)

    def sync(self) -> None:
        """Make all that was appended durable."""
        for chain in sorted(self._dirty):
            os.fsync(self._files[chain])
        self._dirty.clear()

    def read(self, blob: Blob) -> bytes:
        """The bytes. CheckpointError if they are not those that were written."""
        data = blob.data  # once: the journal's thread lets go of it
        if data is not None:
            return data
        path = self._path(blob.chain, blob.segment)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(descriptor, blob.size, blob.offset)
        finally:
            os.close(descriptor)
        if len(data) != blob.size or digest(data) != blob.digest:
            raise CheckpointError(f"{path} is damaged at byte {blob.offset}: it does not hold what was written there")
        return data

    def keep(self, blob: Blob) -> None:
        """An operation refers to the blob."""
        with self._lock:
            self._references[blob.chain, blob.segment] += 1

    def release(self, blob: Blob) -> None:
        """It does so no longer."""
        with self._lock:
            self._references[blob.chain, blob.segment] -= 1
        self._remove_unused(blob.chain, blob.segment)

    def _remove_unused(self, chain: str, number: int) -> None:
        with self._lock:
            unused = self._references[chain, number] <= 0 and self._current.get(chain) != number
            if unused:
                del self._references[chain, number]
        if unused:
            self._path(chain, number).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
