"""What the critic minimises: predicted values, old values and returns [B, T] go in, (loss, metrics) leave.

Loss and metrics are divided by the counts of the whole mini-batch, so both add up over micro-batches and workers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.aggregation import LossDenominators, agg_loss


def value_loss(
    vpreds_BT: Tensor,
    values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    cliprange_value: float,
    loss_agg_mode: str,
    denominators: LossDenominators,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped squared error: a prediction is not rewarded for moving further than `cliprange_value` from the old value.

        L = 0.5 * agg(max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2))

    `values_BT` are the old values that the returns were made with. Gradients flow through `vpreds_BT` alone.

    Metrics, each a mean over tokens: `vf_clipfrac` (share of tokens where the clipped error is the larger) and `vpred_mean`.
    """
    vpreds_BT = torch.where(mask_BT.bool(), vpreds_BT, 0.0)  # else a NaN outside the mask comes back in the gradient as 0 * NaN
    near_BT = torch.clamp(vpreds_BT, values_BT - cliprange_value, values_BT + cliprange_value)
    plain_BT = (vpreds_BT - returns_BT).square()
    clipped_BT = (near_BT - returns_BT).square()
    loss = 0.5 * agg_loss(torch.maximum(plain_BT, clipped_BT), mask_BT, loss_agg_mode, denominators)

    def token_mean(x_BT: Tensor) -> Tensor:
        return agg_loss(x_BT.detach().to(vpreds_BT.dtype), mask_BT, "token-mean", denominators)

    return loss, {"vf_clipfrac": token_mean(clipped_BT > plain_BT), "vpred_mean": token_mean(vpreds_BT)}
