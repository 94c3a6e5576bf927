"""A run directory behind a URL. Committed local checkpoints enter; a URL that holds the same leaves, one checkpoint at a time.

The run works in a local staging directory with the local store. The URL is the truth and the staging directory a cache of it: a
checkpoint exists when its record lies at the URL, and one that was never pushed is not believed after a restart.

An object store renames nothing, so leftovers are known by a marker instead, `.NAME.<uuid>.tmp`, put there first and removed
last; the next start finds it and undoes, or ends, what it tells of. The order of a push: marker, files, their sizes as the
server lists them, lease, small files, record, which is the commit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from agentlightning.checkpoint import manifest as manifests
from agentlightning.checkpoint import retention
from agentlightning.checkpoint.files import LEFTOVER, entries, replace_file, temporary
from agentlightning.checkpoint.lease import LeaseLostError
from agentlightning.checkpoint.manifest import MANIFEST, check_relative
from agentlightning.checkpoint.record import MAX_RECORD_BYTES, RECORD_SUFFIX, read_record, record_path
from agentlightning.checkpoint.remote_lease import RemoteLease
from agentlightning.checkpoint.remote_objects import Objects, client_errors, mask, words
from agentlightning.errors import CheckpointError, UserError

SMALL_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "attempts.jsonl",
    "verified.json",
    "mlflow_run_id.txt",
    "wandb_run_id.txt",
    "mlflow_run_id.txt",
    "latest_checkpointed_iteration.txt",
)
LAPSE_SECONDS = 60.0
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "sftp": "paramiko"}
_ASIDE = re.compile(r"aside-\d+")

log = logging.getLogger(__name__)


class RemoteUnreachableError(UserError):
    """The URL could not be read, which says nothing about what it holds.

    Not a CheckpointError on purpose: a search for a valid checkpoint passes those over, and would go back to an older one.
    """


@dataclass(frozen=True, slots=True)
class PushStats:
    """What one push moved. Example: `PushStats(bytes=1_234_567, seconds=0.8)`."""

    bytes: int  # of the checkpoint: its files, its manifest and its record
    seconds: float  # from the call to the commit


def is_url(text: str) -> bool:
    """Whether a run directory is to be mirrored. `file://` is a local path, and its caller's to take apart."""
    return "://" in text and not text.startswith("file://")


def staging_for(url: str, parent: Path | None = None) -> Path:
    """Where the run of a URL works on this host: the same directory at each start, so that what is there need not be fetched.

    Example: `staging_for("s3://bucket/run")` is `~/.cache/agentlightning/s3-bucket-run-<10 hex digits>`.
    """
    shown = mask(url).rstrip("/")  # a password does not belong in a path, and may change
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", shown).strip("-.")[-60:].lstrip("-.")
    base = Path.home() / ".cache" / "agentlightning" if parent is None else parent
    return base / f"{readable}-{hashlib.sha256(shown.encode()).hexdigest()[:10]}"


def _open(url: str) -> Objects:
    shown = mask(url)
    protocol = url.partition("://")[0]
    try:
        import fsspec

        fs, root = fsspec.url_to_fs(url)
    except ImportError as error:
        package = "fsspec" if error.name == "fsspec" else _PACKAGES.get(protocol, f"the fsspec package for {protocol}://")
        raise CheckpointError(
            f"trainer.default_local_dir={shown} needs a package that is not installed: pip install {package} ({error})"
        ) from error
    except (ValueError, OSError, *client_errors()) as error:
        raise CheckpointError(
            f"trainer.default_local_dir={shown} cannot be opened ({mask(str(error))}); expected a URL that fsspec knows, "
            "such as s3://bucket/run, or a local directory"
        ) from error
    return Objects(fs, root, url)


