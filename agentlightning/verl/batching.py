"""From completions to the batch that is trained on, and from the batch to optimizer steps.

Enters: prompts, their completions, scores. Leaves: a padded `Batch` with verl's columns, and the rows of each optimizer step.
All of it is a pure function of its arguments: nothing here has to be saved for a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from agentlightning.algorithms import advantages
from agentlightning.algorithms.aggregation import global_denominators
from agentlightning.algorithms.kl import AdaptiveKLController, FixedKLController, apply_kl_penalty
from agentlightning.types import Batch, Completion, Prompt
from agentlightning.verl.schema import AlgorithmConfig
from agentlightning.workers.messages import MiniBatch

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
    by_uid = {prompt.uid: prompt for prompt in prompts}
    prompt_ids = [by_uid[completion.uid].token_ids for completion in completions]
    response_len_B = np.array([len(completion.token_ids) for completion in completions], dtype=np.int32)
    scores_BT = np.zeros((len(completions), int(response_len_B.max())), dtype=np.float32)
    scores_BT[np.arange(len(completions)), response_len_B - 1] = scores_B
    batch = Batch(
        uids=tuple(completion.uid for completion in completions),
        prompt_BP=_pad(prompt_ids, np.int32),
        prompt_len_B=np.array([len(ids) for ids in prompt_ids], dtype=np.int32),
        response_BT=_pad([completion.token_ids for completion in completions], np.int32),
        response_len_B=response_len_B,
        mask_BT=_pad([completion.mask for completion in completions], np.bool_),
        adapter_version=completions[0].adapter_version,
    )
    log_probs_BT = _pad([completion.logprobs for completion in completions], np.float32)
    return batch.with_columns(rollout_log_probs=log_probs_BT, token_level_scores=scores_BT)


def with_advantages(batch: Batch, config: AlgorithmConfig, kl_controller: KLController) -> tuple[Batch, dict[str, float]]:
    """The columns `token_level_rewards`, `advantages` and `returns`; updates the KL controller where KL is in the reward."""
    columns = {name: torch.from_numpy(column) for name, column in batch.columns.items()}
    mask_BT = torch.from_numpy(batch.mask_BT)
    rewards_BT = columns["token_level_scores"]
    metrics: dict[str, float] = {}
    if config.use_kl_in_reward:
        rewards_BT, kl = apply_kl_penalty(
            rewards_BT, columns["old_log_probs"], columns["ref_log_prob"], mask_BT, kl_controller.value, config.kl_penalty
        )
        metrics = {"actor/reward_kl_penalty": kl, "actor/reward_kl_penalty_coeff": kl_controller.value}
        kl_controller.update(kl, len(batch))
    if config.adv_estimator == "gae":
        advantages_BT, returns_BT = advantages.gae(rewards_BT, columns["values"], mask_BT, config.gamma, config.lam)
    else:
        groups = {uid: group for group, uid in enumerate(dict.fromkeys(batch.uids))}
        group_B = torch.tensor([groups[uid] for uid in batch.uids])
        if config.adv_estimator == "grpo":
            advantages_BT, returns_BT = advantages.grpo(rewards_BT, mask_BT, group_B, config.norm_adv_by_std_in_grpo)
        else:
            advantages_BT, returns_BT = advantages.rloo(rewards_BT, mask_BT, group_B)
    batch = batch.with_columns(
        token_level_rewards=rewards_BT.numpy(), advantages=advantages_BT.float().numpy(), returns=returns_BT.float().numpy()
    )
    return batch, metrics


def rollout_probs_diff(batch: Batch, log_probs_BT: np.ndarray) -> dict[str, float]:
    """How far the rollout's probabilities of the sampled tokens are from the training pass's (NaN where it did not run)."""
    known_BT = batch.mask_BT & np.isfinite(log_probs_BT)
    if not known_BT.any():
        return {}
    difference = np.abs(np.exp(batch.columns["rollout_log_probs"][known_BT]) - np.exp(log_probs_BT[known_BT]))
    return {
        "training/rollout_probs_diff_max": float(difference.max()),
        "training/rollout_probs_diff_mean": float(difference.mean()),
        "training/rollout_probs_diff_std": float(difference.std()),
    }


def _pad(rows: Sequence[Sequence[float] | np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    """Rows of different lengths as one array [B, longest], zeros behind."""
    padded = np.zeros((len(rows), max(len(row) for row in rows)), dtype=dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded
