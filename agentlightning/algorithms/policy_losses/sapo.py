"""SAPO: a soft gate on the ratio in the place of the hard clip."""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.policy_losses.inputs import PolicyLossInputs
from agentlightning.algorithms.policy_losses.settings import PolicyLossSettings


def sapo(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Soft adaptive policy optimization (arXiv:2511.20347). With r = exp(log_prob - old_log_prob):

        L   = -A * 4 / tau * sigmoid(tau * (r - 1)),      tau = tau_pos where A > 0, else tau_neg

    Its gradient is that of -A * r times a weight 4 p (1 - p), p = sigmoid(tau * (r - 1)): 1 where r = 1, fading on both sides,
    faster for bad tokens if `tau_neg > tau_pos`. Always aggregated as seq-mean-token-mean, as in the paper and in verl:
    `loss_agg_mode` is not read. verl's addition: the log-ratio is kept within 20 nats.

    Metrics, each a mean over tokens: `sapo_gate` (the weight of the gradient) and `ppo_kl` (nats, k1).
    """
    log_ratio_BT = inputs.log_ratio()
    good_BT = inputs.advantages_BT > 0
    tau_BT = torch.where(good_BT, settings.tau_pos, settings.tau_neg).to(log_ratio_BT.dtype)
    p_BT = torch.sigmoid(tau_BT * (log_ratio_BT.exp() - 1))
    metrics = {
        "sapo_gate": inputs.token_mean(4 * p_BT * (1 - p_BT)),
        "ppo_kl": inputs.token_mean(-log_ratio_BT),
    }
    return inputs.aggregate(-inputs.advantages_BT * 4 / tau_BT * p_BT, "seq-mean-token-mean"), metrics
