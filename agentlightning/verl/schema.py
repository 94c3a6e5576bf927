"""The shape of a run's configuration: one frozen pydantic model for each section of configs/trainer.yaml.

Plain values go in (what hydra composed, lists turned into tuples), a `Config` comes out, or pydantic's errors, which config.py
words for people. It exists so that the rest of the package reads typed attributes. No field has a default here: the YAML files
are the one place where defaults live. Types are strict: `"3"` is not a number and `true` is not 1.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from agentlightning.types import SamplingParams

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
EveryOrNever = Annotated[int, Field(ge=-1)]  # -1 never; rules.py refuses 0
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
WhatIsThere = Annotated[Count | None, BeforeValidator(lambda given: None if given == "auto" else given)]  # auto is null
Beta = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, StringConstraints(min_length=1)]
Texts = Annotated[tuple[Text, ...], Field(min_length=1)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
LossAggMode = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KLKind = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]
KLLossKind = Literal[
    "kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "kl+", "k1+", "abs+", "mse+", "k2+", "low_var_kl+", "k3+"
]


class Section(BaseModel):
    """A part of the tree: frozen, strict, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class DataConfig(Section):
    """`data`: where the prompts come from, how many a step, how long."""

    train_files: Text | Texts
    val_files: Text | Texts | None
    train_batch_size: Count  # prompts a step
    val_batch_size: Count | None  # prompts at a time; None = all
    max_prompt_length: Count  # tokens
    max_response_length: Count  # tokens, observations included
    prompt_key: Text
    reward_fn_key: Text
    shuffle: bool
    seed: Natural
    filter_overlong_prompts: bool
    truncation: Literal["error", "left", "right"]
    train_max_samples: Count | None
    mixture: dict[str, NonNegative]
    sampler: FunctionName | None


class ModelConfig(Section):
    """`actor_rollout_ref.model`: the frozen base and the adapter on it."""

    path: Text
    dtype: Literal["auto", "float32", "bfloat16"]
    lora_rank: Count
    lora_alpha: Count
    target_modules: Text | Texts
    exclude_modules: Text | Texts | None
    use_rslora: bool
    use_dora: bool
    lora_adapter_path: Text | None
    quantization: Literal["4bit"] | None
    tokenizer_path: Text
    trust_remote_code: bool
    override_config: dict[str, Any]
    enable_gradient_checkpointing: bool


class ActorOptimConfig(Section):
    """`actor_rollout_ref.actor.optim`: AdamW and its schedule, counted in training steps."""

    lr: Positive
    lr_warmup_steps: Annotated[int, Field(ge=-1)]  # -1: lr_warmup_steps_ratio of all steps
    lr_warmup_steps_ratio: Fraction
    weight_decay: NonNegative
    betas: tuple[Beta, Beta]
    lr_scheduler_type: Literal["constant", "cosine", "linear", "inverse_sqrt", "wsd"]
    min_lr_ratio: Fraction


class PolicyLossConfig(Section):
    """`actor_rollout_ref.actor.policy_loss`: which loss, and the constants of those that have any."""

    loss_mode: (
        Literal["vanilla", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "cispo", "per_rollout_mean"] | FunctionName
    )
    clip_cov_ratio: Fraction
    clip_cov_lb: float
    clip_cov_ub: float
    kl_cov_ratio: Fraction
    ppo_kl_coef: NonNegative
    tau_pos: Positive
    tau_neg: Positive


class ActorConfig(Section):
    """`actor_rollout_ref.actor`: the policy's loss and its batches."""

    strategy: Literal["replicated", "fsdp2"]  # of the frozen base
    ppo_mini_batch_size: Count  # prompts an optimizer step
    ppo_micro_batch_size_per_gpu: Count  # samples
    use_dynamic_bsz: bool
    ppo_max_token_len_per_gpu: Count  # tokens
    clip_ratio: NonNegative
    clip_ratio_low: Fraction
    clip_ratio_high: NonNegative
    clip_ratio_c: Annotated[float, Field(gt=1, allow_inf_nan=False)]
    policy_loss: PolicyLossConfig
    loss_agg_mode: LossAggMode
    entropy_coeff: Annotated[float, Field(allow_inf_nan=False)]
    use_kl_loss: bool
    kl_loss_coef: NonNegative
    kl_loss_type: KLLossKind
    ppo_epochs: Count
    shuffle: bool
    grad_clip: Positive
    optim: ActorOptimConfig


