"""On-Policy RL with Optimal reward baseline: rewards go in, advantages against a length-weighted mean leave."""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.advantages.groups import Groups, on_tokens


@torch.no_grad()
def opo(token_level_rewards_BT: Tensor, mask_BT: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """The score less the baseline of least variance, if a gradient's square grows with the length (arXiv:2505.23585).

        b = sum_i l_i * R_i / sum_i l_i,      A_i = R_i - b

    l is the number of tokens that the policy chose, so a sample without any has no weight. Returns equal advantages.
    """
    score_B, groups = token_level_rewards_BT.sum(dim=-1), Groups.of(group_B)
    length_B = mask_BT.bool().sum(dim=-1).to(score_B.dtype)
    baseline_B = groups.sum(length_B * score_B) / groups.sum(length_B).clamp(min=1)
    advantages_BT = on_tokens(score_B - baseline_B, groups.alike(score_B), mask_BT)
    return advantages_BT, advantages_BT
