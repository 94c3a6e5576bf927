"""Workers as Ray actors in a placement group: one GPU each, or CPU processes.

Enters: settings and a number of workers. Leaves: a `Backend`. A worker that fails ends the run with its own error: its own
exception, or where the process died, the last lines it wrote.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from agentlightning.checkpoint.preemption import SIGNALS, Preemption
from agentlightning.errors import AgentLightningError, ConfigError, WorkerError

_PLACEMENT_TIMEOUT_S = 60.0
_LOG_LINES = 12
_BESIDE = "beside"  # Ray's concurrency group for what must answer while a worker computes: saving, and signs of life
_LOOK_S = 0.2  # how often a wait looks whether the run shall leave
_PING_S = 10.0
_GRACE_S = 1.0
_RAYS_NAMES = ("ray::", "raylet", "gcs_server")


class WorkerActor:
    """The process around a `Worker`, or what a subclass builds.

    Imports torch when it starts to build, not when Ray looks at the class.
    """

    def __init__(self, log_path: str) -> None:
        # Ray runs the creation in the main thread, and because there is a concurrency group the methods in others.
        # Threads that wait for each other must not burn the cores that other workers need. Read when torch is loaded, later.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        log = open(log_path, "a", buffering=1)  # noqa: SIM115 - it stays open as long as the process lives
        os.dup2(log.fileno(), 2)
        faulthandler.enable(log)
        self._signalled = _listen_for_signals()

    def load_libraries(self) -> None:
        """Import what takes seconds while the controller is still busy with the data."""
        import agentlightning.workers.worker

        assert agentlightning.workers.worker

    def build(self, settings: Any) -> None:
        """Make `self.worker`, whose methods `call` calls."""
        from agentlightning.workers.worker import Worker

        self.worker: Any = Worker(settings)

    def call(self, method: str, *arguments: Any) -> Any:
        """What that method of the worker says."""
        return getattr(self.worker, method)(*arguments)

    def ping(self) -> None:
        """Answers if the process lives."""

    def wait_for_signal(self) -> int:
        """The number of the signal that this process was sent; waits until there is one."""
        return self._signalled.result()

    def free_address(self) -> str:
        """`tcp://host:port` of this process's host."""
        host = ray.util.get_node_ip_address()
        with closing(socket.socket()) as probe:
            probe.bind(("", 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"


def _listen_for_signals() -> Future[int]:
    """Signals no longer end this process; the first one resolves the future.

    A scheduler that stops a job signals every process of it, and what a worker holds may be the only copy of the last step: the
    controller decides what happens. The main thread of a Ray worker runs no Python while methods run elsewhere, so no handler
    would ever be called: the number is read from the descriptor that Python writes it to.
    """
    signalled: Future[int] = Future()
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the controller blocks them for Ray's own processes

    def listen() -> None:
        signalled.set_result(os.read(receiving, 1)[0])
        while os.read(receiving, 1):  # further ones change nothing
            pass

    threading.Thread(target=listen, name="signals", daemon=True).start()
    return signalled


class RayWorkers:
    """A group of worker processes. They start to import at once; `build` loads the model and waits for it.

    `stop` is looked at while the controller waits, and told when a worker is sent a signal.
    """

    def __init__(
        self,
        world_size: int,
        gpus_per_worker: int,
        cpus_per_worker: int,
        log_dir: Path,
        stop: Preemption,
        process: type[WorkerActor] = WorkerActor,
    ) -> None:
        self.world_size = world_size
        self.stop = stop
        self.log_paths = [log_dir / f"worker_{rank}.log" for rank in range(world_size)]
        log_dir.mkdir(parents=True, exist_ok=True)
        self.group = _reserve(world_size, gpus_per_worker, cpus_per_worker)
        remote = ray.remote(  # pyright: ignore[reportCallIssue] - its stubs do not know concurrency groups
            num_gpus=gpus_per_worker, num_cpus=cpus_per_worker, concurrency_groups={_BESIDE: 3}
        )(process)
        self.actors: list[Any] = [
            remote.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank),
            ).remote(str(path))
            for rank, path in enumerate(self.log_paths)
        ]
        for actor in self.actors:
            actor.load_libraries.remote()
        signals = [actor.wait_for_signal.options(concurrency_group=_BESIDE).remote() for actor in self.actors]
        threading.Thread(target=self._hear_of_signals, args=(signals,), name="worker-signals", daemon=True).start()

    def build(self, settings: Any) -> None:
        """Load the model on every worker, and connect them if there are several. `settings` are what a process builds from."""
        self._wait([actor.build.remote(settings) for actor in self.actors])
        if self.world_size > 1:
            [address] = self._wait([self.actors[0].free_address.remote()])
            self.call("connect", [(rank, self.world_size, address) for rank in range(self.world_size)])

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """See `Backend`."""
        return self._wait([actor.call.remote(method, *args) for actor, args in zip(self.actors, arguments, strict=True)])

    def call_first(self, method: str, *arguments: Any) -> Any:
        """See `Backend`."""
        return self._wait([self.actors[0].call.remote(method, *arguments)])[0]

    def call_beside(self, method: str, ranks: Sequence[int], *arguments: Any) -> list[Any]:
        """See `Backend`. Not interrupted by `stop`: what is being saved is finished."""
        beside = [self.actors[rank].call.options(concurrency_group=_BESIDE).remote(method, *arguments) for rank in ranks]
        try:
            return ray.get(beside)
        except RayTaskError as error:
            raise _cause(error) from None
        except RayError as error:
            raise WorkerError(f"a worker died before its part was written: {_first_words(error)}") from None

    def close(self) -> None:
        """Kill the workers and give their resources back."""
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.group)

    def _hear_of_signals(self, signals: list[Any]) -> None:
        """Pass on the first signal that a worker is sent, for as long as the workers live."""
        try:
            [first], _ = ray.wait(signals, num_returns=1)
            self.stop.request(f"{signal.Signals(ray.get(first)).name} to a worker")
        except RayError:
            return  # they have gone: nobody is left to be signalled
        except Exception:
            if not ray.is_initialized():
                return  # Ray was shut down under this thread, and says so in whatever way it breaks
            raise

    def _wait(self, references: Sequence[Any]) -> list[Any]:
        """The answers; looks at `stop` all the while. The first failure of any worker is raised at once."""
        pending = list(references)
        try:
            while pending:
                ready, pending = ray.wait(pending, num_returns=1, timeout=_LOOK_S)
                ray.get(ready)
                self.stop.check()
            return ray.get(list(references))
        except RayTaskError as error:
            if not isinstance(error.cause, AgentLightningError):
                self._demand_that_all_live(error)
            raise _cause(error) from None
        except RayError as error:
            raise WorkerError(f"a worker died: {_first_words(error)}\n{self._last_words()}") from None

    def _demand_that_all_live(self, error: RayTaskError) -> None:
        """Raise `WorkerError` if one is dead: what another one says then (a broken connection) is not the cause."""
        try:
            ray.get([actor.ping.options(concurrency_group=_BESIDE).remote() for actor in self.actors], timeout=_PING_S)
        except RayError as dead:
            raise WorkerError(
                f"a worker died: {_first_words(dead)}; another one says: {_first_words(error)}\n{self._last_words()}"
            ) from None

    def _last_words(self) -> str:
        """The ends of the workers' logs."""
        tails = []
        for path in self.log_paths:
            lines = path.read_text(errors="replace").splitlines()[-_LOG_LINES:] if path.is_file() else []
            tails.append(f"{path}:\n" + ("\n".join(f"  {line}" for line in lines) or "  (nothing was written)"))
        return "\n".join(tails)


