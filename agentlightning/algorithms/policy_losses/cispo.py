"""CISPO: the importance weight is clipped, and no token loses its gradient."""

from __future__ import annotations

from torch import Tensor

from agentlightning.algorithms.policy_losses.inputs import PolicyLossInputs
from agentlightning.algorithms.policy_losses.settings import PolicyLossSettings


def cispo(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped importance sampling policy optimization (MiniMax-M1, arXiv:2506.13585). With r = exp(log_prob - old_log_prob) and
    sg for stop-gradient:

        L = -sg(clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high)) * A * log_prob

    Aggregated by `loss_agg_mode` (the paper's is token-mean). The paper sets no lower bound and tunes the upper one alone:
    `clip_ratio_low=1.0`; verl takes PPO's ranges, and keeps the log-ratio within 20 nats.

    Metrics, each a mean over tokens: `pg_clipfrac` (share of tokens whose weight is clipped) and `ppo_kl` (nats, k1).
    """
    log_ratio_BT = inputs.log_ratio().detach()
    ratio_BT = log_ratio_BT.exp()
    weight_BT = ratio_BT.clamp(1 - settings.clip_ratio_low, 1 + settings.clip_ratio_high)
    metrics = {
        "pg_clipfrac": inputs.token_mean(weight_BT != ratio_BT),
        "ppo_kl": inputs.token_mean(-log_ratio_BT),
    }
    return inputs.aggregate(-weight_BT * inputs.advantages_BT * inputs.log_prob_BT, settings.loss_agg_mode), metrics
