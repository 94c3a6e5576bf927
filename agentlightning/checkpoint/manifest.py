"""What a checkpoint directory must hold. The bytes of its files enter; `manifest.json` leaves, and later vouches for them.

The manifest is sealed by a digest of itself and must be written exactly as this module writes it, so that a flipped bit in it
is found as surely as one in a tensor. A reader trusts nothing in a directory before `verified_bytes` has returned.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from agentlightning import __version__
from agentlightning.errors import CheckpointError

MANIFEST = "manifest.json"
SCHEMA = 1
_KEYS = {"schema", "name", "step", "created", "versions", "fingerprint", "extra", "files"}
_RECORDED_PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy")


def digest(data: bytes) -> str:
    """xxh3-128, in hex: finds every accident, at a tenth of the cost of the write. It is no defence against a forger."""
    return xxhash.xxh3_128_hexdigest(data)


def encode_json(value: Any) -> bytes:
    """JSON as every file of a checkpoint holds it. NaN and inf are allowed: a metric may be one, and must come back."""
    return (json.dumps(value, indent=2) + "\n").encode()


def decode_json(relative: str, data: bytes) -> Any:
    """The value in a JSON file of a checkpoint; CheckpointError, naming it, if there is none."""
    try:
        return json.loads(data)
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
    name: str, step: int, files: Mapping[str, tuple[int, str]], fingerprint: Mapping[str, Any], extra: Mapping[str, Any]
) -> tuple[bytes, str]:
    """The bytes of a manifest and its digest. `files` maps a relative path to (size in bytes, xxh3-128)."""
    body = {
        "schema": SCHEMA,
        "name": name,
        "step": step,
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "versions": _versions(),
        "fingerprint": fingerprint,
        "extra": extra,
        "files": {relative: {"size": size, "xxh3_128": hexdigest} for relative, (size, hexdigest) in sorted(files.items())},
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
        if not isinstance(entry, dict) or set(entry) != {"size", "xxh3_128"}:
            raise CheckpointError(f"{MANIFEST} has {entry!r} for {relative}, expected its size and xxh3_128")
    return manifest


def read(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory, its seal checked; OSError if it cannot be read."""
    return parse((directory / MANIFEST).read_bytes())


def _locate(directory: Path, relative: str) -> Path:
    path = directory / check_relative(relative)
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(os.path.realpath(directory)):
        raise CheckpointError(f"{relative} leads out of the checkpoint's directory, to {target}")
    return path


def is_whole(directory: Path) -> bool:
    """The cheap check: the manifest is sealed and every file is there with its size. Digests are not looked at."""
    try:
        files = read(directory)["files"]
        return all(_locate(directory, relative).stat().st_size == entry["size"] for relative, entry in files.items())
    except (OSError, CheckpointError):
        return False


def verified_bytes(directory: Path, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """The contents of every file by relative path, after all of them were found to have their size and digest."""
    contents: dict[str, bytes] = {}
    for relative, entry in manifest["files"].items():
        path = _locate(directory, relative)
        if not path.is_file():
            raise CheckpointError(f"{relative} is missing")
        data = path.read_bytes()  # read once: the bytes that are checked are the bytes that are used
        if len(data) != entry["size"]:
            raise CheckpointError(f"{relative} has {len(data)} bytes, the manifest says {entry['size']}")
        if digest(data) != entry["xxh3_128"]:
            raise CheckpointError(f"{relative} does not match its digest")
        contents[relative] = data
    return contents
