"""REINFORCE++ with and without a group baseline: rewards go in, advantages whitened over the whole batch leave."""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.advantages.groups import Groups, on_tokens, returns_to_go, whitened


@torch.no_grad()
def reinforce_plus_plus(token_level_rewards_BT: Tensor, mask_BT: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Discounted rewards to go, whitened over all chosen tokens of the batch (arXiv:2501.03262).

        G_t = r_t + gamma * G(next),      A_t = (G_t - mean(G)) / std(G)

    "next" is the next chosen token: observations are stepped over without discount. Returns are G. There are no groups; a batch
    of equal returns gives exact zeros.
    """
    returns_BT = returns_to_go(token_level_rewards_BT, mask_BT, gamma)
    return whitened(returns_BT, mask_BT), returns_BT


@torch.no_grad()
def reinforce_plus_plus_baseline(token_level_rewards_BT: Tensor, mask_BT: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """The score less the mean of its prompt's, whitened over all chosen tokens of the batch (arXiv:2501.03262).

        A'_i = R_i - mean_group(R),      A_i = (A'_i - mean_batch(A')) / std_batch(A')

    As in verl a sample weighs as many times as it has tokens, so mean_batch is not exactly 0. A group that is alike stays at
    zero: it is in the statistics, but the shift is not trained on. Returns equal advantages.
    """
    score_B, groups = token_level_rewards_BT.sum(dim=-1), Groups.of(group_B)
    alike_B = groups.alike(score_B)
    advantages_BT = whitened(on_tokens(score_B - groups.mean(score_B), alike_B, mask_BT), mask_BT)
    advantages_BT = torch.where(alike_B[:, None], 0.0, advantages_BT)
    return advantages_BT, advantages_BT