def start_ray(init: Mapping[str, Any], cpus: int) -> None:
    """Join the cluster of RAY_ADDRESS, or start a quiet one of our own that no other run on this machine touches."""
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS") or "address" in init:
        ray.init(**{"logging_level": logging.ERROR, "log_to_driver": False, **init})
        return
    # Ray would run its workers at niceness 15: beside anything else on the machine they would get next to nothing.
    os.environ.setdefault("RAY_worker_niceness", "0")
    defaults = {
        "address": "local",
        "include_dashboard": False,
        "num_cpus": max(cpus, os.cpu_count() or 1),
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }
    ray.init(**{**defaults, **init})


def leave_ray(timeout_s: float) -> bool:
    """Shut down what `start_ray` started. False if Ray did not answer in time, as when a scheduler killed its processes too."""
    if not ray.is_initialized():
        return True
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)  # it warns that this is not the main thread
    # A cluster that we joined is not among them.
    rays = [child for child in psutil.Process().children(recursive=True) if _is_rays(child)]
    thread = threading.Thread(target=ray.shutdown, daemon=True)
    thread.start()
    thread.join(_GRACE_S)
    for process in rays:  # they do not hear SIGTERM, and Ray would wait for them
        with contextlib.suppress(psutil.Error):
            process.kill()
    thread.join(timeout_s)
    return not thread.is_alive()


def cluster_gpus() -> int:
    """GPUs the cluster has."""
    return int(ray.cluster_resources().get("GPU", 0))


def _reserve(world_size: int, gpus: int, cpus: int) -> PlacementGroup:
    """A bundle a worker, packed by node. Raises `ConfigError` if the cluster has not so many."""
    has = ray.cluster_resources()
    needs = {"GPU": world_size * gpus, "CPU": world_size * cpus}
    for kind, number in needs.items():
        if number > has.get(kind, 0):
            raise ConfigError(
                f"{world_size} workers need {number} {kind}s, but the cluster has {int(has.get(kind, 0))}: set "
                "trainer.n_gpus_per_node and trainer.nnodes to what is there, or leave trainer.n_gpus_per_node=null to take "
                "what the cluster has"
            )
    bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    group = placement_group([dict(bundle) for _ in range(world_size)], strategy="PACK")
    if not group.wait(_PLACEMENT_TIMEOUT_S):
        remove_placement_group(group)
        raise ConfigError(
            f"the cluster did not free {needs} within {_PLACEMENT_TIMEOUT_S:.0f} s; it has {dict(has)}: end other jobs, or "
            "lower trainer.n_gpus_per_node"
        )
    return group


def _cause(error: RayTaskError) -> BaseException:
    """The worker's own exception; what has fields of its own (errno, filename) keeps them."""
    cause = error.cause
    return cause if isinstance(cause, AgentLightningError | OSError) else error.as_instanceof_cause()


def _is_rays(process: psutil.Process) -> bool:
    """Whether it is one of Ray's own; one that has just gone is not."""
    try:
        return process.name().startswith(_RAYS_NAMES)
    except psutil.Error:
        return False


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