class Mirror:
    """Keeps a URL equal to a local run directory, alone: it holds the URL's lease from construction to `release`.

    Example: `mirror = Mirror(url, staging_for(url))`, `mirror.pull_index()`, then `mirror.fetch(name)` for the checkpoint that
    is to be loaded, and after each commit `mirror.push(name, SMALL_FILES)`. One call at a time: the caller sees to that.
    """

    url: str  # without its password

    def __init__(self, url: str, staging: Path, *, lapse_s: float = LAPSE_SECONDS):
        """CheckpointError, within a second where the server answers, if another run holds the URL or it cannot be used.

        `lapse_s` is how long a holder on another host may be silent before it is taken over.
        """
        self._staging = staging
        self._objects = _open(url)
        self.url = self._objects.shown
        self._lease = RemoteLease(self._objects, lapse_s)
        self._owed: set[str] = set()  # see discard

    @property
    def lost(self) -> bool:
        """Whether another run was seen to have taken over. Once true, nothing can be saved here any more."""
        return self._lease.lost

    def check_held(self) -> None:
        """LeaseLostError if another run has taken over; CheckpointError if that cannot be known."""
        with self._objects.speaking(f"it is not known whether {self.url} is still this run's"):
            self._lease.check_held()

    def release(self) -> None:
        """Let the next run in."""
        self._lease.release()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    # ---- the URL to the staging directory

    def pull_index(self) -> None:
        """Undo at the URL what died half-way, then make the top level of the staging directory equal to the URL's.

        Records and small files are fetched, checkpoints only when `fetch` asks for them. Local checkpoints that the URL does
        not have, bit for bit, are removed; where the URL holds nothing at all, everything local moves to `aside-<n>/` instead.
        """
        with self._objects.speaking(f"{self.url} and its copy in {self._staging} cannot be made equal"):
            self._lease.check_held()
            self._staging.mkdir(parents=True, exist_ok=True)
            retention.remove_leftovers(self._staging)
            top = self._end_what_died()
            small = [name for name in SMALL_FILES if name in top]
            records: dict[str, bytes] = {}
            self._objects.each(lambda name: records.update({name: self._objects.read(f"{name}{RECORD_SUFFIX}")}), _records(top))
            if records or small:
                self._drop_unpushed(records)
                for name, data in records.items():
                    if not record_path(self._staging, name).exists():
                        replace_file(record_path(self._staging, name), data)
                self._pull_small(small)
            else:
                self._move_all_aside()
            for name in top:
                if _ASIDE.fullmatch(name):
                    (self._staging / name).mkdir(exist_ok=True)  # so that the next number is the next one at the URL too

    def _end_what_died(self) -> dict[str, int | None]:
        """Undo, or end, what the markers tell of; the names at the URL afterwards."""
        top = self._objects.top()
        for name in top:
            found = LEFTOVER.fullmatch(name)
            told = _told(self._objects.read(name)) if found is not None else None
            if told is None:
                continue  # not a marker of ours
            if "checkpoint" in told:
                if f"{told['checkpoint']}{RECORD_SUFFIX}" not in top:
                    self._objects.remove(told["checkpoint"])
            elif told["moving"]:
                self._remove_items(told["items"])  # all was copied, and some may be gone already
            else:
                self._objects.remove(told["aside"])  # nothing was removed yet
            self._objects.remove(name)
        return self._objects.top()

    def _drop_unpushed(self, records: Mapping[str, bytes]) -> None:
        going: list[str] = []
        for name in self._local_checkpoints():
            record = record_path(self._staging, name)
            if name not in records or not record.is_file() or record.read_bytes() != records[name]:
                going.append(name)
        if going:
            log.warning("%s: not at %s as they are here, so they do not count: %s", self._staging, self.url, ", ".join(going))
            retention.discard(self._staging, going)

    def _local_checkpoints(self) -> list[str]:
        """Every name that has a record in the staging directory, or a directory named as a checkpoint is."""
        found = [entry for entry in entries(self._staging) if not entry.startswith(".")]
        records = {entry.removesuffix(RECORD_SUFFIX) for entry in found if entry.endswith(RECORD_SUFFIX)}
        return sorted(records | {entry for entry in found if retention.step_of(entry) is not None})

    def _pull_small(self, small: Sequence[str]) -> None:
        for name in SMALL_FILES:
            local = self._staging / name
            if name not in small:
                local.unlink(missing_ok=True)
                continue
            data = self._objects.read(name)
            if not local.is_file() or local.read_bytes() != data:
                replace_file(local, data)

    def _move_all_aside(self) -> None:
        names = self._local_checkpoints()
        paths = [record_path(self._staging, name) for name in names]
        paths += [self._staging / name for name in (*names, *SMALL_FILES)]
        if moving := [path for path in paths if path.exists()]:
            aside = retention.move_aside(self._staging, moving)
            log.warning("%s holds nothing, so what its copy in %s held was moved to %s", self.url, self._staging, aside)

    def fetch(self, name: str) -> None:
        """Have the checkpoint `name` of the last `pull_index` in the staging directory, every digest verified.

        CheckpointError, with the reason, if what lies at the URL is not what was saved; RemoteUnreachableError if the URL or
        the local disk failed, which is no reason to go back to an older one. A record that points elsewhere is left alone.
        """
        record = read_record(record_path(self._staging, name))
        directory = self._staging / name
        if Path(record.state_path) != directory or _fault(directory, record.digest) is None:
            return
        part = temporary(self._staging, name)
        try:
            self._download(name, record.digest, part)
            if (fault := _fault(part, record.digest)) is not None:
                raise CheckpointError(f"{fault}, as fetched from {self.url}/{name}")
            if directory.exists():
                directory.rename(temporary(self._staging, name))
            part.rename(directory)
        except OSError as error:
            raise RemoteUnreachableError(
                f"checkpoint {name} could not be fetched from {self.url}: {words(error)}; nothing was changed, "
                "start the same command again when that is mended"
            ) from error
        finally:
            with suppress(OSError):
                retention.remove_leftovers(self._staging, [name])

    def _download(self, name: str, digest: str | None, part: Path) -> None:
        manifest, fault = self._manifest_at_url(name, digest)
        if manifest is None:
            raise CheckpointError(fault)
        part.mkdir()
        try:
            self._objects.each(
                lambda relative: self._objects.download(f"{name}/{relative}", part / relative), [*manifest["files"], MANIFEST]
            )
        except FileNotFoundError as error:
            raise CheckpointError(f"a file of {self.url}/{name} went while it was fetched ({words(error)})") from error

    def _manifest_at_url(self, name: str, digest: str | None) -> tuple[dict[str, Any] | None, str]:
        """The manifest of a checkpoint whose files lie at the URL with their sizes, or None and what is wrong."""
        data = self._objects.read_if_there(f"{name}/{MANIFEST}")
        if data is None:
            return None, f"{self.url}/{name}/{MANIFEST} is missing"
        try:
            manifest = manifests.parse(data)
            expected = {check_relative(relative): entry["size"] for relative, entry in manifest["files"].items()}
        except CheckpointError as error:
            return None, f"{self.url}/{name}: {error}"
        if digest is not None and manifest["digest"] != digest:
            return None, f"{self.url}/{name} is not the one that its record was written for"
        fault = _size_fault(expected, self._objects.sizes(name))
        return (manifest, "") if fault is None else (None, f"{self.url}/{name}: {fault}")

    def is_whole(self, name: str) -> bool:
        """The cheap check, as `manifest.is_whole`, but of the checkpoint at the URL: it need not have been fetched."""
        with self._objects.speaking(f"checkpoint {name} at {self.url} cannot be looked at"):
            return self._manifest_at_url(name, None)[0] is not None

    # ---- the staging directory to the URL

    def push(self, name: str, small_files: Sequence[str] = ()) -> PushStats:
        """Copy the local checkpoint `name`; it exists at the URL when this returns, and not before.

        Small files that are not there are passed over. CheckpointError, with the bytes that it needs and the server's words, if
        it could not be copied: then there is no new checkpoint at the URL, and those before are as they were.
        """
        started = time.perf_counter()
        directory = self._staging / name
        try:
            manifest = manifests.read(directory)
            sizes = {relative: int(entry["size"]) for relative, entry in manifest["files"].items()}
            sizes[MANIFEST] = (directory / MANIFEST).stat().st_size
            record = record_path(self._staging, name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"checkpoint {name} cannot be read to be copied to {self.url}: {words(error)}") from error
        needed = sum(sizes.values()) + len(record)
        with self._objects.speaking(f"checkpoint {name} was not copied to {self.url}, where it needs {needed:,} bytes"):
            self._lease.check_held()
            self._make_room(name)
            with self._marked({"checkpoint": name}, undo=lambda: self._undo_push(name)):
                self._objects.each(lambda relative: self._upload(name, relative), sizes)
                if (fault := _size_fault(sizes, self._objects.sizes(name))) is not None:
                    raise OSError(f"{fault}, as the server lists it")
                self._lease.check_held()
                self._put_small(small_files)
                self._lease.check_held()
                self._objects.create(f"{name}{RECORD_SUFFIX}", record)
                self._confirm(name, sizes, record)
        return PushStats(needed, time.perf_counter() - started)

    def _upload(self, name: str, relative: str) -> None:
        if self._lease.lost:  # asks nobody: keeps a holder that slept from filling the next one's directory for long
            self._lease.check_held()
        self._objects.upload(self._staging / name / relative, f"{name}/{relative}")

    def _confirm(self, name: str, sizes: Mapping[str, int], record: bytes) -> None:
        """Take a record back that came too late: a holder that slept before it, whose files the next one has cleared away."""
        try:
            self._lease.check_held()
        except LeaseLostError:
            if _size_fault(sizes, self._objects.sizes(name)) is None:
                return  # it was in time: the next one finds the record, or has found it
            if self._objects.read_if_there(f"{name}{RECORD_SUFFIX}") == record:
                self._objects.remove(f"{name}{RECORD_SUFFIX}")
            raise
        except OSError as error:
            log.warning(
                "checkpoint %s is saved, but whether %s is still this run's is unknown (%s)", name, self.url, words(error)
            )

    def _make_room(self, name: str) -> None:
        """See that a push begins with nothing: a committed one is an error, what a dead one left goes, others move."""
        top = self._objects.top()
        if f"{name}{RECORD_SUFFIX}" in top:
            raise CheckpointError(
                f"{self.url}/{name}{RECORD_SUFFIX} exists and is not written over; resume from it, "
                "or start over with trainer.resume_mode=disable, which moves it aside"
            )
        for marker in top:
            found = LEFTOVER.fullmatch(marker)
            if found is not None and found["name"] == name and _told(self._objects.read(marker)) == {"checkpoint": name}:
                self._objects.remove(name)
                self._objects.remove(marker)
        if self._objects.sizes(name):  # a copy that somebody made, or from a holder that had lost its lease
            self._set_aside([name], retention.move_aside(self._staging, []).name)

    def _undo_push(self, name: str) -> None:
        """Remove what a failed push left, unless it is committed after all or the directory is another's by now."""
        self._lease.check_held()
        if self._objects.read_if_there(f"{name}{RECORD_SUFFIX}") is None:
            self._objects.remove(name)

    def push_files(self, names: Iterable[str]) -> None:
        """Copy small files alone, those that are there: what was written after the last checkpoint."""
        with self._objects.speaking(f"the run's small files were not copied to {self.url}"):
            self._lease.check_held()
            self._put_small(names)

    def _put_small(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                data = (self._staging / name).read_bytes()  # at once: the run goes on writing
                self._objects.write(name, data)

    # ---- at the URL

    def discard(self, names: Iterable[str]) -> None:
        """Remove checkpoints at the URL, records first; those that it does not have are passed over.

        The newest one there is kept whatever the caller says, until a newer one is there: what was pruned locally because of a
        newer checkpoint is all that there is as long as that one could not be pushed. It goes with a later call.
        """
        with self._objects.speaking(f"checkpoints that are to go were not all removed from {self.url}"):
            self._lease.check_held()
            top = self._objects.top()
            newest = max(_records(top), key=_order, default=None)
            wanted = self._owed | set(names)
            self._owed = wanted & {newest} if newest is not None else set()
            going = sorted(
                (name for name in wanted - self._owed if name in top or f"{name}{RECORD_SUFFIX}" in top),
                key=_order,
                reverse=True,
            )
            markers = [self._mark({"checkpoint": name}, name) for name in going]
            for item in (*(f"{name}{RECORD_SUFFIX}" for name in going), *going, *markers):
                self._objects.remove(item)

    def set_aside(self, names: Sequence[str], also: Sequence[str] = (), *, aside: str) -> None:
        """Move checkpoints, newest first, and other names into the directory `aside` at the URL; nothing is lost on the way.

        `aside` is the name of the local `aside-<n>/` that this goes with. What the URL does not have is passed over.
        """
        with self._objects.speaking(f"checkpoints were not all moved to {self.url}/{aside}"):
            self._lease.check_held()
            self._set_aside([*(f"{name}{RECORD_SUFFIX}" for name in names), *names, *also], aside)

    def _set_aside(self, wanted: Sequence[str], aside: str) -> None:
        """Copy all, note that it is copied, remove all: the next start can undo the first half, and end the second."""
        top = self._objects.top()
        items = [item for item in dict.fromkeys(wanted) if item in top]
        if aside in top:
            raise CheckpointError(f"{self.url}/{aside} exists and is not written over; move it away")
        if not items:
            return
        told: dict[str, Any] = {"aside": aside, "items": items, "moving": False}
        marker = self._mark(told, aside)
        try:
            sizes = {
                f"{item}/{path}" if path else item: size for item in items for path, size in self._objects.sizes(item).items()
            }
            self._objects.each(lambda path: self._objects.copy(path, f"{aside}/{path}"), sizes)
            if (fault := _size_fault(sizes, self._objects.sizes(aside))) is not None:
                raise OSError(f"{fault}, as the server lists the copy")
            self._lease.check_held()
        except BaseException:
            with suppress(OSError, CheckpointError):
                self._lease.check_held()
                self._objects.remove(aside)
                self._objects.remove(marker)
            raise
        self._objects.write(marker, json.dumps({**told, "moving": True}).encode())
        self._remove_items(items)
        self._objects.remove(marker)

    def _remove_items(self, items: Iterable[str]) -> None:
        for item in items:
            self._objects.remove(item)

    def _mark(self, told: Mapping[str, Any], name: str) -> str:
        """Put a marker; returns its name."""
        marker = f".{name}.{uuid.uuid4().hex}.tmp"
        self._objects.create(marker, json.dumps(told).encode())
        return marker

    @contextmanager
    def _marked(self, told: Mapping[str, Any], undo: Callable[[], None]) -> Iterator[None]:
        """A marker around a block. If the block fails, `undo` runs; if that fails too, the marker stays for the next start."""
        marker = self._mark(told, told["checkpoint"])
        try:
            yield
        except BaseException:
            with suppress(OSError, CheckpointError):
                undo()
                self._objects.remove(marker)
            raise
        with suppress(OSError):  # committed: the next start finds both, and removes the marker
            self._objects.remove(marker)


def _records(top: Mapping[str, int | None]) -> list[str]:
    """The names of the checkpoints whose records are there; larger files are somebody's weights."""
    return [
        name.removesuffix(RECORD_SUFFIX)
        for name, size in top.items()
        if name.endswith(RECORD_SUFFIX) and not name.startswith(".") and size is not None and size <= MAX_RECORD_BYTES
    ]


def _order(name: str) -> tuple[int, str]:
    step = retention.step_of(name)
    return (-1 if step is None else step), name


def _told(marker: bytes) -> dict[str, Any] | None:
    """What a marker of ours says; None for anything else that bears such a name, which is not touched."""
    try:
        told = json.loads(marker)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(told, dict) and (set(told) == {"checkpoint"} or set(told) == {"aside", "items", "moving"})
    return told if ours else None


def _size_fault(expected: Mapping[str, int], found: Mapping[str, int]) -> str | None:
    """The first file that is missing or has another size than expected."""
    for relative, size in expected.items():
        if relative not in found:
            return f"{relative} is missing"
        if found[relative] != size:
            return f"{relative} has {found[relative]} bytes, expected {size}"
    return None


def _fault(directory: Path, digest: str | None) -> str | None:
    """What is wrong with a local checkpoint directory, every digest verified; None if it is as it was saved."""
    try:
        manifest = manifests.read(directory)
        if digest is not None and manifest["digest"] != digest:
            return "the directory is not the one that its record was written for"
        manifests.verified_bytes(directory, manifest)
    except OSError as error:
        return f"{error.filename or directory} cannot be read ({error.strerror})"
    except CheckpointError as error:
        return str(error)
    return None