class MultiTurnConfig(Section):
    """`actor_rollout_ref.rollout.multi_turn`: turns with a tool between them."""

    enable: bool
    tool: FunctionName | None
    max_assistant_turns: Count
    max_tokens_per_turn: Count | None


class ValKwargs(Section):
    """`actor_rollout_ref.rollout.val_kwargs`: how validation samples."""

    n: Count
    do_sample: bool
    temperature: Positive
    top_k: EveryOrNever
    top_p: Share


class RolloutConfig(Section):
    """`actor_rollout_ref.rollout`: how completions are sampled."""

    n: Count
    temperature: Positive
    top_k: EveryOrNever
    top_p: Share
    stop: tuple[Text, ...]
    max_num_seqs: Count
    journal: Literal["whole", "each", "off"]
    merge_lora: Literal["auto", True, False]
    log_prob_micro_batch_size_per_gpu: Count
    multi_turn: MultiTurnConfig
    val_kwargs: ValKwargs


class RefConfig(Section):
    """`actor_rollout_ref.ref`: the base with its adapters off."""

    log_prob_micro_batch_size_per_gpu: Count


class ActorRolloutRefConfig(Section):
    """`actor_rollout_ref`: everything that shares the one frozen base."""

    model: ModelConfig
    actor: ActorConfig
    rollout: RolloutConfig
    ref: RefConfig


class CriticOptimConfig(Section):
    """`critic.optim`: AdamW at a constant rate."""

    lr: Positive
    weight_decay: NonNegative
    betas: tuple[Beta, Beta]


class CriticModelConfig(Section):
    """`critic.model`: the critic's own adapter, where `critic.kind=adapter`."""

    lora_rank: Count
    lora_alpha: Count


class CriticConfig(Section):
    """`critic`: the value function of `algorithm.adv_estimator=gae`."""

    kind: Literal["adapter", "head"]
    ppo_mini_batch_size: Count  # prompts
    ppo_micro_batch_size_per_gpu: Count  # samples
    ppo_epochs: Count
    cliprange_value: Positive
    grad_clip: Positive
    loss_agg_mode: LossAggMode
    optim: CriticOptimConfig
    model: CriticModelConfig


class RewardFunctionConfig(Section):
    """`custom_reward_function`: a function in a file (`path`), or `pkg.mod:fn` in `name`."""

    path: Text | None
    name: Text


class WeightedReward(RewardFunctionConfig):
    """One of `reward.functions`."""

    path: Text | None = None
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0


class OverlongBufferConfig(Section):
    """`reward.overlong_buffer`: DAPO's soft punishment of long answers."""

    enable: bool
    len: Count  # tokens
    penalty_factor: NonNegative


class RewardConfig(Section):
    """`reward`: how reward functions are called, and what becomes of a sample without a reward."""

    functions: dict[Text, WeightedReward]
    num_workers: Count
    timeout_s: Positive | None
    retries: Natural
    on_error: Literal["stop", "zero", "mask"]
    overlong_buffer: OverlongBufferConfig


class FilterGroupsConfig(Section):
    """`algorithm.filter_groups`: DAPO's dynamic sampling."""

    enable: bool
    metric: Text
    max_num_gen_batches: Natural  # 0: no limit


class RolloutCorrectionConfig(Section):
    """`algorithm.rollout_correction`: importance weights and rejection between the rollout's policy and the trained one."""

    rollout_is: Literal["token", "sequence"] | None
    rollout_is_threshold: Positive
    rollout_is_batch_normalize: bool
    rollout_rs: Literal["token", "sequence", "geometric"] | None
    rollout_rs_threshold: Positive
    rollout_rs_threshold_lower: Positive | None
    bypass_mode: bool


class KLCtrlConfig(Section):
    """`algorithm.kl_ctrl`: the coefficient of the KL in the reward."""

    type: Literal["fixed", "adaptive"]
    kl_coef: NonNegative
    horizon: Positive
    target_kl: Positive


