"""The cluster around the workers: which nodes live, which are about to leave, and places on them.

Enters: a `Demand`. Leaves: a placement group that is ready, or an error that says what was waited for. It keeps what is
Ray's own bookkeeping apart from the workers (ray_backend) and from the plain rules (cluster).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
