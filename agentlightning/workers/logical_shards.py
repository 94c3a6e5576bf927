"""Logical shards: a batch is cut into V of them, whatever the number of workers, and their gradients are added in one order.

Enters: the gradient of one shard after the other. Leaves: their sum, the same bits on 1, 2, 3 or V workers. Floating-point
addition is not associative, so the order is fixed: neighbours are added in pairs, the sums of those in pairs, and so on. A
worker has a run of neighbouring shards; what it can add alone it adds alone, and only sums of whole subtrees travel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from agentlightning.workers.shards import shards_of_workers

Node = tuple[int, int]
"""(level, place): the sum of the shards from place * 2**level on, 2**level of them."""


def subtrees(shards: range) -> list[Node]:
    """The largest whole subtrees that make up these neighbouring shards, from left to right."""
    nodes: list[Node] = []
    for shard in shards:
        nodes.append((0, shard))
        while len(nodes) > 1 and _are_siblings(nodes[-2], nodes[-1]):
            level, place = nodes.pop()
            nodes[-1] = (level + 1, place // 2)
    return nodes


def _are_siblings(left: Node, right: Node) -> bool:
    return left[0] == right[0] and left[1] % 2 == 0 and right[1] == left[1] + 1


class GradientTree:
    """Adds up the flat gradients [P] of `shards` (a power of two) shards. `first` is the first of this worker's."""

    def __init__(self, shards: int, first: int) -> None:
        assert shards & (shards - 1) == 0, f"{shards} shards are no power of two"
        self.shards, self.next = shards, first
        self.nodes: list[Node] = []
        self.sums: list[Tensor] = []  # of each node

    def add(self, flat_P: Tensor) -> None:
        """The next shard's gradient; it is read, and not kept."""
        node, owned = (0, self.next), False
        self.next += 1
        while self.nodes and _are_siblings(self.nodes[-1], node):
            flat_P, owned = self.sums.pop().add_(flat_P), True
            level, place = self.nodes.pop()
            node = (level + 1, place // 2)
        self.nodes.append(node)
        self.sums.append(flat_P if owned else flat_P.clone())

    def total(self) -> Tensor:
        """The sum over the shards of all workers [P]; each of them must call it after its last shard."""
        if not dist.is_initialized():
            assert self.nodes == [(self.shards.bit_length() - 1, 0)], f"{self.nodes} are not all of {self.shards} shards"
            return self.sums[0]
        return _sum_over_workers(self.sums, self.nodes, self.shards)


def _sum_over_workers(sums: Sequence[Tensor], nodes: Sequence[Node], shards: int) -> Tensor:
    """Each worker adds up one slice of all workers' nodes, by the tree, and the slices are put together: as many bytes as an
    all-reduce where each worker has one node."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    owned = [subtrees(part) for part in shards_of_workers(shards, world_size)]
    assert owned[rank] == list(nodes), f"worker {rank} has added {nodes}, its shards make {owned[rank]}"
    length, most = sums[0].numel(), max(len(part) for part in owned)
    slice_length = -(-length // world_size)
    sent_WNP = sums[0].new_zeros(world_size, most, slice_length)
    for place, flat_P in enumerate(sums):
        padded_P = torch.nn.functional.pad(flat_P, (0, world_size * slice_length - length))
        sent_WNP[:, place] = padded_P.view(world_size, slice_length)
    got_WNP = torch.empty_like(sent_WNP)
    dist.all_to_all_single(got_WNP, sent_WNP)
    parts = {node: got_WNP[worker, place] for worker, part in enumerate(owned) for place, node in enumerate(part)}
    total_WP = sums[0].new_empty(world_size, slice_length)
    dist.all_gather(list(total_WP.unbind()), _sum_of(parts, (shards.bit_length() - 1, 0)).contiguous())
    return total_WP.flatten()[:length]


def _sum_of(parts: Mapping[Node, Tensor], node: Node) -> Tensor:
    if node in parts:
        return parts[node]
    level, place = node
    return _sum_of(parts, (level - 1, 2 * place)) + _sum_of(parts, (level - 1, 2 * place + 1))
