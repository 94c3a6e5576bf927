"""The record of a checkpoint: `NAME.pt`, the small file whose appearance is the commit.

A `CheckpointRecord` enters and leaves. On disk it is `torch.save` of a plain dict, so that any custom loop reads it with
`torch.load(path, weights_only=True)`. Ours ends with a seal, a digest of all bytes before it, kept where a zip file allows a
comment. Records of other loops (a dict with `batch` and `state_path`) are read too; those rest on the CRCs that a zip file has.
torch is imported only when a record is written or read.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentlightning.checkpoint.files import entries, fsync_directory, temporary, write_new
from agentlightning.checkpoint.manifest import SCHEMA, digest
from agentlightning.errors import CheckpointError

RECORD_SUFFIX = ".pt"
MAX_RECORD_BYTES = 16 << 20  # a record is a few KB; a larger `.pt` is somebody's weights, and not read
_SEAL_PREFIX = b"agentlightning:xxh3-128:"
_SEAL_BYTES = len(_SEAL_PREFIX) + 32
LOOP_SCHEMA = "agentlightning.loop/1"  # in records that checkpoint_utils writes for custom loops
_OWN_KEYS = {"schema", "name", "step", "batch", "state_path", "sampler_path", "digest", "extra"}

# What the zip reader and the restricted unpickler raise on bytes that are torn, or were made to break them.
_UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
)


class NoRecordError(CheckpointError):
    """The file is whole and something else: somebody's weights, say."""


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """What a record says. Example: `CheckpointRecord("global_step_40", 40, 40, "runs/a/global_step_40", None)`.

    On disk the paths are relative to the record, so that a run directory can be moved or copied; read back they lead from the
    working directory, or are absolute, as the record's own path was.
    """

    name: str
    step: int  # batches completed
    batch: int  # the next batch to train, counted from 0: equal to `step` unless a loop says otherwise
    state_path: str  # the checkpoint's directory
    sampler_path: str | None  # the adapter's directory, in PEFT's layout
    digest: str | None = None  # of the manifest in `state_path`; None in a record of another loop
    extra: Mapping[str, Any] = field(default_factory=dict)  # plain values, they come back as they were


def record_path(root: Path, name: str) -> Path:
    """Where the record of the checkpoint `name` lies in the run directory `root`."""
    return root / f"{name}{RECORD_SUFFIX}"


def encode_record(record: CheckpointRecord) -> bytes:
    """The bytes of a sealed record; paths are written as given. ValueError if `extra` would not come back."""
    plain = {key: getattr(record, key) for key in ("name", "step", "batch", "state_path", "sampler_path", "digest")}
    return encode_plain(record.name, {"schema": SCHEMA, **plain, "extra": dict(record.extra)})


def encode_plain(name: str, plain: Mapping[str, Any]) -> bytes:
    """The bytes of a sealed record that holds `plain`. ValueError, with the record's name, if that would not come back."""
    import torch

    buffer = io.BytesIO()
    torch.save(dict(plain), buffer)
    assert buffer.getvalue()[-22:-18] == b"PK\x05\x06", "torch.save no longer ends with a plain end-of-zip record"
    data = buffer.getvalue()[:-2] + struct.pack("<H", _SEAL_BYTES)  # a zip file ends with the length of its comment
    sealed = data + _SEAL_PREFIX + digest(data).encode()
    try:
        _load_dict(sealed)
    except CheckpointError as error:
        raise ValueError(f"the record of {name} holds something that is no plain value: {error}") from error
    return sealed


def write_record(directory: Path, record: CheckpointRecord) -> Path:
    """Stage, fsync and rename `record` into `directory`; returns its path. The checkpoint exists from here on.

    `record.state_path` and `record.sampler_path` are written as given: relative ones are relative to `directory`.
    """
    staged = stage_record(directory, record)
    return commit_record(staged, directory, record.name)


def stage_record(directory: Path, record: CheckpointRecord) -> Path:
    """The first half of `write_record`: the bytes are durable under a hidden name, and nothing is committed."""
    staged = temporary(directory, f"{record.name}{RECORD_SUFFIX}")
    write_new(staged, encode_record(record))
    return staged


def commit_record(staged: Path, directory: Path, name: str) -> Path:
    """The second half of `write_record`: rename, and make the rename durable."""
    path = record_path(directory, name)
    staged.rename(path)
    fsync_directory(directory)
    return path


def _load_dict(data: bytes) -> dict[str, Any]:
    """The dict in a record's bytes. Nothing that could run code is unpickled: torch refuses it under `weights_only`."""
    import torch

    if not data:
        raise CheckpointError("the file is empty")
    sealed = data[-_SEAL_BYTES:].startswith(_SEAL_PREFIX)
    if sealed and data[-32:].decode("latin-1") != digest(data[:-_SEAL_BYTES]):
        raise CheckpointError("the record does not match its seal")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()  # torch's own reader leaves the CRCs unread
        if damaged is not None:
            raise CheckpointError(f"the record is damaged at {damaged}")
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"the record cannot be read ({reason})") from error
    if not isinstance(value, dict):
        raise NoRecordError(f"the file holds a {type(value).__name__}, expected a dict with batch and state_path")
    if not sealed and "schema" in value and ("digest" in value or value["schema"] == LOOP_SCHEMA):
        raise CheckpointError("the record has lost its seal")
    return value


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def read_plain(path: Path) -> dict[str, Any]:
    """The dict in a record's file, whoever wrote it, undamaged; CheckpointError says why there is none."""
    try:
        if not path.is_file():
            raise CheckpointError("it is no file, or a link to one that is gone")
        size = path.stat().st_size
        if size > MAX_RECORD_BYTES:
            raise NoRecordError(f"the file has {size} bytes; a record has at most {MAX_RECORD_BYTES}")
        return _load_dict(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"the record cannot be read ({error.strerror})") from error


def read_record(path: Path) -> CheckpointRecord:
    """Read a record of ours, or the plain dict of another loop; CheckpointError says why it cannot be one."""
    return parse_plain(path, read_plain(path))


def parse_plain(path: Path, value: Mapping[str, Any]) -> CheckpointRecord:
    """The record that `read_plain(path)` holds; CheckpointError says what is missing."""
    if "batch" not in value or not _is(value["batch"], int) or value["batch"] < 0:
        raise CheckpointError("the record has no `batch`, the number of the next batch to train")
    if "state_path" not in value or not _is(value["state_path"], str):
        raise CheckpointError("the record has no `state_path`, the place of the state")
    if "schema" in value and "digest" in value:
        return _own_record(value, path)
    known = {"name", "step", "batch", "state_path", "sampler_path"}
    sampler = value["sampler_path"] if "sampler_path" in value and _is(value["sampler_path"], str) else None
    return CheckpointRecord(
        name=path.stem,
        step=value["step"] if "step" in value and _is(value["step"], int) else value["batch"],
        batch=value["batch"],
        state_path=beside(path, value["state_path"]),
        sampler_path=None if sampler is None else beside(path, sampler),
        extra={str(key): item for key, item in value.items() if key not in known},
    )


def _own_record(value: Mapping[str, Any], path: Path) -> CheckpointRecord:
    if value["schema"] != SCHEMA:
        raise CheckpointError(f"the record has schema {value['schema']}, this version reads {SCHEMA}")
    if set(value) != _OWN_KEYS:
        raise CheckpointError(f"the record holds {sorted(map(str, value))}, expected {sorted(_OWN_KEYS)}")
    sampler = value["sampler_path"]
    if not (_is(value["step"], int) and _is(value["name"], str) and isinstance(value["extra"], dict)):
        raise CheckpointError("the record's step, name or extra is not of its type")
    return CheckpointRecord(
        name=value["name"],
        step=value["step"],
        batch=value["batch"],
        state_path=beside(path, value["state_path"]),
        sampler_path=None if sampler is None else beside(path, sampler),
        digest=value["digest"],
        extra=value["extra"],
    )


def beside(path: Path, given: str) -> str:
    """A relative path in a record counts from the record; a URL stays one."""
    return given if "://" in given else str(path.parent / given)


def list_records(root: Path) -> tuple[list[tuple[Path, CheckpointRecord]], list[tuple[str, str]]]:
    """Every `*.pt` of a run directory: the readable ones, newest first by their step, and (file name, reason) of the others.

    File time only breaks ties: a copied or restored directory has times that say nothing. CheckpointError if the directory
    cannot be read; one that is not there holds none.
    """
    try:
        names = entries(root)
    except OSError as error:
        raise CheckpointError(
            f"the run directory {root} cannot be read ({error.strerror}); mend it, "
            "or give another with trainer.default_local_dir=DIR"
        ) from error
    readable: list[tuple[int, int, Path, CheckpointRecord]] = []
    unreadable: list[tuple[str, str]] = []
    for path in (root / name for name in names):
        if path.suffix != RECORD_SUFFIX or path.name.startswith("."):
            continue
        try:
            record = read_record(path)
            readable.append((record.step, path.stat().st_mtime_ns, path, record))
        except (CheckpointError, OSError) as error:
            unreadable.append((path.name, str(error)))
    readable.sort(key=lambda entry: entry[:3], reverse=True)
    return [(path, record) for _, _, path, record in readable], unreadable
