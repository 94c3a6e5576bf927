"""The records of a custom loop, as they lie in its `log_path`. Flat dicts enter, `NAME.pt` files leave, and the other way.

`checkpoint_utils` is the face of this; it stays light because everything that needs numpy or torch is here. A loop's record
is flat, {name, kind, batch, state_path, ..., the loop's own keys}, sealed as the trainer's records are, and may lack any of
them but the first two. The trainer's records and the plain dicts of other loops are read as well.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from agentlightning.checkpoint import manifest as manifests
from agentlightning.checkpoint.files import entries, fsync_directory, make_directory, replace_file, temporary, write_new
from agentlightning.checkpoint.manifest import MANIFEST
from agentlightning.checkpoint.record import (
    LOOP_SCHEMA,
    MAX_RECORD_BYTES,
    RECORD_SUFFIX,
    NoRecordError,
    beside,
    encode_plain,
    parse_plain,
    read_plain,
    record_path,
)
from agentlightning.errors import CheckpointError

PATH_KEYS = ("state_path", "sampler_path")
_LONGEST_PATH = "x" * 4096
_DEAD_SECONDS = 3600.0  # a staged record gets its name within a second, or never
_STAGED = re.compile(r"\..+\.(loop|pt\.aside-\d+)\.[0-9a-f]{32}\.tmp")
_COMMITTING = threading.Lock()  # two saves of one name: the second must see the record of the first


@dataclass(frozen=True, slots=True)
class Found:
    """A record that was read. Example: `Found("10.pt", {"name": "10", "batch": 10, "state_path": "tinker://..."}, 0, None)`."""

    file: str  # its name in `log_path`
    values: Mapping[str, Any]  # flat; paths lead from the working directory, or are absolute, or URLs
    written_ns: int  # the file's time
    digest: str | None  # of the manifest in `state_path`; only the trainer's records tell it


@dataclass(frozen=True, slots=True)
class Directory:
    """Everything in a `log_path` that is named as a record."""

    found: tuple[Found, ...]  # oldest first
    unreadable: tuple[tuple[str, str], ...]  # (file name, words for people): may have been a record
    others: tuple[tuple[str, str], ...]  # the same of whole files that are no record: somebody's weights


def read_directory(root: Path) -> Directory:
    """Read every `*.pt` of `root`, none if it is not there. CheckpointError if the directory cannot be read."""
    try:
        names = entries(root)
    except OSError as error:
        raise CheckpointError(
            f"log_path={root} cannot be read ({error.strerror}), expected a directory; mend it, or give another: log_path=DIR"
        ) from error
    found: list[Found] = []
    unreadable: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    for path in (root / name for name in names if name.endswith(RECORD_SUFFIX) and not name.startswith(".")):
        try:
            found.append(_read(path))
        except NoRecordError as error:
            others.append((path.name, f"passed over: {error}"))
        except (CheckpointError, OSError) as error:
            if os.path.lexists(path):  # else it was moved or removed meanwhile, and is no longer anything of this directory
                unreadable.append((path.name, f"passed over: {error}"))
    return Directory(tuple(_oldest_first(found)), tuple(unreadable), tuple(others))


def _read(path: Path) -> Found:
    plain = read_plain(path)
    written = path.stat().st_mtime_ns
    if "schema" in plain and "digest" in plain:
        record = parse_plain(path, plain)
        own = {key: getattr(record, key) for key in ("name", "step", "batch", *PATH_KEYS) if getattr(record, key) is not None}
        return Found(path.name, {**record.extra, **own}, written, record.digest)
    return Found(path.name, _flat(path, plain), written, None)


def _flat(path: Path, plain: Mapping[str, Any]) -> dict[str, Any]:
    """What a flat record says: one of `checkpoint_utils`, or the plain dict of another loop."""
    schema = plain.get("schema")
    ours = isinstance(schema, str) and schema.partition("/")[0] == LOOP_SCHEMA.partition("/")[0]
    if ours and schema != LOOP_SCHEMA:
        raise CheckpointError(f"the record has schema {schema}, this version reads {LOOP_SCHEMA}")
    values = {str(key): value for key, value in plain.items() if not (ours and key == "schema")}
    for key in ("batch", *PATH_KEYS):
        if key in values and values[key] is None:
            del values[key]
    if not ours and not any(key in values for key in PATH_KEYS):
        raise NoRecordError("it names neither a state_path nor a sampler_path")
    if "batch" in values and (type(values["batch"]) is not int or values["batch"] < 0):
        raise CheckpointError(f"its `batch` is {values['batch']!r}, expected the number of the next batch to train")
    for key in PATH_KEYS:
        if key in values:
            if not isinstance(values[key], str) or not values[key]:
                raise CheckpointError(f"its {key} is {values[key]!r}, expected a path")
            values[key] = beside(path, values[key])
    if "name" not in values or not isinstance(values["name"], str):
        values["name"] = path.name.removesuffix(RECORD_SUFFIX)
    return values


def _oldest_first(found: Sequence[Found]) -> list[Found]:
    """By what the records hold: `epoch` where all of them hold one, since `batch` may count within it, then `batch`.

    Among equals a record for good is newer than a rolling one or one that expires, whose state may be gone at any time. The
    file's time says only what is left: a copied directory has times that say nothing.
    """
    by_epoch = all(_number(record.values, "epoch") is not None for record in found)

    def age(record: Found) -> tuple[float, float, bool, int, str]:
        epoch = _number(record.values, "epoch") if by_epoch else None
        batch = _number(record.values, "batch")
        done = batch if batch is not None else _number(record.values, "step")
        passing = any(record.values.get(key) for key in ("rolling", "ttl_seconds"))
        position = -1.0 if done is None else done
        return (0.0 if epoch is None else epoch, position, not passing, record.written_ns, record.file)

    return sorted(found, key=age)


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    return value if type(value) in (int, float) and value == value else None  # NaN has no place in an order


def without_gone(record: Found, verify: str | None = None) -> tuple[Found | None, list[str]]:
    """The record without paths behind which nothing usable lies, and why; None if it named some and none is left.

    What a manifest vouches for must have its sizes, and behind the path of the key `verify` every byte must be as it was saved.
    What lies behind a URL (`tinker://`) cannot be looked at from here: it is taken as it is.
    """
    named = [key for key in PATH_KEYS if key in record.values]
    reasons: dict[str, str] = {}
    for key in named:
        reason = _trouble(record.values[key], record.digest if key == "state_path" else None, thorough=key == verify)
        if reason is not None:
            reasons[key] = f"its {key} {reason}"
    if named and len(reasons) == len(named):
        return None, list(reasons.values())
    values = {key: value for key, value in record.values.items() if key not in reasons}
    return replace(record, values=values), list(reasons.values())


def _trouble(path: str, digest: str | None, thorough: bool) -> str | None:
    """Why what `path` names cannot be used, or None."""
    if "://" in path:
        return None
    place = Path(path)
    try:
        if not place.exists():
            return f"{path} is gone"
        if digest is None and not (place / MANIFEST).is_file():
            return None  # another loop's state, in a form of its own
        manifest = manifests.read(place)
        if digest is not None and manifest["digest"] != digest:
            return f"{path} is not the directory that the record was written for"
        for relative, entry in manifest["files"].items():
            if thorough:
                manifests.verified_bytes(place, {"files": {relative: entry}})  # one at a time: memory for one file
            elif manifests.locate(place, relative).stat().st_size != entry["size"]:
                return f"{path} is damaged: {relative} has not the {entry['size']} bytes that the manifest says"
    except CheckpointError as error:
        return f"{path} is damaged: {error}"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror} at {error.filename})"
    return None


def last(root: Path, required_key: str) -> tuple[Found | None, list[tuple[str, str]]]:
    """The newest usable record that holds `required_key`, and (file name, words) of what was passed over or is missing in it.

    None if there is no such record. CheckpointError if there are some, or files that may have been some, and none is
    usable: to train from scratch then must be a person's decision.
    """
    directory = read_directory(root)
    passed_over = list(directory.unreadable)
    holders = [record for record in directory.found if record.values.get(required_key) is not None]
    for record in reversed(_oldest_first(holders)):
        usable, reasons = without_gone(record, verify=required_key)
        if usable is not None and usable.values.get(required_key) is not None:
            missing = [(record.file, reason) for reason in reasons]
            return usable, [*passed_over, *directory.others, *missing]
        passed_over += [(record.file, f"passed over: {reason}") for reason in reasons]
    if not passed_over:
        return None, list(directory.others)
    lines = "\n".join(f"  {file}: {reason}" for file, reason in passed_over)
    raise CheckpointError(
        f"log_path={root} holds records, and none of them can be resumed from ({required_key} is needed):\n{lines}\n"
        "Put back what they name or a good copy; to start over on purpose, move these files out of the directory, "
        "or give another with log_path=DIR"
    )


def prepare(root: Path, name: str, values: Mapping[str, Any]) -> None:
    """Fail now if the record `name` with `values` could not be written later; makes `root`.

    CheckpointError for the directory, ValueError for values that a record cannot hold.
    """
    path = record_path(root, name)
    try:
        make_directory(root)
        if os.path.lexists(path) and not path.is_file():
            raise CheckpointError(f"{path} is in the way of the record: it is no file; move it, or save under another name=")
        if not os.access(root, os.W_OK | os.X_OK):
            raise CheckpointError(f"log_path={root} cannot be written; mend that, or give another with log_path=DIR")
    except OSError as error:
        raise CheckpointError(
            f"log_path={root} cannot be used ({error.strerror} at {error.filename}); give another with log_path=DIR"
        ) from error
    size = len(encode_plain(name, {"schema": LOOP_SCHEMA, **values, **dict.fromkeys(PATH_KEYS, _LONGEST_PATH)}))
    if size > MAX_RECORD_BYTES:
        raise ValueError(f"loop_state takes {size:,} bytes in a record, expected at most {MAX_RECORD_BYTES:,}; save less of it")


def commit(root: Path, name: str, values: Mapping[str, Any]) -> Path:
    """Write the record `name`: it is there, durably and whole, when this returns, and not at all before.

    A record of that name stays there until the new one takes its place at once, and its bytes stay beside it as
    `NAME.pt.aside-1`, -2 and so on: rename such a file back to have the record again. CheckpointError if the file system
    refuses.
    """
    path = record_path(root, name)
    plain = {"schema": LOOP_SCHEMA, **values}
    for key in PATH_KEYS:
        if key in plain:
            plain[key] = _relative(root, plain[key])
    data = encode_plain(name, plain)
    staged = temporary(root, f"{name}.loop")
    with _COMMITTING:
        try:
            _remove_dead(root)
            write_new(staged, data)
            if path.exists():
                _keep_aside(path)
            os.replace(staged, path)
            fsync_directory(root)
        except OSError as error:
            with contextlib.suppress(OSError):  # it is what the next save clears away, or was never made
                staged.unlink(missing_ok=True)
            saved = ", ".join(values[key] for key in PATH_KEYS if key in values) or "nothing"
            raise CheckpointError(
                f"the record {path} was not written: {error.strerror or error} at {error.filename or root}. What the training "
                f"client saved for it ({saved}) is not lost; mend the directory and save again, or give another: log_path=DIR"
            ) from error
    return path


def _relative(root: Path, path: str) -> str:
    """As the record holds it: a path below `root` counts from the record, so that the directory can be moved or copied."""
    if "://" in path:
        return path
    absolute, base = Path(os.path.abspath(path)), Path(os.path.abspath(root))
    return str(absolute.relative_to(base) if absolute.is_relative_to(base) else absolute)


def _keep_aside(path: Path) -> None:
    """A copy of a record's bytes beside it, under a name that is no record's."""
    names = (path.with_name(f"{path.name}.aside-{number}") for number in count(1))
    replace_file(next(name for name in names if not name.exists()), path.read_bytes())


def _remove_dead(root: Path) -> None:
    """Delete what saves that were killed have staged. The trainer's own leftovers have other names."""
    for path in (root / name for name in entries(root) if _STAGED.fullmatch(name)):
        with contextlib.suppress(FileNotFoundError):  # another save was faster
            if time.time() - path.stat().st_mtime > _DEAD_SECONDS:
                path.unlink()
