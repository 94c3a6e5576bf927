"""GMPO: the geometric mean of a sequence's clipped ratios in the place of the arithmetic one."""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.aggregation import masked_mean
from agentlightning.algorithms.policy_losses.inputs import PolicyLossInputs
from agentlightning.algorithms.policy_losses.settings import PolicyLossSettings

SMALLEST_WEIGHT = 1e-10  # verl's: a weight of zero has no logarithm


def geo_mean(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Geometric-mean policy optimization (arXiv:2507.20673). With d = log_prob - old_log_prob of a token:

        d' = sign(A) * min(sign(A) * d, sign(A) * clip(d, -clip_ratio_low, clip_ratio_high))
        L  = -(mean of A) * exp(mean of d')       of each sequence, over its tokens; then the mean over sequences

    The range is one of log-ratios; the paper's is (exp(-0.4), exp(0.4)), so both `clip_ratio_*` 0.4. `loss_agg_mode` is not
    read. Meant for one advantage a sequence; as in verl, others are averaged. `rollout_is_weights` are combined to their
    geometric mean over the sequence (verl). verl averages over the rows of a micro-batch; here over the sequences of the whole
    mini-batch, however it is cut.

    Metrics, each a mean over tokens: `pg_clipfrac` and `pg_clipfrac_lower` (share of tokens whose ratio the clip has changed,
    where A > 0 and where A < 0; verl also counts tokens outside the range on the side where the minimum undoes the clip) and
    `ppo_kl` (nats, k1).
    """
    mask_BT, advantages_BT = inputs.mask_BT, inputs.advantages_BT
    log_ratio_BT = inputs.log_prob_BT - inputs.old_log_prob_BT
    sign_BT = advantages_BT.sign()
    near_BT = log_ratio_BT.clamp(-settings.clip_ratio_low, settings.clip_ratio_high)
    kept_BT = sign_BT * torch.minimum(sign_BT * log_ratio_BT, sign_BT * near_BT)
    loss_B = -masked_mean(advantages_BT, mask_BT, dim=-1) * masked_mean(kept_BT, mask_BT, dim=-1).exp()
    if inputs.rollout_is_weights_BT is not None:
        log_weight_BT = inputs.rollout_is_weights_BT.clamp(min=SMALLEST_WEIGHT).log()
        loss_B = loss_B * masked_mean(log_weight_BT, mask_BT, dim=-1).exp()
    changed_BT = (kept_BT != log_ratio_BT) & (sign_BT != 0)
    metrics = {
        "pg_clipfrac": inputs.token_mean(changed_BT & (sign_BT > 0)),
        "pg_clipfrac_lower": inputs.token_mean(changed_BT & (sign_BT < 0)),
        "ppo_kl": inputs.token_mean(-inputs.log_ratio()),
    }
    return loss_B.sum() / max(inputs.denominators.sequences, 1.0), metrics
