"""From completions to the batch that is trained on, and from the batch to optimizer steps.

Enters: prompts, their completions, scores. Leaves: a padded `Batch` with verl's columns, and the rows of each optimizer step.
All of it is a pure function of its arguments: nothing here has to be saved for a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from agentlightning.algorithms import overlong
from agentlightning.algorithms.aggregation import global_denominators
from agentlightning.algorithms.correction import KEY as CORRECTION_KEY
from agentlightning.algorithms.correction import CorrectionSettings, rollout_correction
from agentlightning.algorithms.filter_groups import informative_groups
from agentlightning.algorithms.kl import AdaptiveKLController, FixedKLController, apply_kl_penalty
from agentlightning.errors import ConfigError, RewardError
from agentlightning.types import Batch, Completion, Prompt
from agentlightning.verl.estimators import ESTIMATORS, KEY, EstimatorInputs, RewardDetails, estimate, load_estimator
from agentlightning.verl.metrics import ROWS_AT_A_TIME
from agentlightning.verl.schema import AlgorithmConfig, Config, OverlongBufferConfig, RolloutCorrectionConfig
from agentlightning.workers.messages import MiniBatch

_VERL_METRICS = ("seq_reward", "seq_final_reward")  # of algorithm.filter_groups
KLController = FixedKLController | AdaptiveKLController


@dataclass(frozen=True, slots=True)
class MiniBatchPlan:
    """How the rows of a step become optimizer steps."""

    prompts_per_mini_batch: int
    samples_per_prompt: int
    epochs: int
    shuffle: bool
    seq_norm: float  # the constant of loss_agg_mode=seq-mean-token-sum-norm: the response length allowed

    def mini_batches(self, batch: Batch, seed: int, step: int) -> list[MiniBatch]:
        """Rows of each optimizer step: whole prompts; with `shuffle` in another order each epoch, drawn from (seed, step)."""
        prompts = len(batch) // self.samples_per_prompt
        rows_of_prompt = np.arange(len(batch)).reshape(prompts, self.samples_per_prompt)
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64)))
        plan: list[MiniBatch] = []
        for _ in range(self.epochs):
            order = rng.permutation(prompts) if self.shuffle else np.arange(prompts)
            for start in range(0, prompts, self.prompts_per_mini_batch):
                rows = rows_of_prompt[order[start : start + self.prompts_per_mini_batch]].ravel()
                denominators = global_denominators(torch.from_numpy(batch.mask_BT[rows]), self.seq_norm)
                plan.append(MiniBatch(rows, denominators))
        return plan


def make_batch(prompts: Sequence[Prompt], completions: Sequence[Completion], scores_B: np.ndarray) -> Batch:
    """The step's samples, with `rollout_log_probs` and with the score on the last token of each response
    (`token_level_scores`)."""
    # Once a prompt, not for each sample.
    prompt_ids = {prompt.uid: np.array(prompt.token_ids, dtype=np.int32) for prompt in prompts}
    place_of = {uid: place for place, uid in enumerate(prompt_ids)}
    prompt_B = np.array([place_of[completion.uid] for completion in completions], dtype=np.int64)
    prompt_len_U = np.array([len(ids) for ids in prompt_ids.values()], dtype=np.int32)
    prompt_len_B = prompt_len_U[prompt_B]
    response_len_B = np.array([len(completion.token_ids) for completion in completions], dtype=np.int32)
    scores_BT = np.zeros((len(completions), int(response_len_B.max())), dtype=np.float32)
    scores_BT[np.arange(len(completions)), response_len_B - 1] = scores_B
    batch = Batch(
        uids=tuple(completion.uid for completion in completions),
        prompt_BP=_pad(list(prompt_ids.values()), np.int32)[prompt_B, : prompt_len_B.max()],
        prompt_len_B=prompt_len_B,
        response_BT=_pad([completion.token_ids for completion in completions], np.int32),
        response_len_B=response_len_B,
        mask_BT=_pad([completion.mask for completion in completions], np.bool_),
        adapter_version=completions[0].adapter_version,
    )
    log_probs_BT = _pad([completion.logprobs for completion in completions], np.float32)
    return batch.with_columns(rollout_log_probs=log_probs_BT, token_level_scores=scores_BT)


def with_advantages(
    batch: Batch, config: AlgorithmConfig, kl_controller: KLController, details: RewardDetails | None = None
) -> tuple[Batch, dict[str, float]]:
    """The columns `token_level_rewards`, `advantages` and `returns`; updates the KL controller where KL is in the reward.

    Samples without a reward (`details.scored_B`) get zeros and are no part of any statistic. Raises what `estimate` raises.
    """
    details = details or RewardDetails()
    columns = {name: torch.from_numpy(column) for name, column in batch.columns.items()}
    mask_BT = torch.from_numpy(batch.mask_BT)
    rewards_BT = columns["token_level_scores"]
    metrics: dict[str, float] = {}
    if config.use_kl_in_reward:
        rewards_BT, kl = apply_kl_penalty(
            rewards_BT, columns["old_log_probs"], columns["ref_log_prob"], mask_BT, kl_controller.value, config.kl_penalty
        )
        live = int(batch.mask_BT.any(axis=1).sum())
        kl *= len(batch) / max(live, 1)  # a mean over those samples that are trained on: the others have no KL
        metrics = {"actor/reward_kl_penalty": kl, "actor/reward_kl_penalty_coeff": kl_controller.value}
        kl_controller.update(kl, live)
    rows = slice(None) if details.scored_B is None else torch.from_numpy(details.scored_B)
    inputs = EstimatorInputs(
        config=config,
        rewards_BT=rewards_BT[rows],
        mask_BT=mask_BT[rows],
        group_B=_group_ids(batch.uids)[rows],
        columns={name: column_BT[rows] for name, column_BT in columns.items()},
        details=details.tensors(rows),
    )
    advantages_BT, returns_BT = (part_BT.float().contiguous() for part_BT in estimate(inputs))
    if details.scored_B is not None:
        same = returns_BT is advantages_BT
        advantages_BT = _spread(advantages_BT, rows, rewards_BT)
        returns_BT = advantages_BT if same else _spread(returns_BT, rows, rewards_BT)
    advantages = advantages_BT.numpy()
    # The same array under both names where they are the same numbers: who looks at both need look but once.
    batch = batch.with_columns(
        token_level_rewards=rewards_BT.numpy() if config.use_kl_in_reward else batch.columns["token_level_scores"],
        advantages=advantages,
        returns=advantages if returns_BT is advantages_BT else returns_BT.numpy(),
    )
    return batch, metrics


def _spread(part_BT: Tensor, rows: slice | Tensor, like_BT: Tensor) -> Tensor:
    """The rows in their places, zeros elsewhere."""
    whole_BT = torch.zeros_like(like_BT)
    whole_BT[rows] = part_BT
    return whole_BT


def check_algorithm(config: Config) -> None:
    """Raise `ConfigError` for what `algorithm` and `reward` ask for and no step could do, before anything is loaded."""
    algorithm, key = config.algorithm, KEY
    if algorithm.adv_estimator not in ESTIMATORS:
        load_estimator(algorithm.adv_estimator)
    correction_settings(algorithm.rollout_correction)
    correction = algorithm.rollout_correction
    if algorithm.adv_estimator == "gdpo" and algorithm.use_kl_in_reward:
        raise ConfigError(
            f"{key}: given gdpo, which looks at the reward functions one by one and not at algorithm.use_kl_in_reward=true; "
            "mend it with actor_rollout_ref.actor.use_kl_loss=true algorithm.use_kl_in_reward=false"
        )
    if algorithm.adv_estimator == "optimal_token_baseline" and correction.bypass_mode:
        raise ConfigError(
            f"{key}: given optimal_token_baseline, which needs the probabilities of the old_log_prob pass, with "
            f"{CORRECTION_KEY}.bypass_mode=true, which leaves it out; mend it with {CORRECTION_KEY}.bypass_mode=false"
        )
    if correction.bypass_mode and (correction.rollout_is is not None or correction.rollout_rs is not None):
        raise ConfigError(
            f"{CORRECTION_KEY}.bypass_mode: given true, which takes the rollout's log-probs for the old ones; then every ratio "
            f"is 1, and rollout_is={correction.rollout_is} and rollout_rs={correction.rollout_rs} do nothing; mend it with "
            f"{CORRECTION_KEY}.bypass_mode=false"
        )
    _check_filter_groups(config)
    if config.reward.overlong_buffer.enable:
        overlong_penalties([], config.reward.overlong_buffer, config.data.max_response_length)


def _check_filter_groups(config: Config) -> None:
    settings, key, n = config.algorithm.filter_groups, "algorithm.filter_groups", config.actor_rollout_ref.rollout.n
    if settings.enable and n < 2:
        raise ConfigError(
            f"{key}.enable: given true with actor_rollout_ref.rollout.n={n}, expected at least 2 samples of a prompt, to be "
            f"compared; mend it with {key}.enable=false or actor_rollout_ref.rollout.n=8"
        )
    if settings.enable and settings.metric in _VERL_METRICS:
        raise ConfigError(
            f"{key}.metric: given verl's {settings.metric}, which holds the punishment of long answers (and the KL); expected "
            f"score, what the reward function says, or a number that it reports beside; mend it with {key}.metric=score"
        )


def correction_settings(config: RolloutCorrectionConfig) -> CorrectionSettings:
    """`algorithm.rollout_correction` as the algorithm takes it. Raises `ConfigError` for thresholds that do not fit."""
    try:
        return CorrectionSettings(**config.model_dump(exclude={"bypass_mode"}))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def with_rollout_correction(batch: Batch, config: AlgorithmConfig) -> tuple[Batch, dict[str, float]]:
    """The batch with the column `rollout_is_weights` and without what was rejected in its mask, and `rollout_corr/` metrics.

    Comes after the old_log_prob pass and before `with_advantages`. The mask itself becomes smaller, as verl's `response_mask`:
    the passes that follow, the losses and the counts that they are divided by then agree, and estimators step over a rejected
    token as over an observation; scores still count whole. Without the column `old_log_probs`, or in bypass mode, there is
    nothing to compare: the batch stays as it is.
    """
    settings = correction_settings(config.rollout_correction)
    wanted = settings.rollout_is is not None or settings.rollout_rs is not None
    if config.rollout_correction.bypass_mode or ("old_log_probs" not in batch.columns and not wanted):
        return batch, {}
    if "old_log_probs" not in batch.columns:
        raise ValueError(f"{CORRECTION_KEY} needs the column 'old_log_probs': the pass must run in every step")
    old_BT, rollout_BT = (torch.from_numpy(batch.columns[name]) for name in ("old_log_probs", "rollout_log_probs"))
    weights_BT, mask_BT, metrics = rollout_correction(old_BT, rollout_BT, torch.from_numpy(batch.mask_BT), settings)
    batch = replace(batch, mask_BT=mask_BT.numpy())
    return (batch if weights_BT is None else batch.with_columns(rollout_is_weights=weights_BT.numpy())), metrics


def truncated(completions: Sequence[Completion]) -> np.ndarray:
    """Which completions were cut at data.max_response_length, bool [B]."""
    return np.array([completion.stop_reason == "length" for completion in completions], dtype=np.bool_)


def without_samples(batch: Batch, left_out_B: np.ndarray) -> Batch:
    """The same rows, but nothing of the samples in `left_out_B` (bool) is trained on: their mask is all false."""
    mask_BT = overlong.without_samples(torch.from_numpy(batch.mask_BT), torch.from_numpy(left_out_B))
    return replace(batch, mask_BT=mask_BT.numpy())


def overlong_penalties(completions: Sequence[Completion], buffer: OverlongBufferConfig, max_response_length: int) -> np.ndarray:
    """DAPO's punishment of long answers, float32 [B] in [-penalty_factor, 0], to be added to the scores; zeros if switched off.

    Raises `ConfigError` if the buffer is longer than a response may be.
    """
    length_B = torch.tensor([len(completion.token_ids) for completion in completions], dtype=torch.int64)
    if not buffer.enable:
        return np.zeros(len(completions), dtype=np.float32)
    try:
        penalty_B = overlong.soft_overlong_punishment(length_B, max_response_length, buffer.len, buffer.penalty_factor)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return penalty_B.numpy()


def informative_samples(uids: Sequence[str], metric_B: np.ndarray) -> np.ndarray:
    """Which samples belong to prompts whose samples differ in the metric, bool [B]: what dynamic sampling keeps.

    Raises `RewardError` if the metric is not a finite number for each sample.
    """
    try:
        return informative_groups(torch.from_numpy(np.asarray(metric_B)), _group_ids(uids)).numpy()
    except ValueError as error:
        raise RewardError(str(error)) from error


def _group_ids(uids: Sequence[str]) -> Tensor:
    """A number for each prompt, int64 [B]."""
    groups = {uid: group for group, uid in enumerate(dict.fromkeys(uids))}
    return torch.tensor([groups[uid] for uid in uids], dtype=torch.int64)


def rollout_probs_diff(batch: Batch, log_probs_BT: np.ndarray) -> dict[str, float]:
    """How far the rollout's probabilities of the sampled tokens are from the training pass's (NaN where it did not run)."""
    rollout_BT = batch.columns["rollout_log_probs"]
    parts = []
    for start in range(0, len(batch), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        known_BT = batch.mask_BT[rows] & np.isfinite(log_probs_BT[rows])
        parts.append(np.abs(np.exp(rollout_BT[rows][known_BT]) - np.exp(log_probs_BT[rows][known_BT])))
    difference = np.concatenate(parts)
    if not len(difference):
        return {}
    return {
        "training/rollout_probs_diff_max": float(difference.max()),
        "training/rollout_probs_diff_mean": float(difference.mean()),
        "training/rollout_probs_diff_std": float(difference.std()),
    }


def _pad(rows: Sequence[Sequence[float] | np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    """Rows of different lengths as one array [B, longest], zeros behind."""
    padded = np.zeros((len(rows), max(map(len, rows))), dtype=dtype)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded
