"""One run in one URL. The objects below it enter; a held lease leaves, or an error that names who holds it.

`.lease-<n>` says who holds it and is never rewritten; the highest number holds. Taking over a dead holder is creating the next
number, which the server grants to one (S3 and GCS do so in one step), so a holder that was only asleep cannot take it back by
accident, as it could by rewriting a file that both share. `.beat-<token>` is the heartbeat, written by its holder alone.

A holder whose kernel is ours and whose process is gone is dead at once. Any other is dead when its heartbeat is older than the
lapse, by the server's clock: the time of the beat against the time of an object written now, so no host's clock matters.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
import weakref
from contextlib import suppress
from datetime import datetime

from agentlightning.checkpoint.lease import BEATS_PER_LAPSE, Holder, LeaseLostError, _boot_id, _is_running, _pid_space
from agentlightning.checkpoint.remote_objects import Objects, words
from agentlightning.errors import CheckpointError

_LEASE = re.compile(r"\.lease-(\d+)")
_BEAT = ".beat-"
_ATTEMPTS = 5  # to get in where others come and go at the same instant
_ELSEWHERE = "give this one another directory with trainer.default_local_dir=DIR"

log = logging.getLogger(__name__)


class RemoteLease:
    """Holds a URL from construction until `release`. It belongs to the process that took it, not to a fork of that."""

    def __init__(self, objects: Objects, lapse_s: float):
        """Take the lease; CheckpointError within a second if another run holds it."""
        self._objects = objects
        self._lapse_s = lapse_s
        self._token = uuid.uuid4().hex
        self._beats = 0
        self._lost: str | None = None  # the message
        self._pid = os.getpid()
        told = {
            "host": socket.gethostname(),
            "pid": self._pid,
            "boot_id": _boot_id(),
            "pid_space": _pid_space(),
            "token": self._token,
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "started": time.time(),
        }
        self._text = json.dumps(told).encode()
        with objects.speaking(f"the run directory {objects.shown} cannot be used"):
            try:
                self._number = self._take()
            except BaseException:
                with suppress(OSError):
                    objects.remove(f"{_BEAT}{self._token}")
                raise
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_keep_beating,
            args=(weakref.ref(self), self._stop, lapse_s / BEATS_PER_LAPSE),
            name="remote-lease-heartbeat",
            daemon=True,
        )
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether another run was seen to have taken over. Once true, it stays true. Asks nobody."""
        return self._lost is not None

    def check_held(self) -> None:
        """LeaseLostError if the lease is not ours any more; OSError if that cannot be known."""
        if self._lost is None and self._stop.is_set():
            raise LeaseLostError(f"the lease on {self._objects.shown} was released; nothing can be saved after that")
        if self._lost is None:
            number, text = self._newest()
            if number != self._number or text != self._text:
                self._lose(_parse(text))
        if self._lost is not None:
            raise LeaseLostError(self._lost)

    def release(self) -> None:
        """Let the next run in. Does nothing in a forked child, the second time, or where the lease is another's."""
        if os.getpid() != self._pid or self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()  # a beat that came after the removal would lie there for good
        try:
            if self._lost is None and self._newest() == (self._number, self._text):
                self._objects.remove(f".lease-{self._number}")
            self._objects.remove(f"{_BEAT}{self._token}")
        except OSError as error:
            log.warning("the lease on %s could not be removed (%s); it lapses by itself", self._objects.shown, words(error))

    def _take(self) -> int:
        """The number of the lease that is now ours."""
        self._beat()  # before the lease that it speaks for
        for _ in range(_ATTEMPTS):
            number, text = self._newest()
            if number and text is None:
                continue  # released between the listing and the reading
            if number:
                self._refuse_if_alive(number, _parse(text))
            ours = f".lease-{number + 1}"
            try:
                self._objects.create(ours, self._text)
            except FileExistsError:
                continue  # somebody was faster: look at that one
            # Looked at again: a file system that cannot refuse lets two write, and the last one stands.
            newest, text = self._newest()
            if (newest, text) == (number + 1, self._text):
                self._tidy(number + 1)
                return number + 1
            if self._objects.read_if_there(ours) == self._text:
                self._objects.remove(ours)
        raise self._in_use(None, "others take it and give it back all the time")

    def _tidy(self, number: int) -> None:
        """Remove what earlier holders left. A contender whose probe goes with it writes another."""
        for name in self._objects.top():
            match = _LEASE.fullmatch(name)
            if (match is not None and int(match[1]) < number) or (name.startswith(_BEAT) and name != f"{_BEAT}{self._token}"):
                self._objects.remove(name)

    def _newest(self) -> tuple[int, bytes | None]:
        """The highest number and its text; 0 if there is no lease, None if it went while we looked."""
        numbers = [int(match[1]) for match in map(_LEASE.fullmatch, self._objects.top()) if match is not None]
        number = max(numbers, default=0)
        return number, self._objects.read_if_there(f".lease-{number}") if number else None

    def _refuse_if_alive(self, number: int, holder: Holder | None) -> None:
        if holder is not None and _is_running(holder) is False:
            return
        silent = self._silent_for(number, holder)
        if silent is None:
            raise self._in_use(
                holder,
                "the server does not tell how old its heartbeat is; "
                f"if that run is dead, remove {self._objects.shown}/.lease-{number}",
            )
        if silent <= self._lapse_s:
            raise self._in_use(
                holder,
                f"its last heartbeat is {silent:.0f} s old, and it is taken over {self._lapse_s:g} s after its last heartbeat",
            )

    def _silent_for(self, number: int, holder: Holder | None) -> float | None:
        """Seconds since the holder was heard, by the server's clock; None where that is not told."""
        now = self._now()
        heard: list[datetime] = []
        for name in (f".lease-{number}", *([] if holder is None else [f"{_BEAT}{holder.token}"])):
            with suppress(FileNotFoundError):  # released meanwhile, or died before its first beat
                if (time_of := self._objects.modified(name)) is not None:
                    heard.append(time_of)
        return None if now is None or not heard else max(0.0, (now - max(heard)).total_seconds())

    def _now(self) -> datetime | None:
        """The server's time: that of our own beat, written now."""
        for _ in range(_ATTEMPTS):
            self._beat()
            with suppress(FileNotFoundError):  # a run that just got in has tidied up
                return self._objects.modified(f"{_BEAT}{self._token}")
        return None

    def _in_use(self, holder: Holder | None, heartbeat: str) -> CheckpointError:
        return CheckpointError(
            f"the run directory {self._objects.shown} is in use by {'another run' if holder is None else holder} "
            f"({heartbeat}); stop that run, or {_ELSEWHERE}"
        )

    def _beat(self) -> None:
        self._beats += 1
        self._objects.write(f"{_BEAT}{self._token}", json.dumps({"beat": self._beats}).encode())

    def _lose(self, holder: Holder | None) -> None:
        self._lost = (
            f"the run directory {self._objects.shown} was taken over by {'another run' if holder is None else holder}, or its "
            f"lease was removed, while this run (pid {self._pid} on {socket.gethostname()}) was silent; "
            f"this run cannot save there any more: stop one of the two, or {_ELSEWHERE}"
        )
        log.error("%s", self._lost)


def _keep_beating(lease: weakref.ref[RemoteLease], stop: threading.Event, every: float) -> None:
    """Runs in a thread of its own, which must not keep alive a lease that everybody else has forgotten."""
    while not stop.wait(every):
        held = lease()
        if held is None:
            return
        try:
            held.check_held()
            held._beat()
        except LeaseLostError:
            return
        except OSError as error:  # the next one may succeed, and nothing is lost before another run takes over
            log.warning("no heartbeat on %s (%s)", held._objects.shown, words(error))
        del held


def _parse(text: bytes | None) -> Holder | None:
    """Who wrote a lease; None if that cannot be made out."""
    try:
        told = json.loads(text or b"")
        return Holder(
            host=str(told["host"]),
            pid=int(told["pid"]),
            boot_id=str(told["boot_id"]),
            token=str(told["token"]),
            since=str(told["since"]),
            started=float(told["started"]),
            last_beat=0.0,  # the server's to tell
            pid_space=told.get("pid_space"),
        )
    except (ValueError, LookupError, TypeError, OverflowError):
        return None
