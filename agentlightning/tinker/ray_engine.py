"""The engine of custom loops and the service on Ray workers: one for each GPU, or on CPU cores, each with every model.

The data of a forward_backward are divided among the workers by their tokens; each adds up its own gradients, and `optim_step`
sums them in one all-reduce, so that all workers hold the same weights ever after. Requests to sample are divided too. One
worker gives the bits of the engine in this process; several give sums in another order. Checkpoint directories must be on a
file system that all workers see.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
import torch.distributed as dist

from agentlightning.checkpoint.preemption import Preemption
from agentlightning.errors import NumericsError, UserError
from agentlightning.tinker.engine import EngineSettings, InProcessLoraEngine, as_output
from agentlightning.tinker.engine_api import BaseModelInfo, EngineMemory, SampleRequest
from agentlightning.tinker.engine_data import CheckedData, Limits, check_data
from agentlightning.tinker.engine_passes import DatumResult
from agentlightning.tinker.types import AdamParams, Datum, ForwardBackwardOutput, LoraConfig, SampleResponse
from agentlightning.workers.ray_backend import RayWorkers, WorkerActor, cluster_gpus, leave_ray, start_ray
from agentlightning.workers.shards import balanced_shards

_LEAVE_S = 10.0


class EngineWorker(InProcessLoraEngine):
    """One worker: the engine in its process, and what several of them must do together."""

    before: tuple[torch.Tensor | None, int] = (None, 0)  # gradient sum and pending before the last share

    def connect(self, rank: int, world_size: int, address: str) -> None:
        """Join the other workers. `address` is `tcp://host:port` of rank 0."""
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=world_size)

    def run_share(self, model_id: str, share: CheckedData, forward_only: bool) -> list[DatumResult] | NumericsError:
        """`run_checked`, whose failure is handed back: then the others must undo theirs."""
        model = self._look_up(model_id)
        self.before = (model.gradient.clone() if model.pending else None, model.pending)
        try:
            return self.run_checked(model_id, share, forward_only)
        except NumericsError as error:
            return error

    def undo_share(self, model_id: str) -> None:
        """As if the last `run_share` had not been."""
        model = self._look_up(model_id)
        gradient, pending = self.before
        model.drop_gradient()
        if gradient is not None:
            model.gradient.copy_(gradient)
        model.pending = pending

    def memory(self) -> EngineMemory:
        """Of this worker, whose process is beside that of who asks."""
        return replace(super().memory(), host_bytes=psutil.Process().memory_info().rss)

    def sum_gradients(self, model_id: str) -> None:
        """Before a save: the first worker, which writes, holds the sum of all afterwards."""
        self._resident(model_id).sum_gradients()

    def load_share(self, model_id: str, directory: Path, optimizer: bool) -> None:
        """`load_state`; a gradient sum that was saved goes to the first worker alone."""
        self.load_state(model_id, directory, optimizer)
        if dist.is_initialized() and dist.get_rank() != 0:
            self._look_up(model_id).gradient.zero_()


class EngineActor(WorkerActor):
    """The process around an `EngineWorker`."""

    def load_libraries(self) -> None:
        """Import what takes seconds."""
        import agentlightning.tinker.engine

        assert agentlightning.tinker.engine

    def build(self, settings: EngineSettings) -> None:
        """Load the base."""
        self.worker = EngineWorker(settings)


class RayLoraEngine:
    """See `engine_api.LoraEngine`. Joins the cluster of RAY_ADDRESS, or starts one of its own, which ends with it.

    `stop` is looked at while a call waits: what it raises ends the call. The workers' logs are in `log_dir`, or else
    with Ray's own.
    """

    def __init__(
        self, world_size: int, settings: EngineSettings, log_dir: Path | None = None, stop: Preemption | None = None
    ) -> None:
        self.owns_ray = not ray.is_initialized()
        start_ray({}, world_size)
        try:
            cuda = _use_gpus(world_size, settings.device)
            threads = settings.num_threads or max(1, (os.cpu_count() or 1) // world_size)
            settings = replace(settings, device="cuda" if cuda else "cpu", num_threads=threads)
            self.workers = RayWorkers(world_size, int(cuda), 1, log_dir, stop or Preemption(), EngineActor)
        except BaseException:
            self._leave()
            raise
        try:
            self.workers.build(settings)
            self.limits: Limits = self.workers.call_first("data_limits")
        except BaseException:
            self.close()
            raise

    def base_model(self) -> BaseModelInfo:
        """See the protocol."""
        return self.workers.call_first("base_model")

    def create_model(self, model_id: str, lora: LoraConfig) -> None:
        """See the protocol."""
        self._everywhere("create_model", model_id, lora)

    def unload_model(self, model_id: str) -> None:
        """See the protocol."""
        self._everywhere("unload_model", model_id)

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None = None,
        forward_only: bool = False,
    ) -> ForwardBackwardOutput:
        """See the protocol."""
        checked = check_data(data, loss_fn, loss_fn_config, self.limits)
        shards = balanced_shards(checked.length_B, self.workers.world_size)
        answers = self.workers.call("run_share", [(model_id, checked.rows(shard), forward_only) for shard in shards])
        failed = [answer for answer in answers if isinstance(answer, NumericsError)]
        if failed:
            self._everywhere("undo_share", model_id)
            raise failed[0]
        return as_output(_in_order(shards, answers, len(data)))

    def optim_step(self, model_id: str, adam: AdamParams) -> dict[str, float]:
        """See the protocol."""
        return self._everywhere("optim_step", model_id, adam)[0]

    def save_state(self, model_id: str, directory: Path) -> int:
        """See the protocol."""
        self._everywhere("sum_gradients", model_id)
        return self.workers.call_first("save_state", model_id, directory)

    def load_state(self, model_id: str, directory: Path, optimizer: bool) -> None:
        """See the protocol."""
        self._everywhere("load_share", model_id, directory, optimizer)

    def save_sampler(self, model_id: str, directory: Path) -> int:
        """See the protocol."""
        return self.workers.call_first("save_sampler", model_id, directory)

    def add_sampler(self, sampler_id: str, source: str | Path | None) -> None:
        """See the protocol."""
        self._everywhere("add_sampler", sampler_id, source)

    def drop_sampler(self, sampler_id: str) -> None:
        """See the protocol."""
        self._everywhere("drop_sampler", sampler_id)

    def sample(self, requests: Sequence[SampleRequest]) -> list[SampleResponse]:
        """See the protocol."""
        work_B = np.array([self._work(request) for request in requests], dtype=np.int64)
        shards = balanced_shards(work_B, self.workers.world_size)
        answers = self.workers.call("sample", [([requests[place] for place in shard],) for shard in shards])
        return _in_order(shards, answers, len(requests))

    def memory(self) -> EngineMemory:
        """See the protocol."""
        workers: list[EngineMemory] = self._everywhere("memory")
        return EngineMemory(sum(w.device_bytes for w in workers), sum(w.host_bytes for w in workers))

    def close(self) -> None:
        """See the protocol."""
        self.workers.close()
        self._leave()

    def _leave(self) -> None:
        if self.owns_ray:
            leave_ray(_LEAVE_S)

    def _everywhere(self, method: str, *arguments: Any) -> list[Any]:
        return self.workers.call(method, [arguments] * self.workers.world_size)

    def _work(self, request: SampleRequest) -> int:
        """Tokens that a request may need."""
        limit = request.sampling_params.max_tokens or self.limits.context
        return request.prompt.length + request.num_samples * limit


def _use_gpus(world_size: int, device: str) -> bool:
    """Whether each worker gets a GPU. Raises `UserError` if the cluster has too little of what is asked for."""
    gpus, cpus = cluster_gpus(), int(ray.cluster_resources()["CPU"])
    if device == "cuda" and gpus < world_size:
        raise UserError(
            f"workers: given {world_size} with device=cuda, and the cluster has {gpus} GPUs; mend it with device=cpu"
        )
    if cpus < world_size:
        raise UserError(f"workers: given {world_size}, and the cluster has {cpus} CPU cores; mend it with workers={cpus}")
    return device != "cpu" and gpus >= world_size


def _in_order(shards: Sequence[np.ndarray], answers: Sequence[Sequence[Any]], count: int) -> list[Any]:
    """The workers' answers where their questions were."""
    ordered: list[Any] = [None] * count
    for shard, answer in zip(shards, answers, strict=True):
        for place, value in zip(shard, answer, strict=True):
            ordered[place] = value
    return ordered
