"""Generalized Advantage Estimation: rewards and values go in, advantages and the returns that a critic learns leave."""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.advantages.groups import whitened


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
    return whitened(advantages_BT, mask_BT), returns_BT
