"""The one thread that an engine is called by. Calls enter in the order of the loop, futures leave, filled in that order.

Sampling requests are the exception: a sampler never changes, so those that wait are sampled together. A batch begins when
somebody waits for one of its answers, when another call is made, or when nobody has asked for more for a second; so what a loop
asks for before it waits is one batch, whatever the speed of the machine, and its result the same to the last bit.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future as ConcurrentFuture
from dataclasses import dataclass
from typing import Any, TypeVar

from agentlightning.errors import AgentLightningError, UserError
from agentlightning.tinker.engine_api import LoraEngine, SampleRequest
from agentlightning.tinker.futures import ErrorsTo, Future
from agentlightning.tinker.types import SampleResponse

T = TypeVar("T")
_QUIET_S = 1.0  # nobody waits, and nobody has asked for another sample for as long: begin
_LEAVING_S = 5.0  # what the end of the process waits for the call that runs


class ClosedError(AgentLightningError):
    """The service client was closed before this was done."""


@dataclass(frozen=True, slots=True)
class _Call:
    run: Callable[[LoraEngine], Any]
    future: ConcurrentFuture[Any]


@dataclass(frozen=True, slots=True)
class _Sample:
    request: SampleRequest
    owner: object  # kept until the answer is there, and with it its sampler
    future: ConcurrentFuture[SampleResponse]


class EngineThread:
    """Opens the engine at the first call, and calls it."""

    def __init__(self, open_engine: Callable[[], LoraEngine]) -> None:
        self._open_engine = open_engine
        self._engine: LoraEngine | None = None
        self._changed = threading.Condition()
        self._calls: deque[_Call] = deque()
        self._samples: list[_Sample] = []
        self._samples_wanted = False
        self._dropped: deque[str] = deque()  # samplers that nobody holds any longer
        self._closing = False
        self._thread: threading.Thread | None = None

    def submit(self, run: Callable[[LoraEngine], T]) -> Future[T]:
        """`run(engine)` behind everything that was asked for before."""
        future: ConcurrentFuture[T] = ConcurrentFuture()
        with self._changed:
            self._check_open()
            self._samples_wanted = True
            self._calls.append(_Call(run, future))
            self._wake()
        return Future(future, self._sample_now)

    def sample(self, request: SampleRequest, owner: object) -> Future[SampleResponse]:
        """One request of the next batch. `owner` is kept alive until its answer is there."""
        future: ConcurrentFuture[SampleResponse] = ConcurrentFuture()
        with self._changed:
            self._check_open()
            self._samples.append(_Sample(request, owner, future))
            self._wake()
        return Future(future, self._sample_now)

    def drop_sampler(self, sampler_id: str) -> None:
        """Forget a sampler before the next call. Takes no lock, because the garbage collector calls it, anywhere."""
        self._dropped.append(sampler_id)

    def close(self, finish: bool = True) -> Future[None]:
        """End it: after all that was asked for, or (not `finish`) after the call that runs; the others get a ClosedError."""
        ended: ConcurrentFuture[None] = ConcurrentFuture()
        with self._changed:
            if not finish:
                self._refuse_waiting()
            if self._thread is None or self._closing:
                self._closing = True
                ended.set_result(None)
                return Future(ended)
            self._closing = True
            self._calls.append(_Call(self._end, ended))
            self._changed.notify_all()
        return Future(ended)

    def _check_open(self) -> None:
        if self._closing:
            raise ClosedError("the ServiceClient is closed; make another one: ServiceClient(...)")

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lora-engine", daemon=True)
            self._thread.start()
            atexit.register(self._leave)
        self._changed.notify_all()

    def _leave(self) -> None:
        """At the end of the process: nothing new begins, and what runs gets a moment."""
        self.close(finish=False)
        assert self._thread is not None
        self._thread.join(_LEAVING_S)

    def _refuse_waiting(self) -> None:
        for waiting in (*self._calls, *self._samples):
            if waiting.future.set_running_or_notify_cancel():
                waiting.future.set_exception(ClosedError("the ServiceClient was closed before this was done"))
        self._calls.clear()
        self._samples.clear()

    def _sample_now(self) -> None:
        with self._changed:
            if self._samples:
                self._samples_wanted = True
                self._changed.notify_all()

    def _run(self) -> None:
        ended = False
        while not ended:
            samples, call = self._next()
            if samples:
                self._answer(samples)
            if call is not None and call.future.set_running_or_notify_cancel():
                ended = call.run == self._end
                with ErrorsTo(call.future):
                    call.future.set_result(call.run(self._opened()) if not ended else self._end())
            del samples, call  # with them go their owners, while this thread waits
        atexit.unregister(self._leave)

    def _next(self) -> tuple[list[_Sample], _Call | None]:
        """All samples that wait, and the oldest other call."""
        with self._changed:
            while not self._calls and not (self._samples and self._samples_wanted):
                seen = len(self._samples)
                self._changed.wait(_QUIET_S if seen else None)
                if seen and seen == len(self._samples):
                    self._samples_wanted = True
            samples = [sample for sample in self._samples if sample.future.set_running_or_notify_cancel()]
            self._samples = []
            self._samples_wanted = False
            return samples, self._calls.popleft() if self._calls else None

    def _answer(self, samples: list[_Sample]) -> None:
        """A request that the engine refuses must not fail the others: then each is sampled alone."""
        with ErrorsTo(*(sample.future for sample in samples)):
            try:
                responses = self._opened().sample([sample.request for sample in samples])
            except UserError:
                if len(samples) == 1:
                    raise
                for sample in samples:
                    self._answer([sample])
                return
            for sample, response in zip(samples, responses, strict=True):
                sample.future.set_result(response)

    def _opened(self) -> LoraEngine:
        """The engine, without the samplers that nobody holds. If it cannot be opened, the next call tries again."""
        if self._engine is None:
            self._engine = self._open_engine()
        while self._dropped:
            self._engine.drop_sampler(self._dropped.popleft())
        return self._engine

    def _end(self, engine: LoraEngine | None = None) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