class AlgorithmConfig(Section):
    """`algorithm`: how rewards become advantages."""

    adv_estimator: (
        Literal[
            "gae",
            "grpo",
            "grpo_passk",
            "gdpo",
            "rloo",
            "remax",
            "opo",
            "gpg",
            "reinforce_plus_plus",
            "reinforce_plus_plus_baseline",
            "optimal_token_baseline",
        ]
        | FunctionName
    )
    gamma: Fraction
    lam: Fraction
    norm_adv_by_std_in_grpo: bool
    overlong_filtering: bool
    filter_groups: FilterGroupsConfig
    rollout_correction: RolloutCorrectionConfig
    use_kl_in_reward: bool
    kl_penalty: KLKind
    kl_ctrl: KLCtrlConfig


class TrainerConfig(Section):
    """`trainer`: how long, where, how often."""

    total_epochs: Count
    total_training_steps: Count | None
    project_name: Text
    experiment_name: Text
    default_local_dir: Text
    logger: tuple[Literal["console", "wandb", "tensorboard", "mlflow"], ...]
    log_val_generations: Natural
    rollout_data_dir: Text | None
    log_rollout_freq: Natural
    nnodes: Count
    n_gpus_per_node: WhatIsThere
    exact_elastic: bool
    logical_shards: Count | None
    device: Literal["auto", "cpu", "cuda"]
    backend: Literal["ray", "inprocess"]
    num_threads: Count | None
    seed: Natural
    save_freq: EveryOrNever | Literal["auto"]
    test_freq: EveryOrNever
    val_only: bool
    val_before_train: bool
    critic_warmup: Natural
    resume_mode: Literal["auto", "disable", "resume_path"]
    resume_from_path: Text | Natural | None
    max_actor_ckpt_to_keep: Count | None
    keep_best_by: Text | None
    keep_every: Count | None
    checkpoint_digest: Literal["xxh3_128", "sha256"]
    staging_dir: Text | None
    max_run_seconds: Positive | None
    must_save_by: Text | Positive | None  # ISO 8601, or seconds since the epoch
    max_restarts: Natural
    worker_timeout_s: Positive
    resize_timeout_s: NonNegative
    resources_timeout_s: Positive | None


class RayKwargs(Section):
    """`ray_kwargs`: what is handed to Ray as it is."""

    ray_init: dict[str, Any]


class Config(Section):
    """A whole, checked run configuration."""

    data: DataConfig
    actor_rollout_ref: ActorRolloutRefConfig
    critic: CriticConfig
    custom_reward_function: RewardFunctionConfig
    reward: RewardConfig
    algorithm: AlgorithmConfig
    trainer: TrainerConfig
    ray_kwargs: RayKwargs

    @property
    def uses_critic(self) -> bool:
        """Whether a value function is trained."""
        return self.algorithm.adv_estimator == "gae"

    @property
    def uses_reference(self) -> bool:
        """Whether the log-probabilities of the base are needed."""
        return self.algorithm.use_kl_in_reward or self.actor_rollout_ref.actor.use_kl_loss

    def train_sampling(self) -> SamplingParams:
        """How the training rollouts are drawn."""
        rollout = self.actor_rollout_ref.rollout
        return self._sampling(rollout.n, rollout.temperature, rollout.top_k, rollout.top_p)

    def val_sampling(self) -> SamplingParams:
        """How validation rollouts are drawn; greedy unless `val_kwargs.do_sample`."""
        val = self.actor_rollout_ref.rollout.val_kwargs
        return self._sampling(val.n, val.temperature if val.do_sample else 0.0, val.top_k, val.top_p)

    def _sampling(self, n: int, temperature: float, top_k: int, top_p: float) -> SamplingParams:
        rollout = self.actor_rollout_ref.rollout
        turns = rollout.multi_turn
        return SamplingParams(
            n=n,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_tokens=self.data.max_response_length,
            stop=rollout.stop,
            max_assistant_turns=turns.max_assistant_turns if turns.enable else 1,
            max_tokens_per_turn=turns.max_tokens_per_turn if turns.enable else None,
        )
