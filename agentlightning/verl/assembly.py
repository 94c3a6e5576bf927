"""From the checked configuration to running workers: which device, how many, and what each is told.

Enters: a `Config`. Leaves: a `WorkerGroup` that has loaded its model. Ray comes up while torch, the tokenizer and the data
load. On a cluster it also waits for places, and takes fewer where a node is gone for good.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from agentlightning.checkpoint.preemption import Preemption
from agentlightning.errors import ConfigError
from agentlightning.types import LoraShape, MicroBatches
from agentlightning.verl.rules import check_world_size, logical_shards
from agentlightning.verl.schema import Config
from agentlightning.workers.cluster import Demand, room
from agentlightning.workers.settings import (
    ActorSettings,
    CriticSettings,
    OptimSettings,
    RolloutSettings,
    WorkerSettings,
)

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from agentlightning.workers.group import WorkerGroup
    from agentlightning.workers.ray_backend import RayWorkers


@dataclass(frozen=True, slots=True)
class Placement:
    """How many workers, on what, with how many threads each. `per_node` of them share a node; None: wherever there is room."""

    world_size: int
    device: Literal["cpu", "cuda"]
    num_threads: int
    per_node: int | None = None

    @property
    def demand(self) -> Demand:
        """What that is to Ray."""
        size = self.per_node or 1
        return Demand(self.world_size // size, size, gpus=1 if self.device == "cuda" else 0, cpus=1)


def choose_placement(config: Config, gpus: int, cores: int, grows: bool = False) -> Placement:
    """Workers for a cluster with `gpus` GPUs, whose nodes have `cores` CPU cores. One that `grows` may have them later.

    Raises `ConfigError` if more are asked for than there are.
    """
    trainer = config.trainer
    device = ("cuda" if gpus else "cpu") if trainer.device == "auto" else trainer.device
    if device == "cuda":
        asked = trainer.n_gpus_per_node * trainer.nnodes if trainer.n_gpus_per_node is not None else gpus
        may_come = grows and trainer.n_gpus_per_node is not None
        if not may_come and (gpus == 0 or asked > gpus):
            raise ConfigError(
                f"trainer.device=cuda with {asked or 1} GPUs was asked for and there are {gpus}: set "
                "trainer.n_gpus_per_node and trainer.nnodes to what is there, or trainer.device=cpu"
            )
    else:
        asked = (trainer.n_gpus_per_node or 1) * trainer.nnodes
    if trainer.backend == "inprocess" and asked != 1:
        if trainer.n_gpus_per_node is None:
            asked = 1
        else:
            raise ConfigError(
                f"trainer.backend=inprocess runs one worker, but {asked} were asked for: trainer.n_gpus_per_node=1"
            )
    check_world_size(config, asked)
    per_node = max(1, asked // trainer.nnodes)
    threads = trainer.num_threads or max(1, cores // per_node)
    return Placement(asked, device, threads, trainer.n_gpus_per_node)


def place_workers(
    config: Config, run_dir: Path, stop: Preemption, say: Callable[[str], None]
) -> tuple[Placement, RayWorkers | None]:
    """Decide how many workers, and with Ray start their processes, which begin to import at once. Ray is running already.

    Waits for places if the cluster is busy or still grows; `say` hears for what.
    """
    cores = os.cpu_count() or 1
    if config.trainer.backend == "inprocess":
        import torch

        return choose_placement(config, torch.cuda.device_count(), cores), None
    from agentlightning.workers.ray_backend import cluster_gpus, joins_cluster
    from agentlightning.workers.ray_cluster import reserve

    grows = joins_cluster(config.ray_kwargs.ray_init)
    placement = choose_placement(config, cluster_gpus(), cores, grows)
    group = reserve(placement.demand, stop, say, config.trainer.resources_timeout_s, grows)
    return placement, _start_workers(config, placement, group, run_dir, stop, say)


def place_workers_again(
    config: Config, first: Placement, last: int, run_dir: Path, stop: Preemption, say: Callable[[str], None]
) -> tuple[Placement, RayWorkers | None]:
    """In the place of workers that are gone: as many as the run began with (`first`), or those that the cluster still has.

    It waits `trainer.resize_timeout_s` for the first number, but not where a run that goes on with fewer (`last`) has waited
    already and the cluster has not grown since.
    """
    if config.trainer.backend == "inprocess":
        return place_workers(config, run_dir, stop, say)
    from agentlightning.workers.ray_cluster import NotPlacedError, living_nodes, reserve, reserve_what_is_there

    trainer, demand = config.trainer, first.demand
    worth_waiting = last == first.world_size or room(demand, living_nodes()) >= demand.groups
    try:
        group = reserve(demand, stop, say, trainer.resize_timeout_s if worth_waiting else 0.0, grows=True)
        return first, _start_workers(config, first, group, run_dir, stop, say)
    except NotPlacedError:
        fewer = [number for number in range(first.world_size - 1, 0, -1) if _suits(config, number)]
        demand, group = reserve_what_is_there(demand, fewer, stop, say, trainer.resources_timeout_s)
    placement = replace(first, world_size=demand.world_size, per_node=None)
    if placement.world_size < first.world_size:
        say(
            f"going on with {placement.world_size} of {first.world_size} workers: no room for all of them within "
            f"{trainer.resize_timeout_s:g} s (trainer.resize_timeout_s)"
        )
    return placement, _start_workers(config, placement, group, run_dir, stop, say)


def _suits(config: Config, world_size: int) -> bool:
    """Whether the run can be done by so many workers."""
    try:
        check_world_size(config, world_size)
    except ConfigError:
        return False
    return True


def _start_workers(
    config: Config, placement: Placement, group: PlacementGroup, run_dir: Path, stop: Preemption, say: Callable[[str], None]
) -> RayWorkers:
    from agentlightning.workers.ray_backend import RayWorkers

    demand = placement.demand
    return RayWorkers(
        placement.world_size,
        demand.gpus,
        demand.cpus,
        run_dir / "logs",
        stop,
        group=(demand, group),
        timeout_s=config.trainer.worker_timeout_s,
        say=say,
    )


def load_workers(
    config: Config, placement: Placement, workers: RayWorkers | None, total_steps: int, witness: Path, stop: Preemption
) -> WorkerGroup:
    """Load the model on the placed workers. `witness` is a file in the run directory, by which they find it."""
    from agentlightning.workers.group import InProcess, WorkerGroup

    settings = worker_settings(config, placement, total_steps)
    if workers is None:
        group = WorkerGroup(InProcess(settings, stop.check), settings.logical_shards)
    else:
        workers.build(settings)
        group = WorkerGroup(workers, settings.logical_shards, decode_by_shard=not settings.decodes_steadily)
    group.choose_writers(witness)
    return group


def worker_settings(config: Config, placement: Placement, total_steps: int) -> WorkerSettings:
    """What every worker is told."""
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    if model.quantization is not None and placement.device == "cpu":
        raise ConfigError(
            f"actor_rollout_ref.model.quantization: given {model.quantization} and no GPU, expected one; "
            "mend it with actor_rollout_ref.model.quantization=null"
        )
    start = model.lora_adapter_path
    return WorkerSettings(
        model_path=model.path,
        dtype=model.dtype,
        device=placement.device,
        gradient_checkpointing=model.enable_gradient_checkpointing,
        lora=_lora_shape(config, model.lora_rank, model.lora_alpha),
        seed=config.trainer.seed,
        num_threads=placement.num_threads,
        actor=_actor_settings(config, total_steps),
        rollout=RolloutSettings(
            max_num_seqs=rollout.max_num_seqs,
            merge_lora=None if rollout.merge_lora == "auto" else rollout.merge_lora,
            tool=rollout.multi_turn.tool if rollout.multi_turn.enable else None,
        ),
        critic=_critic_settings(config, total_steps) if config.uses_critic else None,
        tokenizer_path=model.tokenizer_path,
        trust_remote_code=model.trust_remote_code,
        override_config=model.override_config,
        quantization=model.quantization,
        logical_shards=logical_shards(config),
        longest=config.data.max_prompt_length + config.data.max_response_length,
        sharded_base=config.actor_rollout_ref.actor.strategy == "fsdp2" and placement.world_size > 1,
        lora_adapter_path=str(Path(start).expanduser().resolve()) if start is not None else None,
    )


def _lora_shape(config: Config, rank: int, alpha: int) -> LoraShape:
    """An adapter of this rank; actor and critic share the rest."""
    model = config.actor_rollout_ref.model
    return LoraShape(rank, alpha, model.target_modules, model.exclude_modules, model.use_rslora, model.use_dora)


def _actor_settings(config: Config, total_steps: int) -> ActorSettings:
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    return ActorSettings(
        optim=_actor_optim(config, total_steps),
        micro_batch=_micro_batch(config, actor.ppo_micro_batch_size_per_gpu),
        log_prob_micro_batch=_micro_batch(config, rollout.log_prob_micro_batch_size_per_gpu),
        ref_micro_batch=_micro_batch(config, config.actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu),
        temperature=rollout.temperature,
        clip_ratio_low=actor.clip_ratio_low,
        clip_ratio_high=actor.clip_ratio_high,
        clip_ratio_c=actor.clip_ratio_c,
        loss_agg_mode=actor.loss_agg_mode,
        **actor.policy_loss.model_dump(),
        seed=config.trainer.seed,
        entropy_coeff=actor.entropy_coeff,
        kl_loss_coef=actor.kl_loss_coef if actor.use_kl_loss else 0.0,
        kl_loss_type=actor.kl_loss_type,
    )


def _actor_optim(config: Config, total_steps: int) -> OptimSettings:
    """Counted in training steps, of which the actor sits out those of the critic's warm-up."""
    actor, idle_steps = config.actor_rollout_ref.actor, config.trainer.critic_warmup
    optim = actor.optim
    steps = max(0, total_steps - idle_steps)
    return OptimSettings(
        lr=optim.lr,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        grad_clip=actor.grad_clip,
        warmup_steps=optim.lr_warmup_steps if optim.lr_warmup_steps >= 0 else int(optim.lr_warmup_steps_ratio * steps),
        scheduler=optim.lr_scheduler_type,
        min_lr_ratio=optim.min_lr_ratio,
        total_steps=total_steps,
        idle_steps=idle_steps,
    )


def _critic_settings(config: Config, total_steps: int) -> CriticSettings:
    critic = config.critic
    return CriticSettings(
        kind=critic.kind,
        lora=_lora_shape(config, critic.model.lora_rank, critic.model.lora_alpha),
        optim=OptimSettings(
            lr=critic.optim.lr,
            betas=critic.optim.betas,
            weight_decay=critic.optim.weight_decay,
            grad_clip=critic.grad_clip,
            total_steps=total_steps,
        ),
        micro_batch=_micro_batch(config, critic.ppo_micro_batch_size_per_gpu),
        cliprange_value=critic.cliprange_value,
        loss_agg_mode=critic.loss_agg_mode,
    )


def _micro_batch(config: Config, rows: int) -> MicroBatches:
    actor = config.actor_rollout_ref.actor
    return MicroBatches(rows, actor.ppo_max_token_len_per_gpu if actor.use_dynamic_bsz else None)
