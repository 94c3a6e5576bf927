"""Saves behind the training: jobs enter, one thread runs them in order, what became of them leaves when somebody asks.

At most two are under way, because there are two host buffers: a save waits for an earlier one only if both are in flight.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from agentlightning.checkpoint.store import SavedCheckpoint
from agentlightning.errors import CheckpointError

BUFFERS = 2
_NICENESS = 5  # a step that wants the processor goes first


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a save: exactly one of `saved` and `error`."""

    step: int
    saved: SavedCheckpoint | None = None
    error: CheckpointError | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    step: int
    buffer: int | None
    future: Future[SavedCheckpoint]


class BackgroundWriter:
    """One thread that writes. Jobs raise CheckpointError; anything else is a mistake and comes out of `collect`."""

    def __init__(self) -> None:
        self._jobs: deque[_Job] = deque()
        self._thread = ThreadPoolExecutor(1, "checkpoint-writer", initializer=_step_back)

    def submit(self, step: int, buffer: int | None, job: Callable[[], SavedCheckpoint]) -> Future[SavedCheckpoint]:
        """Run `job` after those before it. `buffer` is the host buffer it reads, which must not change until it is done."""
        future = self._thread.submit(job)
        self._jobs.append(_Job(step, buffer, future))
        return future

    def writes(self, step: int) -> bool:
        """Whether a save of this step is under way, or done and not yet collected."""
        return any(job.step == step for job in self._jobs)

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return any(not job.future.done() for job in self._jobs)

    def free_buffer(self) -> int:
        """A host buffer that nothing is written from; waits for the oldest save if both are in flight."""
        while True:
            pending = {job.buffer: job.future for job in self._jobs if job.buffer is not None and not job.future.done()}
            for buffer in range(BUFFERS):
                if buffer not in pending:
                    return buffer
            wait(pending.values(), return_when=FIRST_COMPLETED)

    def collect(self) -> list[Outcome]:
        """What has ended since the last call, in order."""
        outcomes = []
        while self._jobs and self._jobs[0].future.done():
            job = self._jobs.popleft()
            try:
                outcomes.append(Outcome(job.step, saved=job.future.result()))
            except CheckpointError as error:
                outcomes.append(Outcome(job.step, error=error))
        return outcomes

    def wait(self) -> None:
        """Until nothing is under way."""
        wait([job.future for job in self._jobs])

    def close(self) -> None:
        """Finish what is under way."""
        self._thread.shutdown()


def _step_back() -> None:
    """Linux counts niceness by thread."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
