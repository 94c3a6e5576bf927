"""One worker: a frozen base with its adapters, the engine that samples from it, and the losses that train it.

A plain class: the group runs it in this process (breakpoints work) or as a Ray actor, and both give the same bits. Everything
that enters or leaves is numpy, so that a call costs no more than its bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from agentlightning.checkpoint.manifest import FileEntry
from agentlightning.checkpoint.snapshot import HostSnapshot
from agentlightning.errors import ConfigError, StaleAdapterError, UserError
from agentlightning.models.adapters import Adapters, MergedCopy
from agentlightning.models.base import dtype_name, load_base, load_model_config, resolve_dtype
from agentlightning.models.chat import ChatRenderer, check_vocabulary, load_tokenizer
from agentlightning.rollout.engine import DecodeLoop, Engine, Tool
from agentlightning.rollout.journal import RolloutJournal, adapter_digest, tool_digest
from agentlightning.rollout.steady import SteadyLoop
from agentlightning.types import Batch, Completion, JournalSpec, LoraShape, Prompt, SamplingParams
from agentlightning.workers.actor import Actor
from agentlightning.workers.critic import Critic
from agentlightning.workers.fsdp import ShardedBase
from agentlightning.workers.messages import ActorUpdate, AdapterState, LogProbs, MiniBatch, Shard, WorkerState
from agentlightning.workers.optimizer import load_weights
from agentlightning.workers.preflight import available_memory, check_memory, estimate_memory, model_sizes
from agentlightning.workers.settings import WorkerSettings
from agentlightning.workers.shards import ADAPTER_FILE, StateTensors, share_of_state


def _nobody_asks() -> None:
    """Nobody asks this worker to stop in the middle of a call."""


class Worker:
    """Built from its settings alone; `rank` and `world_size` matter only to `connect`."""

    def __init__(self, settings: WorkerSettings, check: Callable[[], None] = _nobody_asks) -> None:
        """`check` is called between tokens and micro-batches; what it raises ends the call."""
        torch.set_num_threads(settings.num_threads)
        self.settings = settings
        self.device = torch.device(settings.device)
        self._memory_warning = self._look_at_memory()
        # A base that is to be sharded may not fit the device: its layers go there one by one, when the workers are connected.
        where = torch.device("cpu") if settings.sharded_base else self.device
        base = load_base(
            settings.model_path,
            dtype_name(settings.dtype, self.device),
            where,
            settings.gradient_checkpointing,
            trust_remote_code=settings.trust_remote_code,
            override_config=settings.override_config,
            quantization=settings.quantization,
        )
        tokenizer = load_tokenizer(settings.tokenizer_path or settings.model_path, settings.trust_remote_code)
        check_vocabulary(tokenizer, base.config.get_text_config().vocab_size)
        plain = MergedCopy.plain_copy(base) if self._may_merge(base) else None
        starts = {Actor.name: settings.lora_adapter_path} if settings.lora_adapter_path is not None else {}
        self.adapters = Adapters(base, self._lora_shapes(), settings.seed, starts)
        for parameters in self.adapters.parameters.values():
            for parameter in parameters.values():
                parameter.data = parameter.data.to(self.device)
        self.merged = self._merged(plain) if plain is not None else None
        self.sharded: ShardedBase | None = None
        self.actor = Actor(self.adapters, settings.actor, check, settings.logical_shards)
        self.critic = (
            Critic(self.adapters, settings.critic, check, settings.logical_shards) if settings.critic is not None else None
        )
        self.engine: Engine = (SteadyLoop if settings.decodes_steadily else DecodeLoop)(
            model=self.merged.model if self.merged is not None else self.adapters.base,
            renderer=ChatRenderer(tokenizer),
            max_num_seqs=settings.rollout.max_num_seqs,
            tool=load_tool(settings.rollout.tool) if settings.rollout.tool is not None else None,
            check=check,
        )
        self.snapshots = [HostSnapshot(), HostSnapshot()]
        self.version = 0
        self.update_weights(0)

    def connect(self, rank: int, world_size: int, address: str) -> None:
        """Join the other workers: gradients are summed over them from now on. `address` is `tcp://host:port` of rank 0."""
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=world_size)
        if self.settings.sharded_base:
            self.sharded = ShardedBase(self.adapters, self.device)
            self.actor.any_worker = self.sharded.any_worker
            if self.critic is not None:
                self.critic.any_worker = self.sharded.any_worker

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seed: int,
        step: int,
        version: int,
        journal: JournalSpec | None = None,
    ) -> list[Completion]:
        """Completions by adapter `version`. Raises `StaleAdapterError` if the engine holds another one."""
        if version != self.version:
            raise StaleAdapterError(f"asked for completions of adapter version {version}, but the engine holds {self.version}")
        self.adapters.use(Actor.name)
        with self.sharded.gathered() if self.sharded is not None else nullcontext():
            return self._generate(prompts, params, seed, step, version, journal)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seed: int,
        step: int,
        version: int,
        journal: JournalSpec | None,
    ) -> list[Completion]:
        if journal is None:
            return self.engine.generate(prompts, params, seed, step, version)
        identity = {
            "adapter": adapter_digest(self.actor.parameters),
            "adapter_version": version,
            "sampling": asdict(params),
            "seed": seed,
            "step": step,
            "tool": tool_digest(self.settings.rollout.tool),
        }
        with closing(RolloutJournal(journal, identity)) as opened:
            return self.engine.generate(prompts, params, seed, step, version, opened)

    def compute_log_prob(self, batch: Batch, with_squares: bool = False) -> LogProbs:
        """See `Actor.compute_log_prob`."""
        return self.actor.compute_log_prob(batch, with_squares)

    def compute_ref_log_prob(self, batch: Batch) -> LogProbs:
        """See `Actor.compute_ref_log_prob`."""
        return self.actor.compute_ref_log_prob(batch)

    def compute_values(self, batch: Batch) -> np.ndarray:
        """See `Critic.compute_values`."""
        return self._the_critic().compute_values(batch)

    def update_actor(self, batch: Batch, mini_batches: list[MiniBatch], training_step: int) -> ActorUpdate:
        """See `Actor.update`."""
        return self._update_actor_shards([Shard(batch, mini_batches)], training_step)[0]

    def update_critic(self, batch: Batch, mini_batches: list[MiniBatch], training_step: int) -> list[dict[str, float]]:
        """See `Critic.update`."""
        return self._update_critic_shards([Shard(batch, mini_batches)], training_step)[0]

    def each_shard(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers of `method` for each of this worker's logical shards; shards of an update share its optimizer steps."""
        updates = {"update_actor": self._update_actor_shards, "update_critic": self._update_critic_shards}
        if method not in updates:
            return [getattr(self, method)(*of_shard) for of_shard in arguments]
        training_step = arguments[0][2]
        return updates[method]([Shard(batch, mini_batches) for batch, mini_batches, _ in arguments], training_step)

    def _update_actor_shards(self, shards: list[Shard], training_step: int) -> list[ActorUpdate]:
        with self.actor.optimizer.undone_on_error(len(shards[0].mini_batches)):
            return self.actor.update_shards(shards, training_step)

    def _update_critic_shards(self, shards: list[Shard], training_step: int) -> list[list[dict[str, float]]]:
        critic = self._the_critic()
        with critic.optimizer.undone_on_error(len(shards[0].mini_batches)):
            return critic.update_shards(shards, training_step)

    def update_weights(self, version: int) -> tuple[float, float]:
        """The engine samples from the present adapter from now on, and calls it `version`.

        Returns the peak of allocated device memory and the present resident memory of this process, in GiB: a step asks for
        both here, since a further call to each of a thousand workers would cost the controller a tenth of a second.
        """
        import psutil

        if self.merged is not None:
            self.merged.refresh()
        self.version = version
        device = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        return device, psutil.Process().memory_info().rss / 2**30

    def sees(self, path: str, text: str) -> bool:
        """Whether the file at `path` is here too, with the same text: then this worker can write what the controller reads."""
        try:
            return Path(path).read_text(errors="replace") == text
        except OSError:
            return False

    def adapter_configs(self) -> dict[str, dict[str, Any]]:
        """PEFT's adapter_config.json of each adapter."""
        return {name: self.adapters.config_json(name) for name in self.adapters.parameters}

    def base_is_sharded(self) -> bool:
        """Whether a layer of the base holds but its part of the weights."""
        return self.sharded is not None and self.sharded.holds_a_part()

    def state_bytes(self) -> int:
        """Of a whole checkpoint, once every optimizer has stepped."""
        optimizers = [self.actor.optimizer, *([self.critic.optimizer] if self.critic is not None else [])]
        numbers = sum(parameter.numel() for optimizer in optimizers for parameter in optimizer.parameters.values())
        return 3 * 4 * numbers  # float32: the parameter and its two moments

    def snapshot(self, buffer: int, writer: int, writers: int) -> int:
        """Copy this worker's share of the state into host buffer `buffer`; returns its bytes."""
        snapshot = self.snapshots[buffer]
        snapshot.copy_from(share_of_state(self._state_tensors(), writer, writers))
        return snapshot.bytes

    def write_snapshot(self, buffer: int, staging: str, algorithm: str) -> dict[str, FileEntry]:
        """Write what `snapshot` copied, durably. May run in another thread than everything else."""
        return self.snapshots[buffer].write(Path(staging), algorithm)

    def _state_tensors(self) -> StateTensors:
        adapters: dict[str, Mapping[str, torch.Tensor]] = {f"actor/{ADAPTER_FILE}": self.actor.parameters}
        optimizers = {"actor": self.actor.optimizer.tensors()}
        if self.critic is not None:
            adapters["critic/value_head.safetensors"] = self.critic.head_parameters
            if self.critic.adapter_parameters:
                adapters[f"critic/{ADAPTER_FILE}"] = self.critic.adapter_parameters
            optimizers["critic"] = self.critic.optimizer.tensors()
        return StateTensors(adapters, optimizers)

    def state(self) -> WorkerState:
        """What a checkpoint keeps, as a copy."""
        actor = AdapterState(
            self.adapters.config_json(Actor.name), _arrays(self.actor.parameters), self.actor.optimizer.state()
        )
        if self.critic is None:
            return WorkerState(self.version, actor)
        config = self.adapters.config_json(Critic.name) if self.critic.adapter_parameters else {}
        critic = AdapterState(config, _arrays(self.critic.adapter_parameters), self.critic.optimizer.state())
        return WorkerState(self.version, actor, critic, _arrays(self.critic.head_parameters))

    def load_state(self, state: WorkerState) -> None:
        """Go on from `state`. Raises `CheckpointError` if it is of other shapes."""
        load_weights(self.actor.parameters, state.actor.weights, "actor")
        self.actor.optimizer.load_state(state.actor.optimizer)
        if self.critic is not None and state.critic is not None and state.value_head is not None:
            load_weights(self.critic.adapter_parameters, state.critic.weights, "critic")
            load_weights(self.critic.head_parameters, state.value_head, "value head")
            self.critic.optimizer.load_state(state.critic.optimizer)
        self.update_weights(state.version)

    def memory_warning(self) -> str | None:
        """What there was to say, before the base was loaded, about a step that may not fit; None where it will."""
        return self._memory_warning

    def _look_at_memory(self) -> str | None:
        """Raise `UserError` where a step cannot fit, before the base is loaded; a warning where it will be tight."""
        settings = self.settings
        config = load_model_config(settings.model_path, settings.trust_remote_code, settings.override_config)
        sizes = model_sizes(config.get_text_config().to_dict())
        if settings.longest is None or sizes is None:
            return None
        dtype = resolve_dtype(settings.dtype, self.device)
        plain = dtype == torch.float32 and settings.quantization is None and not settings.sharded_base
        merged = plain if settings.rollout.merge_lora is None else settings.rollout.merge_lora
        estimate = estimate_memory(sizes, settings, dtype, settings.longest, merged)
        return check_memory(estimate, available_memory(self.device), settings)

    def _may_merge(self, base: PreTrainedModel) -> bool:
        """Whether the rollout is to decode on merged weights; by default where that is exact enough, and the base whole."""
        if self.settings.sharded_base:
            return False
        asked = self.settings.rollout.merge_lora
        return base.dtype == torch.float32 and self.settings.quantization is None if asked is None else asked

    def _merged(self, plain: PreTrainedModel) -> MergedCopy | None:
        """`plain` with the actor merged in, or None where it cannot be and nobody insists."""
        stays_apart = self.adapters.unmergeable(Actor.name)
        if stays_apart is None:
            return MergedCopy(plain, self.adapters, Actor.name)
        if self.settings.rollout.merge_lora is None:
            return None
        raise UserError(
            f"actor_rollout_ref.rollout.merge_lora: given true, but the adapter on {stays_apart} cannot be merged (only plain "
            "linear layers can); mend it with actor_rollout_ref.rollout.merge_lora=auto"
        )

    def _lora_shapes(self) -> dict[str, LoraShape]:
        critic = self.settings.critic
        shapes = {Actor.name: self.settings.lora}
        return shapes | {Critic.name: critic.lora} if critic is not None and critic.kind == "adapter" else shapes

    def _the_critic(self) -> Critic:
        assert self.critic is not None, "this run has no critic"
        return self.critic


def load_tool(spec: str) -> Tool:
    """The tool at `pkg.mod:fn`. Raises `ConfigError` if there is none."""
    module_name, _, function_name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"no tool at {spec!r}: {error}; expected an importable function pkg.mod:fn(text, extra_info) -> str | None: "
            "actor_rollout_ref.rollout.multi_turn.tool=my_package.my_module:my_tool"
        ) from error


def _arrays(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, np.ndarray]:
    return {name: parameter.detach().cpu().numpy().copy() for name, parameter in parameters.items()}
