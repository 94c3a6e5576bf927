"""What every call of a client gives at once: a future, for loops with and without asyncio.

A `concurrent.futures.Future` that some thread will fill enters; `.result()`, `await` and `.result_async()` leave. It exists
because the SDK's futures can do both, and because a batch of sampling requests begins when somebody waits for one of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future as ConcurrentFuture
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


def _nothing() -> None:
    """Waiting needs no preparation."""


class Future(Generic[T]):
    """The answer to one call. What went wrong is raised by whichever way the answer is asked for, as it was.

    Giving up waiting (a timeout, a cancelled task) takes nothing back: what was asked for is done, in its place in the order.
    """

    def __init__(self, inner: ConcurrentFuture[T], before_wait: Callable[[], None] = _nothing) -> None:
        """`before_wait` is called whenever somebody begins to wait."""
        self._inner, self._before_wait = inner, before_wait

    def result(self, timeout: float | None = None) -> T:
        """The answer, waited for at most `timeout` seconds; TimeoutError if it is not there by then."""
        self._before_wait()
        return self._inner.result(timeout)

    async def result_async(self, timeout: float | None = None) -> T:
        """The same in an event loop, which goes on meanwhile."""
        if not self._inner.done():
            await asyncio.sleep(0)  # the other tasks that are ready ask for theirs first: one batch
            self._before_wait()
        return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._inner)), timeout)

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    async def coroutine(self) -> T:
        """For what takes a coroutine alone: `asyncio.create_task(future.coroutine())`."""
        return await self

    def done(self) -> bool:
        """Whether the answer, or an error, is there. Who asks is waiting."""
        self._before_wait()
        return self._inner.done()

    def future(self) -> ConcurrentFuture[T]:
        """For `concurrent.futures.wait` and its like. Who asks for it is waiting."""
        self._before_wait()
        return self._inner

    def then(self, convert: Callable[[T], U]) -> Future[U]:
        """Another future, whose answer is `convert` of this one's."""
        converted: ConcurrentFuture[U] = ConcurrentFuture()
        converted.set_running_or_notify_cancel()

        def pass_on(inner: ConcurrentFuture[T]) -> None:
            with ErrorsTo(converted):
                converted.set_result(convert(inner.result()))

        self._inner.add_done_callback(pass_on)
        return Future(converted, self._before_wait)


class ErrorsTo:
    """`with ErrorsTo(future, ...):` what is raised inside belongs to those who wait for these futures, and to nobody here."""

    def __init__(self, *futures: ConcurrentFuture[Any]) -> None:
        self._futures = futures

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> bool:
        if error is None:
            return False
        for future in self._futures:
            if not future.done():
                future.set_exception(error)
        return True


class Ready:
    """A client that is made already, where the SDK has a future of it: `.result()` and `await` give the client itself."""

    def result(self, timeout: float | None = None) -> Any:
        """This client."""
        return self

    async def result_async(self, timeout: float | None = None) -> Any:
        """This client."""
        return self

    def __await__(self) -> Generator[Any, None, Any]:
        return self.result_async().__await__()
