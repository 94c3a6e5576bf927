"""`agl ckpt ls`: what lies in a run directory. A directory and a policy enter, rows leave.

One row for each thing that is named as a checkpoint. Records and manifests are read, file sizes are looked at, no tensor is
read: whether the bytes are good is for `verify` to say. Nothing is hidden: a torn record, a directory without one and another
loop's record each have a row that says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from agentlightning.checkpoint.files import entries
from agentlightning.checkpoint.loop_record import Found, read_directory
from agentlightning.checkpoint.manifest import MANIFEST
from agentlightning.checkpoint.record import RECORD_SUFFIX, CheckpointRecord, list_records, record_path
from agentlightning.checkpoint.retention import (
    METRICS,
    RetentionPolicy,
    is_leftover,
    metric_of,
    reasons_to_keep,
    step_of,
    verified_at,
)
from agentlightning.errors import CheckpointError
from agentlightning.tools.runs import sound_manifest

_PREFERRED_METRICS = ("val-core/", "critic/score/mean")  # what a person asks first of a checkpoint


@dataclass(frozen=True, slots=True)
class Row:
    """One checkpoint, or what is left of one."""

    name: str
    state: Literal["whole", "bad", "foreign"]
    step: int | None
    saved_at: str | None  # ISO, UTC
    bytes: int | None  # of all its files, the manifest included
    metric: float | None  # the listing's metric, as the record has it
    verified_at: str | None  # ISO, UTC; when every byte of it was last read and found good
    kept: tuple[str, ...]  # why it stays; nothing: a whole one goes at the next prune, any other is never pruned
    problem: str | None  # of a bad one


@dataclass(frozen=True, slots=True)
class Listing:
    """All of a run directory, newest first; what has no step comes last."""

    run: str
    policy: RetentionPolicy
    metric: str | None  # which metric the rows show
    rows: tuple[Row, ...]


def list_checkpoints(root: Path, policy: RetentionPolicy, metric: str | None = None) -> Listing:
    """The rows of a run directory. `metric` is what they show, else the policy's, else the first validation metric found."""
    readable, unreadable = list_records(root)
    shown = metric or policy.metric or _usual_metric([record for _, record in readable])
    verified = verified_at(root, (record for path, record in readable if path.stem == record.name))
    kept = {entry.name: entry.reasons for entry in reasons_to_keep(root, policy)}
    rows = [_row(root, path, record, shown, verified, kept) for path, record in readable]
    loops = {found.file: found for found in read_directory(root).found}  # these may name no state: a loop's own counters, say
    rows += [_loop(loops[name]) if name in loops else _bad(name.removesuffix(RECORD_SUFFIX), why) for name, why in unreadable]
    rows += [_bad(name, reason) for name, reason in _without_record(root).items()]
    rows.sort(key=lambda row: -1 if row.step is None else row.step, reverse=True)
    return Listing(str(root), policy, shown, tuple(rows))


def _usual_metric(records: list[CheckpointRecord]) -> str | None:
    for record in records:
        metrics = record.extra.get(METRICS)
        names = sorted(metrics) if isinstance(metrics, dict) else []
        for wanted in _PREFERRED_METRICS:
            if found := [name for name in names if name.startswith(wanted)]:
                return found[0]
    return None


def _row(
    root: Path,
    path: Path,
    record: CheckpointRecord,
    metric: str | None,
    verified: Mapping[str, str],
    kept: Mapping[str, tuple[str, ...]],
) -> Row:
    value = None if metric is None else metric_of(record, metric)
    if record.digest is None:
        saved_at = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
        return Row(path.stem, "foreign", record.step, saved_at, None, value, None, (), None)
    if path.stem != record.name:
        return _bad(path.stem, f"its record is a copy of {record.name}{RECORD_SUFFIX}; expected them to have one name")
    try:
        manifest = sound_manifest(root / record.name, record.digest)
        size = sum(entry["size"] for entry in manifest["files"].values()) + (root / record.name / MANIFEST).stat().st_size
    except CheckpointError as error:
        return Row(record.name, "bad", record.step, None, None, value, None, (), str(error))
    except OSError as error:  # pruned by its run while we look, or unreadable
        return Row(record.name, "bad", record.step, None, None, value, None, (), f"{MANIFEST}: {error.strerror}")
    if record.name not in kept:
        return Row(record.name, "bad", record.step, manifest["created"], size, value, None, (), _what_is_torn(root, manifest))
    when = verified[record.name] if record.name in verified else None  # noqa: SIM401
    return Row(record.name, "whole", record.step, manifest["created"], size, value, when, kept[record.name], None)


def _what_is_torn(root: Path, manifest: Mapping[str, Any]) -> str:
    for relative, entry in manifest["files"].items():
        file = root / manifest["name"] / relative
        if not file.is_file():
            return f"{relative} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{relative} has {file.stat().st_size:,} bytes, the manifest says {entry['size']:,}"
    return "it changed while it was looked at"


def _loop(found: Found) -> Row:
    """A record that a custom loop wrote, and that names no state of ours."""
    step = found.values["batch"] if "batch" in found.values else None  # noqa: SIM401
    saved_at = datetime.fromtimestamp(found.written_ns / 1e9, UTC).isoformat(timespec="seconds")
    return Row(found.file.removesuffix(RECORD_SUFFIX), "foreign", step, saved_at, None, None, None, (), None)


def _bad(name: str, reason: str) -> Row:
    return Row(name, "bad", step_of(name), None, None, None, None, (), reason)


def _without_record(root: Path) -> dict[str, str]:
    """Directories that are named as checkpoints and have no record, with what they are."""
    names = [name for name in entries(root) if step_of(name) is not None and (root / name).is_dir()]
    return {
        name: "a save or prune is under way, or died; then it goes at the next start"
        if is_leftover(root, name)
        else f"a directory without its record {name}{RECORD_SUFFIX}"
        for name in names
        if not record_path(root, name).exists()
    }
