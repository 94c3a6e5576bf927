"""When a run must leave: signals and deadlines enter, a flag leaves that every phase of a step looks at.

A handler that raised would tear a save or a library's call apart; a flag is seen where it can be acted upon. The second signal
leaves at once, for whoever has no patience.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command again goes on
_ONE_S = 1.0
_LEAVING_S = 1.0  # beside the save itself: the last line, and giving the directory back


class Preempted(BaseException):
    """The run was asked to leave; the text says by whom."""


class Preemption:
    """Whether this run has been asked to leave.

    Example: `stop = Preemption(max_run_seconds=3600)`, `stop.install()` (after `ray.init`, which sets a handler of its own),
    and `stop.check()` wherever the run waits or counts.
    """

    def __init__(
        self,
        max_run_seconds: float | None = None,
        must_save_by: float | None = None,
        began: float | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`max_run_seconds` counts from `began`, or else from here. It and `must_save_by` are in seconds since the epoch."""
        self._now = now
        start = now() if began is None else began
        limits = [("trainer.max_run_seconds", start + max_run_seconds if max_run_seconds is not None else None)]
        limits.append(("trainer.must_save_by", must_save_by))
        self._deadlines = [(at, name) for name, at in limits if at is not None]
        self._reason: str | None = None
        self._first_at: float | None = None  # of the first signal
        self._save_s = 0.0
        self._deferred = False
        self._interrupting = False

    def install(self) -> None:
        """Take the signals over. Only the main thread can; to be called again after anything that sets handlers of its own."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def expect_save(self, seconds: float) -> None:
        """A save has taken this long: a deadline is met by leaving that much earlier, and as much again to be safe."""
        self._save_s = max(self._save_s, seconds)

    def request(self, reason: str) -> None:
        """Ask the run to leave; from any thread."""
        if self._reason is None:
            self._reason = reason

    @property
    def reason(self) -> str | None:
        """Who asked the run to leave, None if nobody has."""
        if self._reason is None and self._deadlines:
            at, name = min(self._deadlines)
            if self._now() >= at - _LEAVING_S - 2 * self._save_s:
                self._reason = name
        return self._reason

    def check(self) -> None:
        """Raise `Preempted` if the run has been asked to leave."""
        reason = self.reason
        if reason is not None and not self._deferred:
            raise Preempted(reason)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """What must be done whole, and is short: `check` lets it pass."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """While the main thread runs code of the user's, which looks at no flag: a signal raises `Preempted` right there."""
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
        elif now - self._first_at > _ONE_S:  # not one request that arrived twice, by the group and by whoever started us
            sys.stderr.write("a second signal: leaving at once; what is durable stays\n")
            sys.stderr.flush()
            os._exit(128 + number)
        self.request(signal.Signals(number).name)
        if self._interrupting:
            self.check()
