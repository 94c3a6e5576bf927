"""One run in one directory, on one host or on several that share it. A directory enters; a held lease leaves, or an error that
names who holds it.

`<root>/.lease` says who holds it (host, pid, since when). The holder keeps it locked (`flock`) and touches it every few
seconds, so that its time is the heartbeat. Three rules decide about a lease that is found:

1. The kernel that would know about its holder is ours (same boot, same mounted file system): the lock alone decides. The kernel
   drops it when the holder dies, however it dies, so a dead one is taken over at once.
2. Any other: locks may or may not reach across. A lock that is refused is held; one that is granted proves nothing, and the
   heartbeat decides, unless the holder's process would be seen from here and is gone.
3. A file system without locks: as 2 with a lock that was granted.

Whoever writes its token last holds the lease. A holder looks for its own before each commit, so one that slept through its
lapse finds out before it harms the next. What is left is a holder that is stopped within `committing`, between that look and
the end of the block: rules 2 and 3 cannot see it, so the block is to be kept short.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from agentlightning.checkpoint.files import temporary
from agentlightning.errors import CheckpointError

LEASE_FILE = ".lease"
LAPSE_SECONDS = 60.0  # without a heartbeat for so long, a holder on another host counts as dead
WAIT_SECONDS = 0.5  # a run that was just killed may take this long to be gone
BEATS_PER_LAPSE = 6
_POLL_SECONDS = 0.02
_SETTLE_SECONDS = 0.1  # two that write their token at the same time are told apart after this long
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_ELSEWHERE = "give this one another directory with trainer.default_local_dir=DIR"

log = logging.getLogger(__name__)


class LeaseLostError(CheckpointError):
    """Another run has taken over the directory: this one can save nothing there any more, now or later."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease, or held it. Example: `str(holder)` is "pid 4242 on node7 since 2025-01-31T12:00:00+01:00".

    `started` is by the clock of its host, `last_beat` by that of the file system; both are seconds since the epoch.
    """

    host: str
    pid: int
    boot_id: str
    token: str
    since: str
    started: float
    last_beat: float
    device: int | None = None  # of the mounted file system, as the holder's kernel numbers it; None: not told
    pid_space: str | None = None  # within which its pid means something; None: not told

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}"


@dataclass(frozen=True, slots=True)
class _Found:
    """A lease file as it was read. `holder` is None if no holder can be made out in it."""

    identity: tuple[int, int]
    holder: Holder | None
    released: bool
    beat: float

    @property
    def shares_our_locks(self) -> bool:
        """Whether a lock of that holder would be refused to us, so that one that is granted means that it is dead.

        Containers of one host share its kernel, but where each has mounted the file system for itself (a bucket, say), the
        kernel sees two file systems and keeps the locks apart.
        """
        holder = self.holder
        return holder is not None and holder.boot_id == _boot_id() and holder.device in (None, self.identity[0])


class Lease:
    """Holds a run directory from construction until `release`, the end of a `with`, or the death of the process.

    It belongs to the process that took it: a forked child shares neither the lock nor the heartbeat, and cannot release it.

    Example: `with Lease(root) as lease:`, and around what makes a checkpoint count, `with lease.committing():`.
    """

    previous: Holder | None  # the dead run that this one took over; None if the last one released it, or there was none

    def __init__(
        self,
        root: Path,
        *,
        lapse_s: float = LAPSE_SECONDS,
        wait_seconds: float = WAIT_SECONDS,
        beat_s: float | None = None,
    ):
        """Make the directory if need be and take it; CheckpointError within a second if another run holds it.

        `lapse_s` is how long a holder on another host may be silent, `beat_s` (a sixth of it) how often this one is heard.
        """
        self._root = root
        self._path = root / LEASE_FILE
        self._lapse_s = lapse_s
        self._pid = os.getpid()
        self._lost: str | None = None  # the message
        self._guard = threading.RLock()  # around each look at the file and what follows from it; never held for long
        self._commit = threading.RLock()  # held for a whole commit, so that `release` waits for its end
        self._told: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": self._pid,
            "boot_id": _boot_id(),
            "token": uuid.uuid4().hex,
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "started": time.time(),
            "pid_space": _pid_space(),
        }
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._file, self.previous = self._take(wait_seconds)
        except OSError as error:
            raise CheckpointError(
                f"the run directory {root} cannot be written ({error.strerror}); "
                "give another with trainer.default_local_dir=DIR"
            ) from error
        self._stop = threading.Event()
        every = lapse_s / BEATS_PER_LAPSE if beat_s is None else beat_s
        threading.Thread(
            target=_keep_beating, args=(weakref.ref(self), self._stop, every), name="lease-heartbeat", daemon=True
        ).start()

    @property
    def lost(self) -> bool:
        """Whether another run was seen to have taken over. Once true, it stays true."""
        return self._lost is not None

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Around the steps that make a checkpoint count: LeaseLostError, before any of them, if the lease is not ours any more.

        A directory or lease file that somebody removed is made again. OSError if the file cannot be read or made: then it
        is not known whose the directory is.
        """
        if os.getpid() != self._pid:
            raise CheckpointError(f"the lease on {self._root} belongs to process {self._pid}; save there, not in a fork of it")
        with self._commit:
            with self._guard:
                self._confirm()
            yield

    def release(self) -> None:
        """Let the next run in, after a commit that is under way. The file stays: removing it would let two runs lock two files
        of one name. Does nothing in a forked child, or the second time."""
        if os.getpid() != self._pid:
            return
        self._stop.set()
        with self._commit, self._guard:
            if self._file.closed:
                return
            # A directory that is gone or cannot be written has nobody to tell; the next run goes by the lock, or waits.
            with self._file, suppress(OSError):
                found = _look(self._path)
                if found is not None and self._is_ours(found) and found.identity == _identity(self._file) and not self.lost:
                    self._write(self._file, released=True)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def _take(self, wait_seconds: float) -> tuple[io.FileIO, Holder | None]:
        """The lease file, locked and with our token in it, and the dead run that it was taken from."""
        started = time.monotonic()
        while True:
            file, created = _open(self._path)
            try:
                locked = _lock(file)
                found = _read(file.fileno())
                if self._is_worth_waiting(found, created, locked, time.monotonic() - started, wait_seconds):
                    file.close()
                    time.sleep(_POLL_SECONDS)
                    continue
                self._refuse_if_held(found, created, locked)
                self._write(file)
                if not created and not (locked and found.shares_our_locks):
                    self._settle()
            except BaseException:
                file.close()
                raise
            if locked is None:
                log.warning(
                    "the file system of %s has no locks: another host can take over a dead run %g s after its last heartbeat, "
                    "and two runs that start at the same instant may both be let in until one of them saves",
                    self._path,
                    self._lapse_s,
                )
            return file, None if found.released else found.holder

    def _is_worth_waiting(self, found: _Found, created: bool, locked: bool | None, waited: float, at_most: float) -> bool:
        """Whether what stands in the way may be gone in a moment."""
        current = _look(self._path)
        if current is None or current.identity != found.identity:
            return waited < max(at_most, _SETTLE_SECONDS)  # removed between our opening and our locking it: look again
        if locked is False:
            return waited < at_most
        if found.holder is None:  # caught between its making the file and its text
            return not created and waited < _SETTLE_SECONDS
        return locked is None and not found.released and _is_running(found.holder) is True and waited < at_most

    def _refuse_if_held(self, found: _Found, created: bool, locked: bool | None) -> None:
        """CheckpointError if the holder lives, or may live for all that can be told from here."""
        holder = None if found.released else found.holder  # who has locked a released one has yet to write its text
        if locked is False and (holder is None or found.shares_our_locks):
            raise self._in_use(holder)
        if locked is not False:
            if created or found.released or (locked and (holder is None or found.shares_our_locks)):
                return  # a text that is torn and not locked was written by somebody who died over it
            if holder is not None and _is_running(holder) is False:
                return
        silent = self._silent_for(found)
        if locked is False and silent > self._lapse_s:
            raise self._in_use(
                holder,
                f"its last heartbeat is {silent:.0f} s old, but the file system still keeps its lock; "
                f"if that host is gone for good, remove {self._path}",
            )
        if silent <= self._lapse_s:
            raise self._in_use(
                holder,
                f"its last heartbeat is {silent:.0f} s old, and it is taken over {self._lapse_s:g} s after its last heartbeat",
            )

    def _in_use(self, holder: Holder | None, heartbeat: str = "") -> CheckpointError:
        return CheckpointError(
            f"the run directory {self._root} is in use by {holder or 'another run'}"
            f"{f' ({heartbeat})' if heartbeat else ''}; stop that run, or {_ELSEWHERE}"
        )

    def _silent_for(self, found: _Found) -> float:
        """Seconds since the heartbeat. Both times come from the file system, so no host's clock matters.

        A heartbeat in the future (the file server's clock was set back) is as old as it is ahead: a holder that lives would
        have put it right by now.
        """
        probe = temporary(self._root, "lease")  # the name of a leftover, should we die before it is gone
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.utime(descriptor)  # as the heartbeat does it
            return abs(os.fstat(descriptor).st_mtime - found.beat)
        finally:
            os.close(descriptor)
            with suppress(FileNotFoundError):  # a run that just started has tidied up
                os.unlink(probe)

    def _settle(self) -> None:
        """CheckpointError if somebody else wrote its token at the same time as we did, and after us."""
        time.sleep(_SETTLE_SECONDS)
        found = _look(self._path)
        if found is not None and self._is_anothers(found):
            raise self._in_use(found.holder)

    def _confirm(self) -> None:
        """The lease file is there and ours on return, made again if it was not there; LeaseLostError if it is another's."""
        if self._lost is None and self._file.closed:
            raise LeaseLostError(f"the lease on {self._root} was released; nothing can be saved after that")
        deadline = time.monotonic() + WAIT_SECONDS
        while self._lost is None:
            found = _look(self._path)
            if found is not None and self._is_anothers(found):
                self._lose(found.holder)
            elif found is not None and found.identity == _identity(self._file):
                if not self._is_ours(found):  # somebody emptied it
                    self._write(self._file)
                return
            elif self._take_again():  # it was removed, or is a copy that was put in its place
                return
            elif time.monotonic() >= deadline:
                self._lose(None)
            else:
                time.sleep(_POLL_SECONDS)  # who has locked it writes its token in a moment, or was only looking
        raise LeaseLostError(self._lost)

    def _take_again(self) -> bool:
        """Lock the file that is at our path now, or make it, unless another has it; whether that worked."""
        self._root.mkdir(parents=True, exist_ok=True)
        file, _ = _open(self._path)
        try:
            if _lock(file) is False or self._is_anothers(_read(file.fileno())):
                file.close()
                return False
            self._write(file)
        except BaseException:
            file.close()
            raise
        log.warning("%s had been removed or replaced under this run; it is there again", self._path)
        self._file.close()
        self._file = file
        return True

    def _beat(self) -> None:
        """One heartbeat, unless the file is not there or not ours: another's must not look alive because of us."""
        with self._guard:
            if self._file.closed:
                return
            try:
                found = _look(self._path)
                if found is None:
                    return  # the next commit makes it again; a directory that is being removed is not ours to hold up
                if self._is_anothers(found):
                    self._lose(found.holder)
                elif self._is_ours(found):
                    os.utime(self._path)  # the path, since a copy of the file may have been put in its place
            except OSError as error:  # the next one may succeed, and nothing is lost before another run takes over
                log.warning("no heartbeat on %s (%s)", self._path, error.strerror)

    def _lose(self, holder: Holder | None) -> None:
        if self._lost is None:
            self._lost = (
                f"the run directory {self._root} was taken over by {holder or 'another run'} while this one "
                f"(pid {self._pid} on {self._told['host']} since {self._told['since']}) was silent, and this one can save "
                f"nothing there any more; start again when that run has ended, or {_ELSEWHERE}"
            )
            self._stop.set()
            log.error("%s", self._lost)

    def _is_ours(self, found: _Found) -> bool:
        return found.holder is not None and found.holder.token == self._told["token"]

    def _is_anothers(self, found: _Found) -> bool:
        return found.holder is not None and found.holder.token != self._told["token"]

    def _write(self, file: io.FileIO, released: bool = False) -> None:
        """Put our text into the file. A reader sees the old line or the new one: what follows the first line does not count."""
        told = {**self._told, "device": os.fstat(file.fileno()).st_dev}
        data = json.dumps({**told, "released": True} if released else told).encode() + b"\n"
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        rest = memoryview(data)
        while len(rest):
            rest = rest[os.write(file.fileno(), rest) :]
        os.ftruncate(file.fileno(), len(data))
        if not released:  # then it is closed at once, which does the same for other hosts
            os.fsync(file.fileno())


