"""Group Relative Policy Optimization, Dr.GRPO, and its kin for pass@k: rewards go in, group-relative advantages leave."""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.advantages.groups import Groups, on_tokens


@torch.no_grad()
def grpo(
    token_level_rewards_BT: Tensor,
    mask_BT: Tensor,
    group_B: Tensor,
    norm_adv_by_std_in_grpo: bool = True,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The score against the other samples of the same prompt (arXiv:2402.03300).

        A_i = (R_i - mean(R)) / (std(R) + epsilon)

    R is the sum of a sample's rewards, std is Bessel-corrected. Without the division (`norm_adv_by_std_in_grpo=False`) it is
    Dr.GRPO (arXiv:2503.20783). Returns equal advantages.
    """
    score_B, groups = token_level_rewards_BT.sum(dim=-1), Groups.of(group_B)
    advantage_B = relative_to_group(score_B, groups, norm_adv_by_std_in_grpo, epsilon)
    advantages_BT = on_tokens(advantage_B, groups.alike(score_B), mask_BT)
    return advantages_BT, advantages_BT


def relative_to_group(score_B: Tensor, groups: Groups, by_std: bool, epsilon: float) -> Tensor:
    """The score less its group's mean, over its group's standard deviation if `by_std`; exactly 0 where the group is alike."""
    advantage_B = score_B - groups.mean(score_B)
    if by_std:
        advantage_B = advantage_B / (groups.std(score_B) + epsilon)
    return torch.where(groups.alike(score_B), 0.0, advantage_B)


@torch.no_grad()
def grpo_passk(
    token_level_rewards_BT: Tensor,
    mask_BT: Tensor,
    group_B: Tensor,
    norm_adv_by_std_in_grpo: bool = True,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Only the best sample of a prompt is moved, by what it adds to the best of the others (arXiv:2503.19595).

        A_best = R_max - R_second_max,      A_i = 0 for all others

    The expectation is that of the gradient of max(R), which for right-or-wrong scores is pass@k with k the size of the group.
    With `norm_adv_by_std_in_grpo` it is divided by std(R) + epsilon, as verl does. Where two share the best score, neither adds
    anything and all are zero. Returns equal advantages.
    """
    score_B, groups = token_level_rewards_BT.sum(dim=-1), Groups.of(group_B)
    best_B = score_B == groups.max(score_B)
    second_B = groups.max(torch.where(best_B, -torch.inf, score_B))
    alone_B = best_B & (groups.sum(best_B.to(score_B.dtype)) == 1)
    advantage_B = torch.where(alone_B, score_B - second_B, 0.0)
    if norm_adv_by_std_in_grpo:
        advantage_B = advantage_B / (groups.std(score_B) + epsilon)
    advantages_BT = on_tokens(advantage_B, groups.alike(score_B), mask_BT)
    return advantages_BT, advantages_BT
