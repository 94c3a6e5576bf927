"""ReMax: rewards and the score of a greedy answer go in, what sampling gained over it leaves."""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.advantages.groups import returns_to_go


@torch.no_grad()
def remax(token_level_rewards_BT: Tensor, mask_BT: Tensor, reward_baseline_B: Tensor) -> tuple[Tensor, Tensor]:
    """The reward to go less the score of the greedy answer to the same prompt (arXiv:2310.10505).

        A_t = sum_{s >= t} r_s - R(greedy answer)

    `reward_baseline_B` holds that score, for each sample that of its prompt. Returns are the rewards to go.
    """
    returns_BT = returns_to_go(token_level_rewards_BT, mask_BT, gamma=1.0)
    advantages_BT = torch.where(mask_BT.bool(), returns_BT - reward_baseline_B[:, None], 0.0)
    return advantages_BT, returns_BT
