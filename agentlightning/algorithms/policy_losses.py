"""What the policy minimises: log-probabilities under the new and the old policy and advantages go in, (loss, metrics) leave.

Loss and metrics are divided by the counts of the whole mini-batch, so both add up over micro-batches and workers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.aggregation import LossDenominators, agg_loss

LOG_RATIO_LIMIT = 20.0  # nats, verl's: a token whose probability collapsed keeps a finite ratio


def vanilla(
    log_prob_BT: Tensor,
    old_log_prob_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float,
    loss_agg_mode: str,
    denominators: LossDenominators,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (arXiv:1707.06347) with its dual clip (arXiv:1912.09729). With r = exp(log_prob - old_log_prob):

        L = max(-A * r, -A * clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high))
        L = min(L, -A * clip_ratio_c)      where A < 0: a bad token that has become much likelier pulls no harder than this

    `clip_ratio_high > clip_ratio_low` is DAPO's clip-higher (arXiv:2503.14476). Gradients flow through `log_prob_BT` alone.

    Metrics, each a mean over tokens: `pg_clipfrac` and `pg_clipfrac_lower` (share of tokens at the first and the dual clip) and
    `ppo_kl` (nats, the k1 estimate of KL(old, new)). Raises ValueError unless `clip_ratio_c` is above 1.
    """
    if not clip_ratio_c > 1:
        raise ValueError(f"clip_ratio_c is {clip_ratio_c}, expected more than 1 (actor_rollout_ref.actor.clip_ratio_c=3.0)")
    log_ratio_BT = (log_prob_BT - old_log_prob_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio_BT = log_ratio_BT.exp()
    plain_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    ceiling_BT = -advantages_BT * clip_ratio_c
    bad_BT = advantages_BT < 0
    single_BT = torch.maximum(plain_BT, clipped_BT)
    loss_BT = torch.where(bad_BT, torch.minimum(single_BT, ceiling_BT), single_BT)

    def token_mean(x_BT: Tensor) -> Tensor:
        return agg_loss(x_BT.detach().to(loss_BT.dtype), mask_BT, "token-mean", denominators)

    metrics = {
        "pg_clipfrac": token_mean(clipped_BT > plain_BT),
        "pg_clipfrac_lower": token_mean(bad_BT & (single_BT > ceiling_BT)),
        "ppo_kl": token_mean(-log_ratio_BT),
    }
    return agg_loss(loss_BT, mask_BT, loss_agg_mode, denominators), metrics
