"""The cluster around the workers: which nodes live, which are about to leave, and places on them.

Enters: a `Demand`. Leaves: a placement group that is ready, or an error that says what was waited for. It keeps what is
Ray's own bookkeeping apart from the workers (ray_backend) and from the plain rules (cluster).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from agentlightning.checkpoint.preemption import Preemption
from agentlightning.errors import ConfigError
from agentlightning.workers.cluster import Demand, Node, describe, fitting_workers, room, too_little

Say = Callable[[str], None]

_LOOK_S = 0.2
_SAY_AFTER_S = 3.0  # a free place is found sooner
_SAY_EVERY_S = 30.0
_SMALLER_S = 15.0  # for places that are free as far as Ray knows
_END_PROCESS_S = 20.0
_OWNER = "agentlightning_owner_"  # beside the sessions of clusters that a run has started, with its process's number


class NotPlacedError(ConfigError):
    """The cluster did not free what was asked for in time."""


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process of the cluster. `started` (seconds since the epoch) tells it from a later one with the same number."""

    node_id: str
    address: str
    pid: int
    started: float

    @classmethod
    def own(cls) -> ProcessId:
        """This process, which takes part in the cluster."""
        node_id = ray.get_runtime_context().get_node_id()
        return cls(node_id, ray.util.get_node_ip_address(), os.getpid(), psutil.Process().create_time())

    def __str__(self) -> str:
        return f"pid {self.pid} on node {self.address}"


def living_nodes() -> list[Node]:
    """The nodes on which something can be started: those that live, without those that are being drained."""
    leaving = draining_nodes()
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            int(node["Resources"].get("GPU", 0)),
            int(node["Resources"].get("CPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    ]


def draining_nodes() -> dict[str, float | None]:
    """The nodes that are about to be taken away (drained, preempted), and by when, in seconds since the epoch if Ray knows.

    Ray has no public name for it; its own trainer asks here too.
    """
    found: dict[str, int] = ray._private.state.state.get_draining_nodes()  # pyright: ignore
    return {node_id: deadline_ms / 1000 if deadline_ms else None for node_id, deadline_ms in found.items()}


def reserve(demand: Demand, stop: Preemption, say: Say, timeout_s: float | None, grows: bool) -> PlacementGroup:
    """A bundle for each group of `demand`, packed on as few nodes as can be; waits for them.

    Raises `ConfigError` at once if the cluster does not grow (`grows`) and is too small, `NotPlacedError` after `timeout_s`
    (None: never), and whatever `stop` raises.
    """
    nodes = living_nodes()
    if not grows and room(demand, nodes) < demand.groups:
        raise too_little(demand, nodes)
    group = placement_group([demand.bundle for _ in range(demand.groups)], strategy="PACK")
    try:
        _wait_until_ready(group, demand, stop, say, timeout_s)
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def reserve_what_is_there(
    demand: Demand, numbers: Sequence[int], stop: Preemption, say: Say, timeout_s: float | None
) -> tuple[Demand, PlacementGroup]:
    """The first of the `numbers` of workers, which fall, that the cluster has free places for; it waits for one at least."""
    fits = fitting_workers(demand, living_nodes(), ray.available_resources())
    for number in numbers:
        if 1 < number <= fits:
            with contextlib.suppress(NotPlacedError):
                return demand.single(number), reserve(demand.single(number), stop, say, _SMALLER_S, grows=True)
            fits = fitting_workers(demand, living_nodes(), ray.available_resources())
    return demand.single(1), reserve(demand.single(1), stop, say, timeout_s, grows=True)


def _wait_until_ready(group: PlacementGroup, demand: Demand, stop: Preemption, say: Say, timeout_s: float | None) -> None:
    began = time.monotonic()
    say_at = began + _SAY_AFTER_S
    while not group.wait(_LOOK_S):
        stop.check()
        now = time.monotonic()
        if timeout_s is not None and now - began >= timeout_s:
            raise NotPlacedError(
                f"trainer.n_gpus_per_node: the cluster had no {demand} free within {timeout_s:.0f} s; "
                f"{describe(living_nodes())}; end other jobs, mend it with trainer.n_gpus_per_node=null to take what the "
                "cluster has, or wait longer with trainer.resources_timeout_s=3600"
            )
        if now >= say_at:
            free = ray.available_resources()
            say(
                f"waiting for {demand}; {describe(living_nodes())}, of which {free.get('GPU', 0):.0f} GPU and "
                f"{free.get('CPU', 0):.0f} CPU are free"
            )
            say_at = now + _SAY_EVERY_S


def end_process(process: ProcessId, here: str) -> None:
    """SIGKILL, which also ends a process that was stopped and so hears nothing of Ray. `here` is this process's node."""
    if process.node_id == here:
        _kill(process.pid, process.started)
        return
    task = ray.remote(num_cpus=0, max_retries=0)(_kill)
    there = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
    with contextlib.suppress(RayError):  # a node that is gone has taken the process with it
        ray.get(task.options(scheduling_strategy=there).remote(process.pid, process.started), timeout=_END_PROCESS_S)


def _kill(pid: int, started: float) -> None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if abs(process.create_time() - started) < 1:
            process.send_signal(signal.SIGKILL)


def own_session() -> Path:
    """The folder of the cluster, Ray's own logs and sockets, on this machine."""
    node = ray._private.worker.global_worker.node  # pyright: ignore
    return Path(node.get_session_dir_path())


def mark_owner(folder: Path) -> None:
    """Write down in Ray's `folder` that this process is about to start a cluster there, and remove what those left that were
    killed before they could: the sessions, and what says whose they are.

    Before the start, so that no moment is left in which a killed run would leave a session of which nobody knows whose it was.
    """
    process = psutil.Process()
    folder.mkdir(parents=True, exist_ok=True)
    for owner in folder.glob(f"{_OWNER}*"):
        if _owner_lives(owner):
            continue
        with contextlib.suppress(FileNotFoundError):  # another start removes it too
            for session in _sessions_of(owner):
                shutil.rmtree(session, ignore_errors=True)
            owner.unlink()
    (folder / f"{_OWNER}{process.pid}").write_text(f"{process.pid} {process.create_time()}")


def remove_session(session: Path) -> None:
    """Remove that folder if this process has started its cluster; one that was joined stays."""
    owner = session.parent / f"{_OWNER}{os.getpid()}"
    if owner.is_file() and session in _sessions_of(owner):
        shutil.rmtree(session, ignore_errors=True)
        owner.unlink(missing_ok=True)


def _sessions_of(owner: Path) -> list[Path]:
    """Ray names a session by its beginning and by who began it; a number of a process may come again."""
    pid, started = _process_of(owner)
    sessions = owner.parent.glob(f"session_*_{pid}")
    return [session for session in sessions if not session.is_symlink() and _began(session) >= started - 1]


def _began(session: Path) -> float:
    """Seconds since the epoch; `session_2026-11-25_15-41-17_180508_17550` says local time. 0 where it says something else."""
    try:
        return datetime.strptime(session.name.rpartition("_")[0], "session_%Y-%m-%d_%H-%M-%S_%f").timestamp()
    except ValueError:
        return 0.0


def _process_of(owner: Path) -> tuple[int, float]:
    pid, started = owner.read_text().split()
    return int(pid), float(started)


def _owner_lives(owner: Path) -> bool:
    """Also where it cannot be made out."""
    try:
        pid, started = _process_of(owner)
        return abs(psutil.Process(pid).create_time() - started) < 1
    except psutil.NoSuchProcess:
        return False
    except (OSError, ValueError, psutil.Error):
        return True
