"""What a worker is told at birth: plain frozen values, so that it knows neither hydra nor the command line."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from agentlightning.algorithms.policy_losses.settings import PolicyLossSettings
from agentlightning.errors import ConfigError
from agentlightning.types import DType, LoraShape, MicroBatches, Quantization

if TYPE_CHECKING:
    from agentlightning.algorithms.policy_losses.inputs import PolicyLoss


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSettings(PolicyLossSettings):
    """The policy's loss; names as in verl's `actor_rollout_ref.actor`."""

    optim: OptimSettings
    micro_batch: MicroBatches
    log_prob_micro_batch: MicroBatches
    ref_micro_batch: MicroBatches
    temperature: float
    entropy_coeff: float
    kl_loss_coef: float  # 0: no KL term in the loss
    kl_loss_type: str
    seed: int = 0  # of the random choice of clip_cov


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
    logical_shards: int | None = None  # a power of two; None: one a worker, and the last bits hang on how many those are
    longest: int | None = None  # tokens of a sample, prompt and response; None: nobody looks whether it fits into memory
    sharded_base: bool = False  # the layers of the frozen base are spread over the workers (FSDP2)
    lora_adapter_path: str | None = None  # the actor starts from this adapter; the reference is the base without it

    @property
    def decodes_steadily(self) -> bool:
        """Whether a sample's bits do not hang on those decoded beside it (`workers.steady`); elsewhere shards go one by one."""
        return self.logical_shards is not None and self.device == "cpu" and self.num_threads == 1


def load_policy_loss(loss_mode: str) -> PolicyLoss:
    """The loss that `actor_rollout_ref.actor.policy_loss.loss_mode` names: a built-in one, or the user's own `pkg.mod:fn`.

    Raises `ConfigError` if it cannot be imported, or not be called with (inputs, settings).
    """
    from agentlightning.algorithms.policy_losses.names import POLICY_LOSSES  # torch comes with it

    if loss_mode in POLICY_LOSSES:
        return POLICY_LOSSES[loss_mode]
    module_name, _, name = loss_mode.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
        inspect.signature(function).bind("inputs", "settings")
    except (ImportError, SyntaxError, AttributeError, TypeError, ValueError) as error:
        key = "actor_rollout_ref.actor.policy_loss.loss_mode"
        raise ConfigError(
            f"{key}: no loss at {loss_mode!r}: {error}; expected one of {', '.join(POLICY_LOSSES)}, or an importable "
            f"pkg.mod:fn(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> (loss, metrics); mend it with {key}=vanilla"
        ) from error
    return function
