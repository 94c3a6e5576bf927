"""How much of a run's time is useful when workers are preempted: virtual time, the real checkpoint manager.

Costs of a step and a save, a trace of failures and a save interval enter; goodput leaves: useful time / wall time, where the
useful time is that of the steps which the run ends with. No clock is waited for and no file of a checkpoint written. When to
save is decided by the real `CheckpointManager`, with `AutoInterval`, `RunHistory` and the two host buffers; only its clock and
its disk are virtual. `simulate_scale.py` is the command.

A step lost is one that a failure interrupts, or that comes after the last durable save; a failure while the workers start
again starts that anew. All failures come without notice: the worst that a preemption can be.
"""

from __future__ import annotations

import heapq
import math
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agentlightning.checkpoint.history import RunHistory
from agentlightning.checkpoint.manager import CheckpointManager
from agentlightning.checkpoint.retention import name_of
from agentlightning.checkpoint.store import CheckpointFiles, SavedCheckpoint
from agentlightning.checkpoint.writer import BUFFERS
from agentlightning.errors import CheckpointError

NOTHING = CheckpointFiles({})


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds."""

    step_s: float  # with nothing but work in it
    save_s: float = 0.0  # by which a save stops the step
    write_s: float = 0.0  # behind the next steps, until it is durable
    restart_s: float = 0.0  # from a failure to the first step after it


@dataclass(frozen=True, slots=True)
class Goodput:
    """What became of a run."""

    useful_s: float
    wall_s: float
    failures: int
    saves: int
    interval: float  # steps between saves, on average

    @property
    def share(self) -> float:
        """Useful time / wall time."""
        return self.useful_s / self.wall_s


class WorkerLost(Exception):
    """A worker was preempted; the clock stands at that instant."""


class VirtualClock:
    """Time that passes when somebody sleeps, and failures in it."""

    def __init__(self, failures: Iterator[float]) -> None:
        """`failures`: instants in order; it may be endless or empty."""
        self.now, self.failures = 0.0, failures
        self.next_failure = next(failures, math.inf)

    def read(self) -> float:
        """For those who look at it."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Raises `WorkerLost`, at its instant, if a failure comes before the end."""
        if self.now + seconds <= self.next_failure:
            self.now += seconds
            return
        self.now = max(self.now, self.next_failure)
        self.next_failure = next(self.failures, math.inf)
        raise WorkerLost


