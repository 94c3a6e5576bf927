"""Which work the engine does next. Acknowledged operations enter; they leave one at a time, samples many together.

A model's operations leave strictly by their numbers, and a gap is waited for: the SDK may send the chunks of one
forward_backward in any order. Models take turns, and so do samples and training; of the samples that wait, all go into one
call of the engine, taken from their samplers in turns while there is room.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from agentlightning.tinker.server.records import SAMPLE, Operation

MAX_BATCH = 256  # operations in one call of the engine
_WINDOW_S = 0.003  # a first sample waits so long for others


@dataclass(frozen=True, slots=True)
class Train:
    """One operation of a model."""

    operation: Operation


@dataclass(frozen=True, slots=True)
class Sample:
    """Samples for one call of the engine."""

    operations: list[Operation]


@dataclass(frozen=True, slots=True)
class Chore:
    """Something to be done by the engine's thread."""

    run: Callable[[], object]


@dataclass(slots=True)
class _Line:
    """The operations of one model that wait."""

    waiting: dict[int, Operation] = field(default_factory=dict)
    next_seq: int = 0
    running: bool = False


class WorkQueue:
    """`add` and the like are called by any thread, `next` by the engine's."""

    def __init__(self, max_batch: int = MAX_BATCH) -> None:
        self._max_batch = max_batch
        self._changed = threading.Condition()
        self._lines: dict[str, _Line] = {}
        self._ready: deque[str] = deque()  # models whose next operation is here
        self._samples: dict[str, deque[Operation]] = {}  # by sampler, the one whose turn it is first
        self._chores: deque[Callable[[], object]] = deque()
        self._training_turn = True
        self._closed = False

    def open_line(self, model_id: str, next_seq: int) -> None:
        """A model whose next operation has this number."""
        with self._changed:
            self._lines[model_id] = _Line(next_seq=next_seq)

    def add(self, operation: Operation) -> None:
        """An operation of a model whose line is open, or a sample."""
        with self._changed:
            if operation.kind == SAMPLE:
                self._samples.setdefault(operation.owner_id, deque()).append(operation)
            else:
                self._lines[operation.owner_id].waiting[operation.seq] = operation
                self._queue_if_ready(operation.owner_id)
            self._changed.notify()

    def add_chore(self, run: Callable[[], object]) -> None:
        """Something that is done before the next operation."""
        with self._changed:
            self._chores.append(run)
            self._changed.notify()

    def _queue_if_ready(self, model_id: str) -> None:
        line = self._lines[model_id]
        if not line.running and line.next_seq in line.waiting and model_id not in self._ready:
            self._ready.append(model_id)

    def next(self, timeout: float) -> Train | Sample | Chore | None:
        """What to do now; None if there was nothing for `timeout` seconds, or all is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._chores or self._ready or self._samples or self._closed, timeout)
            if self._chores:
                return Chore(self._chores.popleft())
            if self._closed:
                return None
            if self._ready and (self._training_turn or not self._samples):
                self._training_turn = False
                return Train(self._take_training())
            if not self._samples:
                return None
            if not self._ready and self._max_batch > 1:
                self._changed.wait_for(lambda: self._ready or self._closed, _WINDOW_S)
            self._training_turn = True
            return Sample(self._take_samples())

    def _take_training(self) -> Operation:
        line = self._lines[self._ready.popleft()]
        line.running = True
        return line.waiting.pop(line.next_seq)

    def _take_samples(self) -> list[Operation]:
        taken: list[Operation] = []
        while self._samples and len(taken) < self._max_batch:
            sampler_id, waiting = next(iter(self._samples.items()))
            del self._samples[sampler_id]
            taken.append(waiting.popleft())
            if waiting:
                self._samples[sampler_id] = waiting  # behind the others
        return taken

    def follow(self, model_id: str) -> Operation | None:
        """The optim_step that waits behind what is over: out of turn, for it is short, and its sender waits for both."""
        with self._changed:
            line = self._lines[model_id]
            if self._closed or line.running or line.next_seq not in line.waiting:
                return None
            if line.waiting[line.next_seq].kind != "optim_step":
                return None
            self._ready.remove(model_id)
            line.running = True
            return line.waiting.pop(line.next_seq)

    def retreat(self, model_id: str) -> None:
        """The operation that ran is void; the client sends its number again."""
        with self._changed:
            self._lines[model_id].running = False
            self._queue_if_ready(model_id)

    def take_back(self, operation: Operation) -> None:
        """Take an operation out that could not be made durable, unless it runs."""
        if operation.kind == SAMPLE:
            self.take_sample(operation)
            return
        with self._changed:
            line = self._lines[operation.owner_id]
            if operation.seq not in line.waiting or line.waiting[operation.seq] is not operation:
                return
            del line.waiting[operation.seq]
            if operation.seq == line.next_seq and operation.owner_id in self._ready:
                self._ready.remove(operation.owner_id)

    def advance(self, model_id: str) -> None:
        """The operation that ran is over."""
        with self._changed:
            line = self._lines[model_id]
            line.running = False
            line.next_seq += 1
            self._queue_if_ready(model_id)

    def cut(self, model_id: str) -> list[Operation]:
        """Take out what waits behind a gap that nobody will fill."""
        with self._changed:
            line = self._lines[model_id]
            if line.running or line.next_seq in line.waiting:
                return []
            cut = [operation for _, operation in sorted(line.waiting.items())]
            line.waiting.clear()
            return cut

    def next_seq(self, model_id: str) -> int:
        """The number of the operation that runs or will run next."""
        with self._changed:
            return self._lines[model_id].next_seq

    def is_empty(self, model_id: str) -> bool:
        """Whether none of a model's operations waits or runs."""
        with self._changed:
            return not self._lines[model_id].running and not self._lines[model_id].waiting

    def take_sample(self, operation: Operation) -> bool:
        """Take a sample out again; False if it has left already."""
        with self._changed:
            if operation.owner_id not in self._samples or operation not in self._samples[operation.owner_id]:
                return False
            self._samples[operation.owner_id].remove(operation)
            if not self._samples[operation.owner_id]:
                del self._samples[operation.owner_id]
            return True

    def missing(self, operation: Operation) -> int | None:
        """The number that an operation waits for, if the client has not sent it."""
        with self._changed:
            if operation.owner_id not in self._lines:
                return None
            line = self._lines[operation.owner_id]
            gap = not line.running and line.next_seq not in line.waiting and operation.seq in line.waiting
            return line.next_seq if gap else None

    def lengths(self) -> tuple[int, int]:
        """How many training operations and samples wait."""
        with self._changed:
            return sum(len(line.waiting) for line in self._lines.values()), sum(map(len, self._samples.values()))

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """`next` gives chores alone from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify()