def _keep_beating(lease: weakref.ref[Lease], stop: threading.Event, every: float) -> None:
    """Runs in a thread of its own, which must not keep alive a lease that everybody else has forgotten."""
    while not stop.wait(every):
        held = lease()
        if held is None:
            return
        held._beat()
        del held


_OPEN: weakref.WeakSet[io.FileIO] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """Forked children share a lock for as long as they have the file open: one that outlives its parent would hold on to it."""
    for file in list(_OPEN):
        with suppress(OSError):
            file.close()


os.register_at_fork(after_in_child=_let_go_in_child)


def _open(path: Path) -> tuple[io.FileIO, bool]:
    """The lease file for reading and writing, and whether it was made just now."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        descriptor, created = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        descriptor, created = os.open(path, flags), False
    file = io.FileIO(descriptor, "r+")
    _OPEN.add(file)
    return file, created


def _lock(file: io.FileIO) -> bool | None:
    """Whether the lock was granted; None if the file system has none."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None
    return True


def _look(path: Path) -> _Found | None:
    """The lease as it is now, None if it is not there. Opened anew: only then a client of a file server asks the server."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return _read(descriptor)
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> _Found:
    status = os.fstat(descriptor)
    identity = (status.st_dev, status.st_ino)
    try:
        told = json.loads(os.pread(descriptor, 4096, 0).partition(b"\n")[0])
        pid = int(told["pid"])
        if not 0 < pid < 2**31:
            raise ValueError(f"{pid} is no process id")
        holder = Holder(
            host=str(told["host"]),
            pid=pid,
            boot_id=str(told["boot_id"]),
            token=str(told["token"]),
            since=str(told["since"]),
            started=float(told["started"]),
            last_beat=status.st_mtime,
            device=told.get("device"),
            pid_space=told.get("pid_space"),
        )
    except (ValueError, LookupError, TypeError, OverflowError):  # no text yet, or a torn one
        return _Found(identity, None, False, status.st_mtime)
    return _Found(identity, holder, bool(told.get("released")), status.st_mtime)


def _identity(file: io.FileIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return (status.st_dev, status.st_ino)


def _boot_id() -> str:
    """What tells this running kernel from every other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _pid_space() -> str | None:
    """What tells the process ids of this container from those of another on the same kernel."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _is_running(holder: Holder) -> bool | None:
    """Whether a process with its id runs; None if that cannot be known from here."""
    if holder.boot_id != _boot_id() or holder.pid_space not in (None, _pid_space()):
        return None
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as somebody else
        return True
    return True