class VirtualDisk(ThreadPoolExecutor):
    """In the place of the thread that writes: a job is done `write_s` after those before it, when somebody looks."""

    def __init__(self, clock: VirtualClock, write_s: float) -> None:
        super().__init__(1)  # it never starts a thread
        self.clock, self.write_s = clock, write_s
        self.jobs: deque[tuple[float, Callable[[], Any], Future[Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor`."""
        begins_at = max(self.clock.now, self.jobs[-1][0] if self.jobs else 0.0)
        self.jobs.append((begins_at + self.write_s, fn, Future()))
        return self.jobs[-1][2]

    def catch_up(self) -> None:
        """Do what is done by now."""
        while self.jobs and self.jobs[0][0] <= self.clock.now:
            _, job, future = self.jobs.popleft()
            future.set_result(job())

    def lose(self) -> None:
        """What is half written stays so: the workers that held it are gone."""
        for _, _, future in self.jobs:
            future.set_exception(CheckpointError("a worker died before its part was written"))
        self.jobs.clear()


class VirtualManager(CheckpointManager):
    """The real one over a virtual clock and disk. `durable` is the newest step that a kill would leave."""

    def __init__(self, root: Path, save_freq: int | Literal["auto"], clock: VirtualClock, costs: Costs) -> None:
        super().__init__(root, save_freq)
        self.clock, self.costs = clock, costs
        self.history = RunHistory(self.root, clock.read)
        self.disk = VirtualDisk(clock, costs.write_s)
        self._writer._thread = self.disk
        self.durable = self.saves = 0

    def after_step(self, step: int, step_s: float, is_last: bool) -> None:
        """What `AgentLightningTrainer._keep` does: hear of saves, decide, save, observe. Raises `WorkerLost`."""
        self.disk.catch_up()
        self.collect()
        saving = self.should_save(step, is_last)
        if saving:
            self._wait_until(len(self.disk.jobs) < BUFFERS)
            buffer = self.free_buffer()
            self.clock.sleep(self.costs.save_s)
            self.start_save(step, NOTHING, buffer)
            self.saves += 1
        self.observe(step_s, self.costs.save_s if saving else None)

    def finish(self) -> None:
        """Wait for what is being written. Raises `WorkerLost`."""
        while self.disk.jobs:
            self._wait_until(False)
        self.collect()

    def fall_back(self) -> int:
        """After a failure: the step that the run goes on from. As `settle` and `load_again`, which look at files."""
        self.disk.catch_up()
        self.disk.lose()
        self.collect()
        self.history.worker_died()
        self.last, self.failed, self._started_step = None, None, self.durable
        return self.durable

    def _wait_until(self, free: bool) -> None:
        """Let time pass until the oldest save is written, unless a buffer is free."""
        if not free:
            self.clock.sleep(self.disk.jobs[0][0] - self.clock.now)
            self.disk.catch_up()

    def _save(self, step: int, files: CheckpointFiles, taken_at: float) -> SavedCheckpoint:
        self.durable = step
        return SavedCheckpoint(self.root / name_of(step), name_of(step), step, 0, self.costs.write_s)


def simulate(costs: Costs, save_freq: int | Literal["auto"], failures: Iterator[float], steps: int) -> Goodput:
    """A run of `steps` steps, from its start to its last durable checkpoint."""
    clock, deaths, step = VirtualClock(failures), 0, 0
    with (
        tempfile.TemporaryDirectory(dir=_fast_directory()) as root,
        closing(VirtualManager(Path(root), save_freq, clock, costs)) as manager,
    ):
        manager.history.begin(1, None)
        while manager.durable < steps:
            try:
                while step < steps:
                    clock.sleep(costs.step_s)
                    step += 1
                    manager.after_step(step, costs.step_s, step == steps)
                manager.finish()
            except WorkerLost:
                step = manager.fall_back()
                deaths += 1 + _start_again(clock, costs.restart_s)
        return Goodput(steps * costs.step_s, clock.now, deaths, manager.saves, steps / max(1, manager.saves))


def _start_again(clock: VirtualClock, restart_s: float) -> int:
    """How many further failures it took."""
    further = 0
    while True:
        try:
            clock.sleep(restart_s)
            return further
        except WorkerLost:
            further += 1


def _fast_directory() -> str | None:
    """Where the few small files of a simulated run cost least; None for the usual place."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def preemptions(workers: int, mtbf_s: float, seed: int) -> Iterator[float]:
    """The instants at which one of `workers` fails, endless: each fails by itself, after exponential times.

    `mtbf_s` is the mean time between failures of all together, so that of one worker is `workers` times as long.
    """
    rng = np.random.default_rng(seed)
    waiting = [(float(at), worker) for worker, at in enumerate(rng.exponential(mtbf_s * workers, workers))]
    heapq.heapify(waiting)
    while True:
        at, worker = waiting[0]
        yield at
        heapq.heapreplace(waiting, (at + float(rng.exponential(mtbf_s * workers)), worker))


# ---- what theory says


def expected_goodput(costs: Costs, interval: int, mtbf_s: float) -> float:
    """Goodput of a long run that saves every `interval` steps, failures being exponential: exact, by renewal.

    Between two failures that a restart outlives lie exp(R/M) M seconds, restart and its repetitions included. A stretch of work
    without failure, of exponential length X, makes floor((X - write) / (interval * step + save)) intervals durable; the mean of
    that is exp(-write/M) / (exp(period/M) - 1). A save must be durable before the next one ends.
    """
    period = interval * costs.step_s + costs.save_s
    durable = math.exp(-costs.write_s / mtbf_s) / math.expm1(period / mtbf_s)
    return durable * interval * costs.step_s / (mtbf_s * math.exp(costs.restart_s / mtbf_s))


def restart_bound(costs: Costs, mtbf_s: float) -> float:
    """The goodput of a run that loses nothing but the restarts, whatever it saves and when: exp(-R/M)."""
    return math.exp(-costs.restart_s / mtbf_s)


def step_bound(costs: Costs, mtbf_s: float) -> float:
    """The same where the step that a failure interrupts is lost too: saves that cost nothing, after every step."""
    return expected_goodput(Costs(costs.step_s, restart_s=costs.restart_s), 1, mtbf_s)


def best_interval(costs: Costs, mtbf_s: float) -> int:
    """The interval with the highest expected goodput, in steps: by trying them all."""
    most = max(2, math.ceil(4 * (math.sqrt(2 * costs.save_s * mtbf_s) / costs.step_s + 1)))
    return max(range(1, most + 1), key=lambda interval: expected_goodput(costs, interval, mtbf_s))


def young_seconds(save_s: float, mtbf_s: float) -> float:
    """Young's optimum of the work between two saves (CACM 17(9), 1974): sqrt(2 C M)."""
    return math.sqrt(2 * save_s * mtbf_s)


def daly_seconds(save_s: float, mtbf_s: float) -> float:
    """Daly's (FGCS 22(3), 2006, equation 37), for C < 2M: sqrt(2CM) [1 + sqrt(C/2M)/3 + (C/2M)/9] - C; else M."""
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    x = save_s / (2 * mtbf_s)
    return math.sqrt(2 * save_s * mtbf_s) * (1 + math.sqrt(x) / 3 + x / 9) - save_s
