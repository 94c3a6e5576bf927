"""What a run asks of a Ray cluster and what the cluster has, as plain values: how many workers, where, and whether they fit.

Enters: numbers of GPUs and CPU cores by node. Leaves: a `Demand`, the words that describe it, and errors that
name the override. Pure, without Ray, so that every rule is tested without a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from agentlightning.errors import ConfigError, WorkerError


class NodeDrained(WorkerError):
    """A node on which workers run is about to be taken away; they still answer, so what they hold can be saved."""


@dataclass(frozen=True, slots=True)
class Node:
    """A living node of the cluster. `gpus` and `cpus` are what it has, whoever uses them."""

    node_id: str
    address: str
    gpus: int
    cpus: int


@dataclass(frozen=True, slots=True)
class Demand:
    """`groups` x `size` workers; those of one group share a node. `gpus` and `cpus` are for each worker.

    Example: 2 nodes with 8 GPUs each: `Demand(groups=2, size=8, gpus=1, cpus=1)`, in words "2 x 8 GPU".
    """

    groups: int
    size: int
    gpus: int
    cpus: int

    @property
    def world_size(self) -> int:
        """Workers in all."""
        return self.groups * self.size

    @property
    def bundle(self) -> dict[str, float]:
        """What a group takes of a node, in Ray's words."""
        cores = {"CPU": float(self.size * self.cpus)}
        return cores | {"GPU": float(self.size * self.gpus)} if self.gpus else cores

    def __str__(self) -> str:
        each, unit = (self.gpus, "GPU") if self.gpus else (self.cpus, "CPU")
        return f"{self.groups} x {self.size * each} {unit}"

    def single(self, world_size: int) -> Demand:
        """`world_size` workers of this kind wherever there is room."""
        return replace(self, groups=world_size, size=1)


def room(demand: Demand, nodes: Sequence[Node]) -> int:
    """How many groups of `demand` fit into `nodes`, were nobody else there."""
    return sum(_groups_on(demand, node) for node in nodes)


def _groups_on(demand: Demand, node: Node) -> int:
    by_cpu = node.cpus // (demand.size * demand.cpus)
    return min(by_cpu, node.gpus // (demand.size * demand.gpus)) if demand.gpus else by_cpu


def fitting_workers(demand: Demand, nodes: Sequence[Node], free: Mapping[str, float]) -> int:
    """How many workers of this kind, wherever there is room, `nodes` can take of which `free` is free, in Ray's words."""
    fits = min(room(demand.single(1), nodes), int(free.get("CPU", 0)) // demand.cpus)
    return min(fits, int(free.get("GPU", 0)) // demand.gpus) if demand.gpus else fits


def describe(nodes: Sequence[Node]) -> str:
    """What the cluster has, in a line."""
    if not nodes:
        return "the cluster has no node"
    some = ", ".join(f"{node.address}: {node.gpus} GPU {node.cpus} CPU" for node in nodes[:4])
    rest = f" and {len(nodes) - 4} more" if len(nodes) > 4 else ""
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    return f"the cluster has {gpus} GPU and {cpus} CPU on {len(nodes)} node{'s' if len(nodes) > 1 else ''} ({some}{rest})"


def too_little(demand: Demand, nodes: Sequence[Node]) -> ConfigError:
    """What to say when `demand` does not fit."""
    single = demand.single(1)
    on_one_node = max((_groups_on(single, node) for node in nodes), default=0)
    if room(demand, nodes):
        fits = f"trainer.nnodes={room(demand, nodes)} trainer.n_gpus_per_node={demand.size}"
    elif on_one_node:
        fits = f"trainer.nnodes=1 trainer.n_gpus_per_node={on_one_node}"
    else:
        fits = "trainer.device=cpu"
    unit = "GPUs" if demand.gpus else "CPU cores"
    return ConfigError(
        f"trainer.n_gpus_per_node: {demand.world_size} workers need {demand.world_size} {unit}, as {demand}, but "
        f"{describe(nodes)}; mend it with {fits}, or trainer.n_gpus_per_node=null to take what the cluster has"
    )
