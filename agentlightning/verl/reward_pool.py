"""Processes that call a reward function, killed and replaced where a call takes too long.

Samples go in; outcomes come out as they are ready. A thread that hangs cannot be ended in Python, a process can: this is how
`reward.timeout_s` is kept for functions that are not `async`. Each process leads a session of its own, so that what the
function started is killed with it, and a signal to the trainer's group does not reach it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentlightning.errors import RewardError
from agentlightning.verl.reward_functions import Answer, CallError, Outcome, Sample, as_json, names_of

_TICK_S = 0.05  # between two looks at whether the run was asked to stop
_START_S = 120.0  # a worker imports the user's module, which may import anything


@dataclass(slots=True)
class _Job:
    """The samples of one call, by their index."""

    indices: Sequence[int]
    samples: Sequence[Sample]
    tries: int = 0


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    deadline: float  # of its present call, or of its start
    ready: bool = False
    job: _Job | None = None
    received: bytearray = field(default_factory=bytearray)

    def send(self, message: bytes) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: the end of its output says so
            self.process.stdin.write(message + b"\n")
            self.process.stdin.flush()

    def receive(self) -> Any | None:
        """The message that has arrived, None if it is not whole yet. Raises EOFError if the process has ended."""
        assert self.process.stdout is not None
        chunk = os.read(self.process.stdout.fileno(), 1 << 16)
        if not chunk:
            raise EOFError
        self.received += chunk
        if not self.received.endswith(b"\n"):
            return None
        message = json.loads(self.received)
        self.received.clear()
        return message

    def kill(self, grace_s: float = 0.0) -> int:
        """End it and what it started; its exit status, its own if it ends by itself within `grace_s`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        return self.process.wait()


class WorkerPool:
    """At most `num_workers` processes, kept from one step to the next.

    `batch` makes one call of all samples instead of one call a sample; it may take `timeout_s` for each of them.
    """

    def __init__(
        self, path: str | None, name: str, key: str, *, batch: bool, num_workers: int, timeout_s: float, retries: int
    ) -> None:
        self._what = {"path": path, "name": name, "key": key}
        self._batch, self._timeout_s, self._retries = batch, timeout_s, retries
        self._size = 1 if batch else num_workers
        self._workers: list[_Worker] = []
        self._start_missing(self._size)

    def outcomes(self, samples: Sequence[Sample], check: Callable[[], None]) -> Iterator[tuple[int, Outcome]]:
        """(index, outcome) in the order in which they are ready. `check` is called often; what it raises ends the calls."""
        every = range(len(samples))
        waiting = deque(
            _Job(part, [samples[i] for i in part]) for part in ([every] if self._batch else [[i] for i in every]) if len(part)
        )
        left = len(waiting)
        try:
            while left:
                check()
                self._start_missing(min(self._size, left))
                self._hand_out(waiting)
                for job, outcomes in self._finished_calls():
                    if isinstance(outcomes, CallError) and job.tries <= self._retries:
                        waiting.append(job)
                        continue
                    left -= 1
                    whole = [outcomes] * len(job.indices) if isinstance(outcomes, CallError) else outcomes
                    yield from zip(job.indices, whole, strict=True)
        except BaseException:  # also GeneratorExit: nobody waits for the rest, and a call cannot be taken back
            self._kill([worker for worker in self._workers if worker.job is not None])
            raise

    def close(self) -> None:
        """End the processes. They are started again if they are needed."""
        self._kill(list(self._workers))

    def _kill(self, workers: Sequence[_Worker]) -> None:
        for worker in workers:
            self._workers.remove(worker)
            worker.kill()

    def _start_missing(self, count: int) -> None:
        self._kill([w for w in self._workers if w.ready and w.job is None and w.process.poll() is not None])
        start = f"import sys; sys.path[:] = {sys.path!r}; from agentlightning.verl.reward_worker import main; main()"
        while len(self._workers) < count:
            process = subprocess.Popen(
                [sys.executable, "-c", start],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                # One computation a process: threads of their own would only fight for the cores.
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )
            worker = _Worker(process, deadline=time.monotonic() + _START_S)
            self._workers.append(worker)
            worker.send(json.dumps(self._what).encode())

    def _hand_out(self, waiting: deque[_Job]) -> None:
        for worker in self._workers:
            if waiting and worker.ready and worker.job is None:
                job = waiting.popleft()
                message = as_json(job.samples, [[sample.name, sample.arguments] for sample in job.samples])
                worker.job, job.tries = job, job.tries + 1
                worker.deadline = time.monotonic() + self._timeout_s * len(job.samples)
                worker.send(message)

    def _finished_calls(self) -> Iterator[tuple[_Job, list[Outcome] | CallError]]:
        """Wait a little; the calls that were answered, took too long, or died with their process."""
        busy = [worker for worker in self._workers if worker.job is not None or not worker.ready]
        wait_s = min([_TICK_S, *(worker.deadline - time.monotonic() for worker in busy)])
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            readable = [key.data for key, _ in selector.select(max(wait_s, 0.0))]
        for worker in busy:
            finished = self._look_at(worker, worker in readable)
            if finished is not None:
                yield finished

    def _look_at(self, worker: _Worker, readable: bool) -> tuple[_Job, list[Outcome] | CallError] | None:
        job = worker.job
        try:
            message = worker.receive() if readable else None
        except EOFError:
            self._workers.remove(worker)
            status = worker.kill(_TICK_S)  # its output ends a moment before it does
            if job is None:
                raise RewardError(
                    f"could not be loaded in a process of its own (exit status {status}, see above); "
                    "mend it with reward.timeout_s=null, which calls it in this process"
                ) from None
            return job, CallError(f"ended its process (exit status {status}) for {names_of(job.samples)}")
        if message is None:
            return self._overdue(worker) if time.monotonic() >= worker.deadline else None
        if job is None:
            worker.ready = True
            return None
        worker.job = None
        if "failed" in message:
            return job, CallError(message["failed"])
        return job, [RewardError(item) if isinstance(item, str) else Answer(*item) for item in message["outcomes"]]

    def _overdue(self, worker: _Worker) -> tuple[_Job, CallError]:
        self._kill([worker])
        if worker.job is None:
            raise RewardError(
                f"took longer than {_START_S:.0f} s to import; mend it with reward.timeout_s=null, which calls it in "
                "this process"
            )
        samples = worker.job.samples
        limit_s = self._timeout_s * len(samples)
        return worker.job, CallError(f"took longer than {limit_s:g} s (reward.timeout_s) for {names_of(samples)}")
