"""Group reward-Decoupled normalisation: the rewards of each sample go in, an advantage in which all have a say leaves."""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.advantages.groups import Groups, on_tokens, whitened
from agentlightning.algorithms.advantages.grpo import relative_to_group


@torch.no_grad()
def gdpo(
    reward_components_KB: Tensor,
    weights_K: Tensor,
    mask_BT: Tensor,
    group_B: Tensor,
    norm_adv_by_std_in_grpo: bool = True,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Each reward is normalised within its group, then they are summed, then whitened over the batch (arXiv:2601.05242).

        A'_i = sum_k w_k * (r_ki - mean_group(r_k)) / (std_group(r_k) + epsilon)
        A_i  = (A'_i - mean_batch(A')) / std_batch(A')

    GRPO adds the rewards first: one with a large spread then drowns the others, and different combinations of rewards with the
    same sum become one. As in verl, batch statistics are over chosen tokens. A group in which every weighted component is alike
    stays at zero, though it is in the batch statistics. Returns equal advantages.

    Raises ValueError unless there is one weight for each of at least one component.
    """
    if len(weights_K) != len(reward_components_KB) or len(weights_K) == 0:
        raise ValueError(
            f"gdpo was given {len(reward_components_KB)} reward components and {len(weights_K)} weights, expected as many of "
            "each and at least one (reward.functions)"
        )
    groups = Groups.of(group_B)
    sum_B, alike_B = torch.zeros_like(reward_components_KB[0]), torch.ones_like(group_B, dtype=torch.bool)
    for reward_B, weight in zip(reward_components_KB, weights_K, strict=True):
        sum_B = sum_B + weight * relative_to_group(reward_B, groups, norm_adv_by_std_in_grpo, epsilon)
        alike_B = alike_B & (groups.alike(reward_B) | (weight == 0))
    advantages_BT = whitened(on_tokens(sum_B, alike_B, mask_BT), mask_BT)
    advantages_BT = torch.where(alike_B[:, None], 0.0, advantages_BT)
    return advantages_BT, advantages_BT
