"""Optimal Token Baseline: rewards and the policy's probabilities go in, advantages with a baseline for each token leave."""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.advantages.groups import Groups, returns_to_go


@torch.no_grad()
def optimal_token_baseline(
    token_level_rewards_BT: Tensor,
    mask_BT: Tensor,
    group_B: Tensor,
    old_logp_BT: Tensor,
    sum_pi_squared_BT: Tensor,
    rollout_is_weights_BT: Tensor | None = None,
    epsilon: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """The reward to go less, at each token, the baseline of least variance (verl; https://richardli.xyz/optimal-token-baseline).

        w_t = 1 - 2 * pi_t + sum_v pi(v)^2           the squared norm of the gradient of log pi_t by the logits
        W_t = w_1 + ... + w_t,      b_t = sum_i G_it * W_it / (sum_i W_it + epsilon),      A_it = G_it - b_t

    pi_t = exp(old_logp) is the probability of the chosen token and `sum_pi_squared_BT` the sum over the vocabulary of squared
    probabilities, both of the same distribution (same weights, same temperature). With truncated importance weights, w_t is
    multiplied by their square. Returns are G, the rewards to go.

    t counts chosen tokens: the t-th of one sample stands against the t-th of the others, whatever observations lie between
    (with one turn that is verl's `optimal_token_baseline`, with several its `tir_optimal_token_baseline`). Where only the
    longest sample of a group goes on, it has no other to be measured by and b is 0, as in verl. A group of one sample or of
    equal scores gets zeros, which verl leaves at G.
    """
    chosen_BT = mask_BT.bool()
    groups = Groups.of(group_B)
    returns_BT = returns_to_go(token_level_rewards_BT, mask_BT, gamma=1.0)
    energy_BT = (1 - 2 * old_logp_BT.exp() + sum_pi_squared_BT).clamp(min=0)  # never negative but for rounding
    if rollout_is_weights_BT is not None:
        energy_BT = energy_BT * rollout_is_weights_BT.square()
    energy_BT = torch.where(chosen_BT, energy_BT, 0.0).cumsum(dim=-1)

    # From columns to the count of chosen tokens, where samples are compared, and back.
    row_N, column_N = chosen_BT.nonzero(as_tuple=True)
    place_N = chosen_BT.cumsum(dim=-1)[row_N, column_N] - 1
    packed_return_BT, packed_energy_BT = torch.zeros_like(returns_BT), torch.zeros_like(returns_BT)
    packed_return_BT[row_N, place_N] = returns_BT[row_N, column_N]
    packed_energy_BT[row_N, place_N] = energy_BT[row_N, column_N]
    present_BT = torch.zeros_like(returns_BT)
    present_BT[row_N, place_N] = 1.0
    baseline_BT = groups.sum(packed_return_BT * packed_energy_BT) / (groups.sum(packed_energy_BT) + epsilon)
    baseline_BT = torch.where(groups.sum(present_BT) > 1, baseline_BT, 0.0)

    advantages_BT = torch.zeros_like(returns_BT)
    advantages_BT[row_N, column_N] = returns_BT[row_N, column_N] - baseline_BT[row_N, place_N]
    alike_B = groups.alike(token_level_rewards_BT.sum(dim=-1))
    return torch.where(alike_B[:, None], 0.0, advantages_BT), returns_BT
