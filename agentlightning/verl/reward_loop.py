"""Rewards that wait: many calls at once on one event loop, in a thread of its own.

An `async` function of samples goes in; outcomes come out as they are ready. The loop does not run in the main thread, so a
signal finds that thread waiting and not in the middle of a task; the thread is a daemon, so nothing that a call does can keep
the process alive.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from agentlightning.verl.reward_functions import CallError, Outcome, Sample, names_of

_TICK_S = 0.05  # between two looks at whether the run was asked to stop
_GRACE_S = 2.0  # a loop that is this late with its time-outs is blocked
_GOODBYE_S = 2.0

Call = Callable[[Sequence[Sample]], Awaitable[list[Outcome]]]
_Finished = tuple[Sequence[int], list[Outcome] | BaseException]


class EventLoop:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward-loop", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        """Run `work` on the loop; what is returned can be cancelled from this thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    @property
    def is_alive(self) -> bool:
        """False once a call has ended the thread, as `sys.exit` does."""
        return self._thread.is_alive()

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `last()` and stop the loop; one that a call blocks is left behind."""

        async def leave() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.wait([*others, asyncio.create_task(last())], timeout=_GOODBYE_S / 2)
            self._loop.stop()

        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(leave(), self._loop)
            self._thread.join(_GOODBYE_S)
        if not self._thread.is_alive():
            self._loop.close()


async def _nothing() -> None:
    """Nothing has to be closed."""


class ConcurrentCalls:
    """Calls of an `async` function, `num_workers` at a time, of `samples_per_call` samples (None: all of them).

    A call may take `timeout_s` seconds (None: any time), or that for each of its samples with `timeout_per_sample`. It is tried
    again `retries` times, after `backoff_s`, then twice that, and so on. `last` is run on the loop when it closes.
    """

    def __init__(
        self,
        call: Call,
        *,
        samples_per_call: int | None,
        num_workers: int,
        timeout_s: float | None,
        retries: int,
        timeout_per_sample: bool = True,
        backoff_s: float = 0.0,
        last: Callable[[], Coroutine[Any, Any, None]] = _nothing,
    ) -> None:
        self._call, self._samples_per_call, self._num_workers = call, samples_per_call, num_workers
        self._timeout_s, self._retries, self._backoff_s = timeout_s, retries, backoff_s
        self._timeout_per_sample, self._last = timeout_per_sample, last
        self._loop: EventLoop | None = None
        self._beat = 0.0  # when the loop was last seen to turn

    def outcomes(self, samples: Sequence[Sample], check: Callable[[], None]) -> Iterator[tuple[int, Outcome]]:
        """(index, outcome) in the order in which they are ready. `check` is called often; what it raises ends the calls."""
        if not samples:
            return
        size = self._samples_per_call or len(samples)
        parts = [range(at, min(at + size, len(samples))) for at in range(0, len(samples), size)]
        left = dict.fromkeys(range(len(samples)))  # in order
        finished: queue.SimpleQueue[_Finished] = queue.SimpleQueue()
        if self._loop is None:
            self._loop = EventLoop()
        self._beat = time.monotonic()
        work = self._loop.start(self._call_all(samples, parts, finished))
        try:
            while left:
                check()
                for indices, outcomes in self._taken(finished):
                    if isinstance(outcomes, BaseException):
                        raise outcomes
                    for index, outcome in zip(indices, outcomes, strict=True):
                        del left[index]
                        yield index, outcome
                trouble = self._trouble(self._loop)
                if trouble is not None:
                    self._loop = None  # the thread cannot be ended; the next step gets a new one
                    yield from ((i, CallError(f"{trouble} at {samples[i].name} or one beside it")) for i in left)
                    return
        finally:
            work.cancel()

    def close(self) -> None:
        """End the thread."""
        if self._loop is not None:
            self._loop.close(self._last)
            self._loop = None

    @staticmethod
    def _taken(finished: queue.SimpleQueue[_Finished]) -> Iterator[_Finished]:
        """Wait a little, then all that is there."""
        try:
            yield finished.get(timeout=_TICK_S)
            while True:
                yield finished.get_nowait()
        except queue.Empty:
            return

    def _trouble(self, loop: EventLoop) -> str | None:
        """What keeps the calls on the loop from ever being answered."""
        if not loop.is_alive:
            return "ended the thread of the event loop"
        if self._timeout_s is not None and time.monotonic() - self._beat > self._timeout_s + _GRACE_S:
            return f"blocked the event loop for longer than reward.timeout_s={self._timeout_s:g} s, waiting without await,"
        return None

    async def _call_all(
        self, samples: Sequence[Sample], parts: Sequence[Sequence[int]], finished: queue.SimpleQueue[_Finished]
    ) -> None:
        room = asyncio.Semaphore(self._num_workers)

        async def one(indices: Sequence[int]) -> None:
            async with room:
                finished.put((indices, await self._call_with_retries([samples[i] for i in indices])))

        async with asyncio.TaskGroup() as tasks:  # cancelled with this task
            beat = tasks.create_task(self._keep_beating())
            calls = [tasks.create_task(one(indices)) for indices in parts]
            for call in calls:
                call.add_done_callback(lambda task: _report(task, finished))
            await asyncio.wait(calls)
            beat.cancel()

    async def _keep_beating(self) -> None:
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(_TICK_S)

    async def _call_with_retries(self, samples: Sequence[Sample]) -> list[Outcome]:
        for attempt in range(self._retries):
            try:
                return await self._call_in_time(samples)
            except CallError:
                await asyncio.sleep(self._backoff_s * 2**attempt)
        try:
            return await self._call_in_time(samples)
        except CallError as error:
            return [error] * len(samples)

    async def _call_in_time(self, samples: Sequence[Sample]) -> list[Outcome]:
        limit_s = self._timeout_s
        if limit_s is not None and self._timeout_per_sample:
            limit_s *= len(samples)
        try:
            async with asyncio.timeout(limit_s):
                return await self._call(samples)
        except TimeoutError:  # a TimeoutError of the function's own has become a CallError
            raise CallError(f"took longer than {limit_s:g} s (reward.timeout_s) for {names_of(samples)}") from None


def _report(task: asyncio.Task[None], finished: queue.SimpleQueue[_Finished]) -> None:
    """What is no `CallError` ends the scoring in the main thread."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        finished.put(((), error))
