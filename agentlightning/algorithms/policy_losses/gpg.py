"""GPG: the plain policy gradient."""

from __future__ import annotations

from torch import Tensor

from agentlightning.algorithms.policy_losses.inputs import PolicyLossInputs
from agentlightning.algorithms.policy_losses.settings import PolicyLossSettings


def gpg(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Group policy gradient (arXiv:2504.02546): no ratio, no clip.

        L = -A * log_prob

    Aggregated by `loss_agg_mode` (the paper's is token-mean). The paper's correction for groups without advantage belongs to
    the advantages (`algorithm.adv_estimator=gpg`). Nothing corrects for the policy having moved since the samples were drawn,
    so it is meant for one optimizer step a batch.

    Metric: `ppo_kl` (nats, k1; a mean over tokens), to see how far it has moved. verl reports none.
    """
    loss = inputs.aggregate(-inputs.advantages_BT * inputs.log_prob_BT, settings.loss_agg_mode)
    return loss, {"ppo_kl": inputs.token_mean(-inputs.log_ratio())}
