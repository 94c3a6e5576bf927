"""REINFORCE Leave-One-Out: rewards go in, advantages against the other samples of the same prompt leave."""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.advantages.groups import Groups, on_tokens


@torch.no_grad()
def rloo(token_level_rewards_BT: Tensor, mask_BT: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """The score less the mean of the other samples of the same prompt (arXiv:2402.14740).

        A_i = R_i - sum_{j != i} R_j / (n - 1) = n / (n - 1) * (R_i - mean(R))

    Returns equal advantages.
    """
    score_B, groups = token_level_rewards_BT.sum(dim=-1), Groups.of(group_B)
    count_B = groups.count_B.to(score_B.dtype)
    scale_B = count_B / (count_B - 1).clamp(min=1)
    advantages_BT = on_tokens(scale_B * (score_B - groups.mean(score_B)), groups.alike(score_B), mask_BT)
    return advantages_BT, advantages_BT
