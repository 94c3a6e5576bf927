"""Every start of a run and how it ended. Events enter, lines of `<root>/attempts.jsonl`; how often this run fails leaves.

It exists for `save_freq=auto`: how often to save depends on how often the run dies, and only the run's own past tells that.
Nothing else depends on it, so what cannot be read in it is passed over. One process appends, the holder of the run's lock.

Its lines, `at` in seconds since 1970:
    {"event": "start", "attempt": 2, "at": 1700003600.0, "host": "n7", "pid": 41}
    {"event": "restart", "attempt": 2, "at": 1700003900.0}                          a worker died and was rebuilt
    {"event": "end", "attempt": 2, "at": 1700007200.0, "how": "failed", "step": 40}
A killed attempt cannot say so: the next one writes its end, with `how` "killed" and no step.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from agentlightning.checkpoint.files import fsync_directory

HISTORY_FILE = "attempts.jsonl"
Ending: TypeAlias = Literal["finished", "preempted", "failed", "killed"]

_LATEST_TIME = 1e11  # the year 5138; what lies beyond is no time, and NaN is not below it either


@dataclass(frozen=True, slots=True)
class FailureSummary:
    """What a run has seen so far. Example: 2 failures in 4,700 seconds of running."""

    failures: int  # deaths that threw work away: attempts killed or failed, and workers that were rebuilt
    seconds: float  # in which the run was running; the time between its attempts is not in it


@dataclass(slots=True)
class _Attempt:
    number: int
    began: float
    last: float  # its latest line: until then it was alive
    restarts: int = 0
    how: Ending | None = None  # None while it runs, and for ever if nobody could write its end


class RunHistory:
    """The attempts of one run.

    Example: `history = RunHistory(root)`, `history.begin(3, previous_died_at=None)`, then `history.summary()` at any time and
    `history.end("finished", step=40)`. An OSError is of the disk: the run can go on, only the next attempt will know less.
    What could not be written still counts in this process.
    """

    def __init__(self, root: Path, now: Callable[[], float] = time.time):
        """Read what is there. A missing file is an empty history; OSError if it is there and cannot be read."""
        self._path = root / HISTORY_FILE
        self._now = now
        self._attempts: list[_Attempt] = []
        self._present: _Attempt | None = None  # the one that this object began
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            lines = []
        for line in lines:
            self._take(_parsed(line))

    def begin(self, attempt: int, previous_died_at: float | None) -> None:
        """Start attempt `attempt`, and end as killed whatever earlier one has no end.

        `previous_died_at` is when the one before was last known alive, the heartbeat of its lease; None if nobody knows, its
        last line here counts then. A time outside its last line and now (two hosts, two clocks) is moved to the nearer end.
        """
        now = self._now()
        events = []
        for left in [left for left in self._attempts if left.how is None]:
            died_at = left.last
            if previous_died_at is not None and left is self._attempts[-1]:
                died_at = max(left.last, min(previous_died_at, now))
            events.append({"event": "end", "attempt": left.number, "at": died_at, "how": "killed", "step": None})
        events.append({"event": "start", "attempt": attempt, "at": now, "host": socket.gethostname(), "pid": os.getpid()})
        self._add(events)

    def worker_died(self) -> None:
        """Note that a worker died and is being rebuilt in this same attempt. Ignored after `end`, when all workers go."""
        present = self._begun()
        if present.how is None:
            self._add([{"event": "restart", "attempt": present.number, "at": self._now()}])

    def end(self, how: Ending, step: int) -> None:
        """Note how this attempt ended and after which step. Only the first call counts, not an exit handler's later."""
        present = self._begun()
        if present.how is None:
            self._add([{"event": "end", "attempt": present.number, "at": self._now(), "how": how, "step": step}])

    def summary(self, now: float | None = None) -> FailureSummary:
        """Failures and running time up to `now`, by default this moment; the last attempt counts as running if it has no end.

        A preemption is no failure: a save on the signal went before it, so no work was lost and no interval would have helped.
        """
        now = self._now() if now is None else now
        failures, seconds = 0, 0.0
        for attempt in self._attempts:
            running = attempt.how is None and attempt is self._attempts[-1]
            lost = attempt.how in ("killed", "failed", None) and not running
            failures += attempt.restarts + lost
            # A clock that was set back makes an attempt short, never negative.
            seconds += max(0.0, (max(attempt.last, now) if running else attempt.last) - attempt.began)
        return FailureSummary(failures, seconds)

    def _begun(self) -> _Attempt:
        assert self._present is not None, "begin() comes before worker_died() and end()"
        return self._present

    def _add(self, events: list[dict[str, Any]]) -> None:
        # Memory first: with a full disk this process still chooses its interval from all that it saw.
        for event in events:
            self._take(event)
            if event["event"] == "start":
                self._present = self._attempts[-1]
        _append(self._path, "".join(json.dumps(event) + "\n" for event in events).encode())

    def _take(self, event: dict[str, Any]) -> None:
        """Bring the attempts up to date with one line; one that says nothing this version knows changes nothing."""
        kind, number, at = event.get("event"), event.get("attempt"), event.get("at")
        if not isinstance(number, int) or isinstance(number, bool):
            return
        if not isinstance(at, int | float) or isinstance(at, bool) or not 0 <= at < _LATEST_TIME:
            return
        if kind == "start":
            self._attempts.append(_Attempt(number, began=float(at), last=float(at)))
            return
        # The latest of that number without an end: a count that began anew after a lost lease gives one number twice.
        known = next((one for one in reversed(self._attempts) if one.number == number and one.how is None), None)
        if known is None:
            return
        how = event.get("how")
        if kind == "restart":
            known.restarts += 1
        elif kind == "end" and how in get_args(Ending):
            known.how = how
        else:
            return
        known.last = max(known.last, float(at))


def _parsed(line: bytes) -> dict[str, Any]:
    """The object in a line; an empty one for a torn line, which is never a whole object, and for anything else."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def _append(path: Path, data: bytes) -> None:
    """Add whole lines, durable on return. A line that was left torn is closed first, or it would swallow the next."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data
        rest = memoryview(data)
        while len(rest):  # one write, but for a disk that is just filling up: the second then says so
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if not size:
        fsync_directory(path.parent)
