"""agent-lightning's own: PPO's loss in which each rollout of an agent counts once, however many calls and tokens it has."""

from __future__ import annotations

from torch import Tensor

from agentlightning.algorithms.aggregation import agg_rollouts
from agentlightning.algorithms.policy_losses.inputs import PolicyLossInputs
from agentlightning.algorithms.policy_losses.settings import PolicyLossSettings
from agentlightning.algorithms.policy_losses.vanilla import clipped_surrogate


def per_rollout_mean(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """`vanilla`'s loss of each token, aggregated over rollouts (agent-lightning v1, `per_rollout_mean`):

        L = 1 / R * sum over rollouts of (1 / tokens of the rollout * sum of L over its tokens)

    A rollout may span several samples: `rollout_tokens_BT` then says how many tokens it has in all, `denominators.rollouts` how
    many rollouts there are. Without them each sample is a rollout, and this is `vanilla` with seq-mean-token-mean.
    `loss_agg_mode` is not read. agent-lightning divides by the count of rows that are trained; here R counts rollouts, so that
    a rollout's weight does not hang on how many rows the others have.

    Metrics and errors are `vanilla`'s.
    """
    loss_BT, metrics = clipped_surrogate(inputs, settings)
    loss = agg_rollouts(inputs.weighted(loss_BT), inputs.mask_BT, inputs.denominators, inputs.rollout_tokens_BT)
    return loss, metrics
