"""PPO's clipped surrogate, with the dual clip and clip-higher: the loss that is used where nothing else is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.policy_losses.inputs import PolicyLossInputs
from agentlightning.algorithms.policy_losses.settings import PolicyLossSettings


def vanilla(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO (arXiv:1707.06347) with its dual clip (arXiv:1912.09729). With r = exp(log_prob - old_log_prob):

        L = max(-A * r, -A * clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high))
        L = min(L, -A * clip_ratio_c)      where A < 0: a bad token that has become much likelier pulls no harder than this

    `clip_ratio_high > clip_ratio_low` is DAPO's clip-higher (arXiv:2503.14476). Aggregated by `loss_agg_mode`.

    Metrics, each a mean over tokens: `pg_clipfrac` and `pg_clipfrac_lower` (share of tokens at the first and the dual clip) and
    `ppo_kl` (nats, the k1 estimate of KL(old, new)). Raises ValueError unless `clip_ratio_c` is above 1.
    """
    loss_BT, metrics = clipped_surrogate(inputs, settings)
    return inputs.aggregate(loss_BT, settings.loss_agg_mode), metrics


def clipped_surrogate(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each token [B, T] and the metrics, as `vanilla` says."""
    clip_ratio_c = settings.clip_ratio_c
    if not clip_ratio_c > 1:
        raise ValueError(f"clip_ratio_c is {clip_ratio_c}, expected more than 1 (actor_rollout_ref.actor.clip_ratio_c=3.0)")
    advantages_BT, log_ratio_BT = inputs.advantages_BT, inputs.log_ratio()
    ratio_BT = log_ratio_BT.exp()
    plain_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - settings.clip_ratio_low, 1 + settings.clip_ratio_high)
    ceiling_BT = -advantages_BT * clip_ratio_c
    bad_BT = advantages_BT < 0
    single_BT = torch.maximum(plain_BT, clipped_BT)
    metrics = {
        "pg_clipfrac": inputs.token_mean(clipped_BT > plain_BT),
        "pg_clipfrac_lower": inputs.token_mean(bad_BT & (single_BT > ceiling_BT)),
        "ppo_kl": inputs.token_mean(-log_ratio_BT),
    }
    return torch.where(bad_BT, torch.minimum(single_BT, ceiling_BT), single_BT), metrics
