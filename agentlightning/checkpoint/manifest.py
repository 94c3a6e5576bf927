"""What a checkpoint directory must hold. The bytes of its files enter; `manifest.json` leaves, and later vouches for them.

The manifest is sealed by a digest of itself and must be written exactly as this module writes it, so that a flipped bit in it
is found as surely as one in a tensor. A reader trusts nothing in a directory before `verified_bytes` has returned.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import xxhash

from agentlightning import __version__
from agentlightning.checkpoint.files import Buffer, read_into, write_new
from agentlightning.errors import CheckpointError

MANIFEST = "manifest.json"
SCHEMA = 1
_KEYS = {"schema", "name", "step", "created", "versions", "fingerprint", "extra", "files"}
ALGORITHMS = ("xxh3_128", "sha256")
_READERS = 4  # files read at a time
_RECORDED_PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy")


def digest(data: Buffer) -> str:
    """xxh3-128, in hex: finds every accident, at a tenth of the cost of the write. It is no defence against a forger."""
    return xxhash.xxh3_128_hexdigest(data)


class Hash(Protocol):
    """What hashlib's and xxhash's objects share."""

    def update(self, data: memoryview, /) -> object:
        """Add bytes."""
        ...

    def hexdigest(self) -> str:
        """Of all bytes so far."""
        ...


def new_hash(algorithm: str) -> Hash:
    """The hash of that name; CheckpointError if it is none of `ALGORITHMS`."""
    if algorithm not in ALGORITHMS:
        raise CheckpointError(f"{algorithm!r} is no digest of a checkpoint; expected one of {', '.join(ALGORITHMS)}")
    return xxhash.xxh3_128() if algorithm == "xxh3_128" else hashlib.sha256()


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What the manifest says of one file."""

    size: int  # bytes
    algorithm: str
    hexdigest: str

    @classmethod
    def parse(cls, relative: str, entry: Any) -> FileEntry:
        """From the manifest's JSON; CheckpointError if that is not a size and one digest."""
        if isinstance(entry, dict) and len(entry) == 2 and isinstance(entry.get("size"), int) and entry["size"] >= 0:
            for algorithm in ALGORITHMS:
                if isinstance(entry.get(algorithm), str):
                    return cls(entry["size"], algorithm, entry[algorithm])
        raise CheckpointError(f"{MANIFEST} has {entry!r} for {relative}, expected its size and one of {', '.join(ALGORITHMS)}")

    def json(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return {"size": self.size, self.algorithm: self.hexdigest}


def write_file(path: Path, pieces: Sequence[Buffer], algorithm: str) -> FileEntry:
    """Write a new file durably, hashed while it is written."""
    hashed = new_hash(algorithm)
    write_new(path, *pieces, update=hashed.update)
    return FileEntry(sum(memoryview(piece).nbytes for piece in pieces), algorithm, hashed.hexdigest())


def encode_json(value: Any) -> bytes:
    """JSON as every file of a checkpoint holds it. NaN and inf are allowed: a metric may be one, and must come back."""
    return (json.dumps(value, indent=2) + "\n").encode()


def decode_json(relative: str, data: Buffer) -> Any:
    """The value in a JSON file of a checkpoint; CheckpointError, naming it, if there is none."""
    try:
        return json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{relative} is not JSON ({error})") from error


def check_relative(relative: str) -> str:
    """Return `relative` if it plainly names a file inside the checkpoint directory; raise CheckpointError otherwise."""
    path = PurePosixPath(relative)
    plain = relative == str(path) and not path.is_absolute() and ".." not in path.parts and path.parts
    if not plain or "\\" in relative or "\0" in relative or relative == MANIFEST:
        raise CheckpointError(
            f"a checkpoint file is named {relative!r}; expected a plain path inside the checkpoint's directory"
        )
    return relative


@functools.cache
def _versions() -> dict[str, str]:
    versions = {"agentlightning": __version__, "python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def build(
    name: str, step: int, files: Mapping[str, FileEntry], fingerprint: Mapping[str, Any], extra: Mapping[str, Any]
) -> tuple[bytes, str]:
    """The bytes of a manifest and its digest. `files` maps a relative path to its size and digest."""
    body = {
        "schema": SCHEMA,
        "name": name,
        "step": step,
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "versions": _versions(),
        "fingerprint": fingerprint,
        "extra": extra,
        "files": {relative: entry.json() for relative, entry in sorted(files.items())},
    }
    seal = digest(encode_json(body))
    return encode_json({**body, "digest": seal}), seal


def parse(data: bytes) -> dict[str, Any]:
    """A manifest from its bytes; CheckpointError if a single bit is not as `build` wrote it."""
    manifest = decode_json(MANIFEST, data)
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise CheckpointError(f"{MANIFEST} is no manifest of agentlightning")
    if manifest["schema"] != SCHEMA:
        raise CheckpointError(f"{MANIFEST} has schema {manifest['schema']!r}, this version of agentlightning reads {SCHEMA}")
    body = {key: value for key, value in manifest.items() if key != "digest"}
    if data != encode_json({**body, "digest": digest(encode_json(body))}):
        raise CheckpointError(f"{MANIFEST} does not match its own digest")
    if set(body) != _KEYS or not isinstance(manifest["files"], dict):
        raise CheckpointError(f"{MANIFEST} holds {sorted(body)}, expected {sorted(_KEYS)}")
    for relative, entry in manifest["files"].items():
        FileEntry.parse(relative, entry)
    return manifest


def read(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory, its seal checked; OSError if it cannot be read."""
    return parse((directory / MANIFEST).read_bytes())


def locate(directory: Path, relative: str) -> Path:
    """Where a file of the manifest lies; CheckpointError if its name or a link leads out of the checkpoint's directory."""
    path = directory / check_relative(relative)
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(os.path.realpath(directory)):
        raise CheckpointError(f"{relative} leads out of the checkpoint's directory, to {target}")
    return path


def is_whole(directory: Path) -> bool:
    """The cheap check: the manifest is sealed and every file is there with its size. Digests are not looked at."""
    try:
        files = read(directory)["files"]
        return all(locate(directory, relative).stat().st_size == entry["size"] for relative, entry in files.items())
    except (OSError, CheckpointError):
        return False


def verified_bytes(directory: Path, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The contents (uint8) of every file by relative path, after all of them were found to have their size and digest.

    Each file is read once: the bytes that are checked are the bytes that are used. Files are read in parallel; neither reading
    nor hashing holds the interpreter.
    """
    files = {relative: FileEntry.parse(relative, entry) for relative, entry in manifest["files"].items()}
    with ThreadPoolExecutor(_READERS) as readers:
        contents = readers.map(lambda item: _verified(locate(directory, item[0]), *item), files.items())
        return dict(zip(files, contents, strict=True))


def _verified(path: Path, relative: str, entry: FileEntry) -> np.ndarray:
    if not path.is_file():
        raise CheckpointError(f"{relative} is missing")
    size = path.stat().st_size
    if size != entry.size:
        raise CheckpointError(f"{relative} has {size} bytes, the manifest says {entry.size}")
    buffer = np.empty(entry.size, np.uint8)
    hashed = new_hash(entry.algorithm)
    found = read_into(path, buffer.data, hashed.update)
    if found != entry.size:
        raise CheckpointError(f"{relative} changed while it was read: {entry.size} bytes were expected")
    if hashed.hexdigest() != entry.hexdigest:
        raise CheckpointError(f"{relative} does not match its digest")
    return buffer
