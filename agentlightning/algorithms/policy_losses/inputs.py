"""What every policy loss is handed: the tokens of one micro-batch, and what the whole mini-batch's loss is divided by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agentlightning.algorithms.aggregation import LossDenominators, agg_loss
from agentlightning.algorithms.policy_losses.settings import PolicyLossSettings

LOG_RATIO_LIMIT = 20.0  # nats, verl's: a token whose probability collapsed keeps a finite ratio


@dataclass(frozen=True, slots=True, eq=False)
class PolicyLossInputs:
    """One micro-batch. All tensors are [B, T]; outside the mask they are set to a harmless number when the object is made, so
    that a NaN there comes back neither in the loss nor, as 0 * NaN, in the gradient.

    Gradients flow through `log_prob_BT` alone.
    """

    log_prob_BT: Tensor  # nats, under the present policy
    old_log_prob_BT: Tensor  # nats, under the policy that the ratio is taken to
    advantages_BT: Tensor
    mask_BT: Tensor  # bool or 0/1; true where the policy chose the token
    denominators: LossDenominators
    rollout_is_weights_BT: Tensor | None = None  # multiply each token's loss: rollout correction
    selected_BT: Tensor | None = None  # bool; the tokens that clip_cov or kl_cov has chosen over the whole mini-batch
    rollout_tokens_BT: Tensor | None = None  # tokens of the whole rollout, where a rollout has several samples

    def __post_init__(self) -> None:
        fillers = {"log_prob_BT": 0.0, "old_log_prob_BT": 0.0, "advantages_BT": 0.0, "rollout_is_weights_BT": 1.0}
        for name, filler in fillers.items():
            x_BT: Tensor | None = getattr(self, name)
            if x_BT is not None:
                object.__setattr__(self, name, torch.where(self.mask_BT.bool(), x_BT, filler))

    def log_ratio(self) -> Tensor:
        """log(new / old) [B, T] in nats, kept within `LOG_RATIO_LIMIT`: beyond it no gradient flows."""
        return (self.log_prob_BT - self.old_log_prob_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    def weighted(self, loss_BT: Tensor) -> Tensor:
        """The loss of each token times its `rollout_is_weights`, where there are any."""
        return loss_BT if self.rollout_is_weights_BT is None else loss_BT * self.rollout_is_weights_BT

    def aggregate(self, loss_BT: Tensor, loss_agg_mode: str) -> Tensor:
        """The loss of each token, weighted, as one number: see `agg_loss`."""
        return agg_loss(self.weighted(loss_BT), self.mask_BT, loss_agg_mode, self.denominators)

    def token_mean(self, x_BT: Tensor) -> Tensor:
        """A metric: the mean over the mini-batch's tokens, this micro-batch's part of it. Without gradient."""
        return agg_loss(x_BT.detach().to(self.log_prob_BT.dtype), self.mask_BT, "token-mean", self.denominators)


PolicyLoss = Callable[[PolicyLossInputs, PolicyLossSettings], tuple[Tensor, dict[str, Tensor]]]
