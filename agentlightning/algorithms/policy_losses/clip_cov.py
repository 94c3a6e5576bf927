"""Clip-Cov: a few tokens that would cost the most entropy are left out of the update."""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.policy_losses.covariance import ChoiceTokens, at, count_of_share, covariance, selected
from agentlightning.algorithms.policy_losses.inputs import PolicyLossInputs
from agentlightning.algorithms.policy_losses.settings import PolicyLossSettings


def clip_cov(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Clip-Cov (arXiv:2505.22617, section 4). With r = exp(log_prob - old_log_prob):

        L = 0                                                                          where `choose_clip_cov` has chosen
        L = max(-A * r, -A * clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high))         elsewhere

    Aggregated by `loss_agg_mode`; a chosen token stays in the count. verl's deviation: the paper has no clip beside the choice,
    verl keeps PPO's (without the dual clip). Raises ValueError without `selected_BT`.

    Metrics, each a mean over tokens: `pg_clipfrac` (share of tokens chosen, as in verl) and `ppo_kl` (nats, k1).
    """
    chosen_BT, log_ratio_BT = selected(inputs), inputs.log_ratio()
    ratio_BT = log_ratio_BT.exp()
    near_BT = ratio_BT.clamp(1 - settings.clip_ratio_low, 1 + settings.clip_ratio_high)
    loss_BT = torch.maximum(-inputs.advantages_BT * ratio_BT, -inputs.advantages_BT * near_BT)
    metrics = {"pg_clipfrac": inputs.token_mean(chosen_BT), "ppo_kl": inputs.token_mean(-log_ratio_BT)}
    return inputs.aggregate(torch.where(chosen_BT, 0.0, loss_BT), settings.loss_agg_mode), metrics


def choose_clip_cov(tokens: ChoiceTokens, settings: PolicyLossSettings) -> Tensor:
    """Bool [N]: at random, `clip_cov_ratio` of all tokens, out of those whose covariance lies between `clip_cov_lb` and
    `clip_cov_ub` and which PPO's clip does not hold already (verl's condition). At least one, if there is one.
    """
    ratio_N, covariance_N = tokens.ratio(), covariance(tokens)
    near_N = ratio_N.clamp(1 - settings.clip_ratio_low, 1 + settings.clip_ratio_high)
    held_N = -tokens.advantages_N * near_N > -tokens.advantages_N * ratio_N
    candidate_N = (covariance_N > settings.clip_cov_lb) & (covariance_N < settings.clip_cov_ub) & ~held_N
    count = min(count_of_share(settings.clip_cov_ratio, len(ratio_N)), int(candidate_N.sum()))
    places = torch.where(candidate_N, tokens.random_N, torch.inf).argsort()[:count]
    return at(places, len(ratio_N))
