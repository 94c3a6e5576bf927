"""How much better each token was than expected: rewards [B, T] go in, (advantages, returns) [B, T] leave.

Both are zero outside the mask. Every estimator counts the whole reward of a sample, wherever it lies: an environment may pay
on a token that the policy did not choose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.aggregation import masked_whiten


@torch.no_grad()
def gae(token_level_rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized Advantage Estimation (arXiv:1506.02438) over the tokens that the policy chose.

        delta_t = r_t + gamma * V(next) - V(t),      A_t = delta_t + gamma * lam * A(next)

    where "next" is the next chosen token: observations between the policy's turns are stepped over without discount, and what
    is paid on them goes to the chosen token before them. Returns are A + V; then the advantages are whitened over the batch.
    """
    chosen_BT = mask_BT.bool()
    owed_B = next_value_B = next_advantage_B = torch.zeros_like(token_level_rewards_BT[:, 0])
    advantages_BT = torch.zeros_like(token_level_rewards_BT)
    for t in reversed(range(token_level_rewards_BT.shape[1])):
        chosen_B, value_B = chosen_BT[:, t], values_BT[:, t]
        owed_B = owed_B + token_level_rewards_BT[:, t]
        delta_B = owed_B + gamma * next_value_B - value_B
        next_advantage_B = torch.where(chosen_B, delta_B + gamma * lam * next_advantage_B, next_advantage_B)
        next_value_B = torch.where(chosen_B, value_B, next_value_B)
        owed_B = torch.where(chosen_B, 0.0, owed_B)
        advantages_BT[:, t] = next_advantage_B
    returns_BT = torch.where(chosen_BT, advantages_BT + values_BT, 0.0)
    return masked_whiten(advantages_BT, mask_BT), returns_BT


@torch.no_grad()
def grpo(
    token_level_rewards_BT: Tensor,
    mask_BT: Tensor,
    group_B: Tensor,
    norm_adv_by_std_in_grpo: bool = True,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Group Relative Policy Optimization (arXiv:2402.03300): the score against the other samples of the same prompt.

        A_i = (R_i - mean(R)) / (std(R) + epsilon)

    `group_B` holds the int64 id of each sample's prompt, in any order; R is the sum of a sample's rewards, std is
    Bessel-corrected. Without the division (`norm_adv_by_std_in_grpo=False`) it is Dr.GRPO (arXiv:2503.20783). A group of one
    sample or of equal scores teaches nothing and gets exact zeros. Returns equal advantages.
    """
    score_B = token_level_rewards_BT.sum(dim=-1)
    index_B, count_G, mean_G = _group_means(score_B, group_B)
    advantage_B = score_B - mean_G[index_B]
    if norm_adv_by_std_in_grpo:
        square_sum_G = torch.zeros_like(mean_G).index_add(0, index_B, advantage_B.square())
        std_G = (square_sum_G / (count_G - 1).clamp(min=1)).sqrt()
        advantage_B = advantage_B / (std_G[index_B] + epsilon)
    return _to_tokens(advantage_B, score_B, index_B, mask_BT)


@torch.no_grad()
def rloo(token_level_rewards_BT: Tensor, mask_BT: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """REINFORCE Leave-One-Out (arXiv:2402.14740): the score less the mean of the other samples of the same prompt.

        A_i = R_i - sum_{j != i} R_j / (n - 1) = n / (n - 1) * (R_i - mean(R))

    `group_B` as for `grpo`. A group of one sample or of equal scores gets exact zeros. Returns equal advantages.
    """
    score_B = token_level_rewards_BT.sum(dim=-1)
    index_B, count_G, mean_G = _group_means(score_B, group_B)
    scale_G = count_G / (count_G - 1).clamp(min=1)
    return _to_tokens(scale_G[index_B] * (score_B - mean_G[index_B]), score_B, index_B, mask_BT)


def _group_means(score_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The place of each sample's group among G groups, and the size and mean score [G] of each."""
    _, index_B, count_G = torch.unique(group_B, return_inverse=True, return_counts=True)
    count_G = count_G.to(score_B.dtype)
    return index_B, count_G, score_B.new_zeros(len(count_G)).index_add(0, index_B, score_B) / count_G


def _to_tokens(advantage_B: Tensor, score_B: Tensor, index_B: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """A sample's advantage on each of its chosen tokens.

    Degenerate groups are zeroed here and not left to the subtraction: the rounding error of a mean, divided by a standard
    deviation of nearly nothing, would be trained on.
    """
    groups = int(index_B.max()) + 1
    low_G = score_B.new_zeros(groups).scatter_reduce(0, index_B, score_B, "amin", include_self=False)
    high_G = score_B.new_zeros(groups).scatter_reduce(0, index_B, score_B, "amax", include_self=False)
    advantage_B = torch.where((low_G == high_G)[index_B], 0.0, advantage_B)
    advantages_BT = torch.where(mask_BT.bool(), advantage_B[:, None], 0.0)
    return advantages_BT, advantages_BT
