"""Group Policy Gradient: rewards go in, centred advantages, scaled up for the prompts that taught nothing, leave."""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.advantages.groups import Groups, on_tokens


@torch.no_grad()
def gpg(token_level_rewards_BT: Tensor, mask_BT: Tensor, group_B: Tensor, f_norm: float = 1.0) -> tuple[Tensor, Tensor]:
    """The score less its prompt's mean, with the gradient's size restored where samples have none (arXiv:2504.02546).

        A_i = alpha * (R_i - mean(R)) / f_norm,      alpha = B / (B - M)

    B counts the samples, M those of groups whose scores are all alike: they are in the denominator of the loss and add nothing
    to its gradient. Samples without a chosen token are in neither count, as in the denominator. (verl takes the number of
    scores that are not 0 for B - M, and so misses prompts that are always right.) Returns equal advantages.
    """
    score_B, groups = token_level_rewards_BT.sum(dim=-1), Groups.of(group_B)
    alike_B, live_B = groups.alike(score_B), mask_BT.bool().any(dim=-1)
    alpha = float(live_B.sum()) / max(float((live_B & ~alike_B).sum()), 1.0)
    advantages_BT = on_tokens(alpha * (score_B - groups.mean(score_B)) / f_norm, alike_B, mask_BT)
    return advantages_BT, advantages_BT
