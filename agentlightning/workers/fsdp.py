"""The frozen base spread over the workers (FSDP2), the adapters whole on each: for a base that one device cannot hold beside
its activations.

Enters: a base with its adapters, and connected workers. Leaves: the same modules, whose layers gather their weights when they
run and let them go afterwards. Every pass through a layer is then a collective, so all workers must run the same passes:
`any_worker` is what the training pass asks. A rollout gathers all weights once and then runs without collectives, so workers
may decode for as long as each of them needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from agentlightning.models.adapters import Adapters
from agentlightning.models.base import output_head


class ShardedBase:
    """Shards the base of `adapters` when it is made; the workers must be connected, and each must make one."""

    def __init__(self, adapters: Adapters, device: torch.device) -> None:
        self.device = device
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        decoder, head = adapters.base.get_decoder(), output_head(adapters.base)
        layers = decoder.layers
        assert isinstance(layers, nn.ModuleList)
        # The output head is called by itself, in chunks; where it is the embedding too, that stays whole with it.
        whole = {parameter for of_adapter in adapters.parameters.values() for parameter in of_adapter.values()}
        whole |= set(head.parameters())
        head.to(device)
        self.layers = layers
        self.modules: list[FSDPModule] = [
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole) for module in (*layers, decoder)
        ]

    def any_worker(self, has: bool) -> bool:
        """Whether it is true on any worker; all must ask."""
        flag = torch.tensor([int(has)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights are whole on every worker within the block, and no pass is a collective; without gradients only."""
        for module in self.modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in self.modules:
                module.reshard()
                module.set_reshard_after_forward(True, recurse=False)

    def holds_a_part(self) -> bool:
        """Whether the layers' frozen weights lie here in part."""
        frozen = [p for p in self.layers.parameters() if isinstance(p, DTensor)]
        return bool(frozen) and all(p.to_local().numel() < p.numel() for p in frozen)
