"""What a worker is told at birth: plain frozen values, so that it knows neither hydra nor the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from agentlightning.types import DType, LoraShape, MicroBatches, Quantization


@dataclass(frozen=True, slots=True)
class OptimSettings:
    """AdamW and its schedule, counted in training steps. The learning rate is a pure function of the step, so nothing of it has
    to be saved."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    grad_clip: float
    warmup_steps: int = 0
    scheduler: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = "constant"
    min_lr_ratio: float = 0.0
    total_steps: int = 1
    idle_steps: int = 0  # the first training steps, in which it does not learn: trainer.critic_warmup for the actor


@dataclass(frozen=True, slots=True)
class ActorSettings:
    """The policy's loss; names as in verl's `actor_rollout_ref.actor`."""

    optim: OptimSettings
    micro_batch: MicroBatches
    log_prob_micro_batch: MicroBatches
    ref_micro_batch: MicroBatches
    temperature: float
    clip_ratio_low: float
    clip_ratio_high: float
    clip_ratio_c: float
    loss_agg_mode: str
    entropy_coeff: float
    kl_loss_coef: float  # 0: no KL term in the loss
    kl_loss_type: str


@dataclass(frozen=True, slots=True)
class CriticSettings:
    """`kind="adapter"`: an adapter of its own with a value head; `kind="head"`: a head on the actor's detached states."""

    kind: Literal["adapter", "head"]
    lora: LoraShape
    optim: OptimSettings
    micro_batch: MicroBatches
    cliprange_value: float
    loss_agg_mode: str


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """The engine's; `merge_lora=None` merges where it is exact enough, which is in float32."""

    max_num_seqs: int
    merge_lora: bool | None = None
    tool: str | None = None  # "pkg.mod:fn"


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Everything, for every worker alike."""

    model_path: str
    dtype: DType
    device: Literal["cpu", "cuda"]
    gradient_checkpointing: bool
    lora: LoraShape
    seed: int
    num_threads: int
    actor: ActorSettings
    rollout: RolloutSettings
    critic: CriticSettings | None = None
    tokenizer_path: str | None = None  # None: the model's own
    trust_remote_code: bool = False
    override_config: Mapping[str, Any] = field(default_factory=dict)  # values of the model's own configuration
    quantization: Quantization | None = None
    lora_adapter_path: str | None = None  # the actor starts from this adapter; the reference is the base without it
