"""GSPO: the ratio, and its clip, of whole sequences instead of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.aggregation import masked_mean
from agentlightning.algorithms.policy_losses.inputs import PolicyLossInputs
from agentlightning.algorithms.policy_losses.settings import PolicyLossSettings

LOG_RATIO_CEILING = 10.0  # nats, verl's


def gspo(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Group sequence policy optimization in its token form (arXiv:2507.18071, section 4.3). With sg for stop-gradient:

        s   = exp(mean over the sequence's tokens of (log_prob - old_log_prob))
        s_t = sg(s) * prob_t / sg(prob_t)                    the value of s, the gradient of the token
        L   = max(-A * s_t, -A * clip(s_t, 1 - clip_ratio_low, 1 + clip_ratio_high))

    Always aggregated as seq-mean-token-mean, as in the paper and in verl: `loss_agg_mode` is not read. The paper's clip range
    is tiny (3e-4 and 4e-4, its section 5.1). verl's addition: log s_t is kept below 10 nats.

    Metrics, each a mean over tokens: `pg_clipfrac` and `ppo_kl` (nats, k1).
    """
    log_ratio_B1 = masked_mean(inputs.log_prob_BT - inputs.old_log_prob_BT, inputs.mask_BT, dim=-1).unsqueeze(-1)
    own_gradient_BT = inputs.log_prob_BT - inputs.log_prob_BT.detach()
    ratio_BT = (log_ratio_B1.detach() + own_gradient_BT).clamp(max=LOG_RATIO_CEILING).exp()
    plain_BT = -inputs.advantages_BT * ratio_BT
    clipped_BT = -inputs.advantages_BT * ratio_BT.clamp(1 - settings.clip_ratio_low, 1 + settings.clip_ratio_high)
    metrics = {
        "pg_clipfrac": inputs.token_mean(clipped_BT > plain_BT),
        "ppo_kl": inputs.token_mean(-inputs.log_ratio()),
    }
    return inputs.aggregate(torch.maximum(plain_BT, clipped_BT), "seq-mean-token-mean"), metrics
