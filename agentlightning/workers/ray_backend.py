"""Workers as Ray actors in a placement group: one GPU each, or CPU processes.

Enters: settings and a number of workers. Leaves: a `Backend`. A worker that fails ends the call with its own error: its own
exception, or where the process died or fell silent, the last lines it wrote. No call waits for a worker that does not live.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from agentlightning.checkpoint.preemption import SIGNALS, Preemption
from agentlightning.errors import AgentLightningError, ConfigError, WorkerError
from agentlightning.workers.cluster import Demand, NodeDrained
from agentlightning.workers.ray_cluster import ProcessId, draining_nodes, end_process, reserve
from agentlightning.workers.ray_session import mark_owner, mark_session, own_session, remove_session
from agentlightning.workers.signs_of_life import BESIDE, IDLE, SignsOfLife, beside

_PLACEMENT_TIMEOUT_S = 60.0
_LOG_LINES = 12
_MANY = 8  # workers from which on an argument that all of them get is worth an object of its own
_LOOK_S = 0.2  # how often a wait looks whether the run shall leave
_PING_S = 10.0
_NODES_S = 2.0  # how often a wait asks whether a node is about to leave
_STACK_S = 3.0
_STACK_FRAMES = 6
_GRACE_S = 1.0
_LISTENER = "worker-signals"  # name of the threads that wait for the workers' signals
_RAYS_NAMES = ("ray::", "raylet", "gcs_server")
# What torch.distributed says where another process is gone, or has kept this one waiting for too long.
_BROKEN_CONNECTION = ("gloo/transport", "ProcessGroupGloo", "ProcessGroupNCCL", "NCCL error", "c10d")
_leaving = threading.Event()  # Ray ends a process in which anything touches it while it is shut down


class WorkerActor:
    """The process around a `Worker`, or what a subclass builds.

    Imports torch when it starts to build, not when Ray looks at the class.
    """

    def __init__(self, log_path: str) -> None:
        # Ray runs the creation in the main thread, and because there is a concurrency group the methods in others.
        # Threads that wait for each other must not burn the cores that other workers need. Read when torch is loaded, later.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        _use_interface_of(ray.util.get_node_ip_address())
        if Path(log_path).parent.is_dir():  # otherwise this node does not see the run directory, which is told elsewhere
            log = open(log_path, "a", buffering=1)  # noqa: SIM115 - it stays open as long as the process lives
            os.dup2(log.fileno(), 2)
            faulthandler.enable(log)
        self._signalled = _listen_for_signals()
        self._calling: int | None = None  # the thread that computes

    def load_libraries(self) -> None:
        """Import what takes seconds while the controller is still busy with the data."""
        import agentlightning.workers.worker

        assert agentlightning.workers.worker

    def start(self, settings: Any) -> None:
        """`build`, in sight of `stack`."""
        with self._in_sight():
            self.build(settings)

    def build(self, settings: Any) -> None:
        """Make `self.worker`, whose methods `call` calls."""
        from agentlightning.workers.worker import Worker

        self.worker: Any = Worker(settings)

    def call(self, method: str, *arguments: Any) -> Any:
        """What that method of the worker says."""
        with self._in_sight():
            return getattr(self.worker, method)(*arguments)

    @contextlib.contextmanager
    def _in_sight(self) -> Iterator[None]:
        self._calling = threading.get_ident()
        try:
            yield
        finally:
            self._calling = None

    def call_beside(self, method: str, *arguments: Any) -> Any:
        """The same, from a thread beside."""
        return getattr(self.worker, method)(*arguments)

    def limit_collectives(self, seconds: float) -> None:
        """What waits for another worker for longer raises."""
        from torch.distributed.distributed_c10d import _set_pg_timeout

        _set_pg_timeout(timedelta(seconds=seconds))

    def ping(self) -> None:
        """Answers if the process lives."""

    def identity(self) -> ProcessId:
        """Which process this is."""
        return ProcessId.own()

    def stack(self) -> str:
        """Where the thread that computes is now."""
        frame = sys._current_frames().get(self._calling or 0)
        return "".join(traceback.format_stack(frame)[-_STACK_FRAMES:]) if frame is not None else IDLE

    def wait_for_signal(self) -> int:
        """The number of the signal that this process was sent; waits until there is one."""
        return self._signalled.result()

    def free_address(self) -> str:
        """`tcp://host:port` of this process's host."""
        host = ray.util.get_node_ip_address()
        with closing(socket.socket()) as probe:
            probe.bind(("", 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"


def _use_interface_of(address: str) -> None:
    """gloo would listen where the host's name points, which on many hosts is the loopback."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


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

    `stop` is looked at while the controller waits, and told when a worker is sent a signal, or this node is about to leave. A
    worker that is silent for `timeout_s`, or waits so long for another one, ends the call as a dead one does. Of one that lives
    and stands still for so long (a tool of the user's that waits for ever) `say` is told: what is slow is not killed.
    """

    def __init__(
        self,
        world_size: int,
        gpus_per_worker: int,
        cpus_per_worker: int,
        log_dir: Path | None,
        stop: Preemption,
        process: type[WorkerActor] = WorkerActor,
        group: tuple[Demand, PlacementGroup] | None = None,
        timeout_s: float = 600.0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`log_dir=None`: the workers' logs go with Ray's own, into the folder of the session, and end with it.

        `group` is what was reserved for the workers; without it, places are reserved wherever there is room.
        """
        self.world_size = world_size
        self.stop = stop
        self.timeout_s = timeout_s
        self.say = say
        if log_dir is None:
            log_dir = Path(tempfile.mkdtemp(prefix="agentlightning-", dir=own_session() / "logs"))
        self.log_paths = [log_dir / f"worker_{rank}.log" for rank in range(world_size)]
        log_dir.mkdir(parents=True, exist_ok=True)
        if group is None:
            each = Demand(world_size, 1, gpus_per_worker, cpus_per_worker)
            group = each, reserve(each, stop, lambda _: None, _PLACEMENT_TIMEOUT_S, grows=False)
        demand, self.group = group
        self.node_id = ray.get_runtime_context().get_node_id()
        self.nodes_at = time.monotonic()
        remote = ray.remote(  # pyright: ignore[reportCallIssue] - its stubs do not know concurrency groups
            num_gpus=gpus_per_worker, num_cpus=cpus_per_worker, concurrency_groups={BESIDE: 4}
        )(process)
        self.actors: list[Any] = [
            remote.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self.group, placement_group_bundle_index=rank // demand.size
                ),
            ).remote(str(path))
            for rank, path in enumerate(self.log_paths)
        ]
        self._identities = [beside(actor.identity).remote() for actor in self.actors]
        for actor in self.actors:
            actor.load_libraries.remote()
        signals = [beside(actor.wait_for_signal).remote() for actor in self.actors]
        threading.Thread(target=self._hear_of_signals, args=(signals,), name=_LISTENER, daemon=True).start()

    def build(self, settings: Any) -> None:
        """Load the model on every worker, and connect them if there are several. `settings` are what a process builds from."""
        self._wait([actor.start.remote(settings) for actor in self.actors])
        if self.world_size > 1:
            [address] = self._wait([self.actors[0].free_address.remote()])
            self.call("connect", [(rank, self.world_size, address) for rank in range(self.world_size)])
            self._wait([actor.limit_collectives.remote(self.timeout_s) for actor in self.actors])

    def call(self, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        """See `Backend`."""
        first = arguments[0]
        if first is not None and len(arguments) > _MANY and all(args is first for args in arguments):
            arguments = [tuple(ray.put(argument) for argument in first)] * len(arguments)  # one copy for all, not one each
        asked = [(rank, args) for rank, args in enumerate(arguments) if args is not None]
        answers: list[Any] = [None] * len(arguments)
        given = self._wait([self.actors[rank].call.remote(method, *args) for rank, args in asked])
        for (rank, _), answer in zip(asked, given, strict=True):
            answers[rank] = answer
        return answers

    def call_first(self, method: str, *arguments: Any) -> Any:
        """See `Backend`."""
        return self._wait([self.actors[0].call.remote(method, *arguments)])[0]

    def call_beside(self, method: str, ranks: Sequence[int], *arguments: Any) -> list[Any]:
        """See `Backend`. Not interrupted by `stop`: what is being saved is finished."""
        references = [beside(self.actors[rank].call_beside).remote(method, *arguments) for rank in ranks]
        try:
            return self._answers(references, lambda: None)
        except RayTaskError as error:
            raise _cause(error) from None
        except RayError as error:
            raise WorkerError(f"a worker died before its part was written: {_first_words(error)}") from None

    def blind_nodes(self, witness: Path) -> list[str]:
        """Addresses of the nodes of which no worker sees the file `witness` as it is here."""
        text = witness.read_text(errors="replace")
        sees = self.call("sees", [(str(witness), text)] * self.world_size)
        nodes = [process.address for process in self._wait(self._identities)]
        seeing = {node for node, saw in zip(nodes, sees, strict=True) if saw}
        return sorted(set(nodes) - seeing)

    def close(self) -> None:
        """Kill the workers and give their resources back."""
        for actor in self.actors:
            ray.kill(actor)
        for rank in range(self.world_size):
            process = self._identity(rank)
            if process is not None and process.node_id == self.node_id:  # Ray does not kill one that was stopped
                end_process(process, self.node_id)
        remove_placement_group(self.group)

    def _hear_of_signals(self, signals: list[Any]) -> None:
        """Pass on the first signal that a worker is sent, for as long as the workers live and Ray is not left."""
        try:
            first: list[Any] = []
            while not first:
                if _leaving.is_set() or not ray.is_initialized():
                    return
                first, _ = ray.wait(signals, num_returns=1, timeout=_LOOK_S)
            self.stop.request(f"{signal.Signals(ray.get(first[0])).name} to a worker")
        except RayError:
            return  # they have gone: nobody is left to be signalled

    def _wait(self, references: Sequence[Any]) -> list[Any]:
        """The answers; looks at `stop` and at the nodes all the while. The first failure of any worker is raised at once."""
        try:
            return self._answers(references, self._look_around)
        except RayTaskError as error:
            if not isinstance(error.cause, AgentLightningError):
                self._demand_that_all_live(error)
            raise _cause(error) from None
        except RayError as error:
            raise WorkerError(f"a worker died: {_first_words(error)}\n{self._last_words()}") from None

    def _answers(self, references: Sequence[Any], look_around: Callable[[], None]) -> list[Any]:
        """The answers, in order. `look_around` may end the wait; a worker that is silent for too long does."""
        life, pending = SignsOfLife(self.actors, self.timeout_s), list(references)
        while pending:
            # All at once: asked for one by one, a thousand answers take ten times as long. An error is seen within _LOOK_S.
            ready, pending = ray.wait(pending, num_returns=len(pending), timeout=_LOOK_S)
            ray.get(ready)
            look_around()
            silent = life.silent()
            if silent:
                raise self._gave_up_on(silent, f"no sign of life for {self.timeout_s:g} s (trainer.worker_timeout_s)")
            for rank in life.stuck():
                self.say(
                    f"worker {rank} ({self._identity(rank)}) lives, but stands at one line for {self.timeout_s:g} s "
                    f"(trainer.worker_timeout_s); it is waited for. It is in:\n{life.places[rank].stack}"
                )
        return ray.get(list(references))

    def _look_around(self) -> None:
        """Leave if asked to, and tell of nodes that are about to go."""
        self.stop.check()
        now = time.monotonic()
        if now - self.nodes_at < _NODES_S:
            return
        self.nodes_at = now
        leaving = draining_nodes()
        if self.node_id in leaving:
            self.stop.request("this node is being drained")
            return
        for rank in range(self.world_size) if leaving else ():
            process = self._identity(rank)
            if process is not None and process.node_id in leaving:
                by = leaving[process.node_id]
                until = f" within {max(0.0, by - time.time()):.0f} s" if by is not None else ""
                raise NodeDrained(f"node {process.address} is being drained{until}, and worker {rank} is there")

    def _gave_up_on(self, silent: Sequence[int], why: str) -> WorkerError:
        """End those workers, so that nothing else waits for them either; returns what to say."""
        names = ", ".join(f"worker {rank} ({self._identity(rank) or 'it never started'})" for rank in silent)
        stacks = self._stacks([rank for rank in range(self.world_size) if rank not in silent])
        for rank in silent:
            process = self._identity(rank)
            if process is not None:
                end_process(process, self.node_id)
        return WorkerError(f"{names}: {why}\n{stacks}{self._last_words()}")

    def _stacks(self, ranks: Sequence[int]) -> str:
        """Where those workers are that still answer: what they wait in."""
        asked = {beside(self.actors[rank].stack).remote(): rank for rank in ranks[:4]}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_STACK_S) if asked else ([], [])
        try:
            return "".join(f"worker {asked[answer]} is in:\n{ray.get(answer)}" for answer in ready)
        except RayError:
            return ""  # it has died too

    def _demand_that_all_live(self, error: RayTaskError) -> None:
        """Raise `WorkerError` if one is dead or silent: what another one says then (a broken connection) is not the cause."""
        pings = [beside(actor.ping).remote() for actor in self.actors]
        ready, silent = ray.wait(pings, num_returns=len(pings), timeout=_PING_S)
        if silent:
            raise self._gave_up_on([pings.index(ping) for ping in silent], f"silent; another one says: {_first_words(error)}")
        try:
            ray.get(ready)
        except RayError as dead:
            raise WorkerError(
                f"a worker died: {_first_words(dead)}; another one says: {_first_words(error)}\n{self._last_words()}"
            ) from None
        if any(words in str(error) for words in _BROKEN_CONNECTION):
            stacks = self._stacks(range(self.world_size))
            raise WorkerError(f"the workers lost each other: {error}\n{stacks}{self._last_words()}") from None

    def _identity(self, rank: int) -> ProcessId | None:
        """Which process that worker is; None if it has not started."""
        ready, _ = ray.wait([self._identities[rank]], timeout=0)
        try:
            return ray.get(ready[0]) if ready else None
        except RayError:
            return None

    def _last_words(self) -> str:
        """The ends of the workers' logs."""
        tails = []
        for path in self.log_paths:
            lines = path.read_text(errors="replace").splitlines()[-_LOG_LINES:] if path.is_file() else []
            tails.append(f"{path}:\n" + ("\n".join(f"  {line}" for line in lines) or "  (nothing was written)"))
        return "\n".join(tails)


def joins_cluster(init: Mapping[str, Any]) -> bool:
    """Whether `start_ray` joins a cluster that others have started, and that may grow."""
    return bool(os.environ.get("RAY_ADDRESS")) or "address" in init


def start_ray(init: Mapping[str, Any], cpus: int) -> None:
    """Join the cluster of RAY_ADDRESS, or start a quiet one of our own that no other run on this machine touches."""
    if ray.is_initialized():
        return
    _leaving.clear()
    if joins_cluster(init):
        _join(init)
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
    usual: str = ray._common.utils.get_default_ray_temp_dir()  # pyright: ignore
    mark_owner(Path({"_temp_dir": usual, **init}["_temp_dir"]))
    ray.init(**{**defaults, **init})
    mark_session(own_session())


def _join(init: Mapping[str, Any]) -> None:
    address = init["address"] if "address" in init else os.environ["RAY_ADDRESS"]
    try:
        ray.init(**{"logging_level": logging.ERROR, "log_to_driver": False, **init})
    except ValueError as error:  # sizes are the business of whoever has started the cluster
        raise ConfigError(
            f"ray_kwargs.ray_init: given {dict(init)}: {_first_words(error)}; mend it with ray_kwargs.ray_init={{}}"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}: {_first_words(error)}; start one with `ray start --head`, mend RAY_ADDRESS, "
            "or unset it to run on this machine alone"
        ) from error


def leave_ray(timeout_s: float) -> bool:
    """Shut down what `start_ray` started. False if Ray did not answer in time, as when a scheduler killed its processes too."""
    if not ray.is_initialized():
        return True
    _leaving.set()
    for listener in threading.enumerate():
        if listener.name == _LISTENER:
            listener.join(_GRACE_S)
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)  # it warns that this is not the main thread
    # A cluster that we joined is not among them.
    rays = [child for child in psutil.Process().children(recursive=True) if _is_rays(child)]
    session = own_session()
    thread = threading.Thread(target=ray.shutdown, daemon=True)
    thread.start()
    thread.join(_GRACE_S)
    for process in rays:  # they do not hear SIGTERM, and Ray would wait for them
        with contextlib.suppress(psutil.Error):
            process.kill()
    thread.join(timeout_s)
    remove_session(session)
    return not thread.is_alive()


def cluster_gpus() -> int:
    """GPUs the cluster has."""
    return int(ray.cluster_resources().get("GPU", 0))


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
    """What it says in a line: of a worker's own exception not the traceback."""
    said = f"{type(error.cause).__name__}: {error.cause}" if isinstance(error, RayTaskError) else str(error)
    return " ".join(said.split())[:400]
