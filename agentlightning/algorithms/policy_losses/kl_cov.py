"""KL-Cov: the few tokens that would cost the most entropy pay for moving away from the old policy."""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.policy_losses.covariance import ChoiceTokens, at, count_of_share, covariance, selected
from agentlightning.algorithms.policy_losses.inputs import PolicyLossInputs
from agentlightning.algorithms.policy_losses.settings import PolicyLossSettings

COVARIANCE_STEP = 1e-4  # covariances nearer to each other than float noise may tell apart count as equal
SAME_LOG_PROB = 1e-5  # nats: below it, d is the noise of two float32 passes, and its sign is chance


def kl_cov(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """KL-Cov (arXiv:2505.22617, section 4). With d = log_prob - old_log_prob:

        L = -A * exp(d) + ppo_kl_coef * |d|      where `choose_kl_cov` has chosen
        L = -A * exp(d)                          elsewhere

    No clip. Aggregated by `loss_agg_mode`. The paper's penalty is KL(old, new); verl takes |d| for it. Where the
    policy has not moved, |d| < 1e-5, there is none (in verl the sign of the noise pulls there, which hangs on the micro-batch):
    with a single optimizer step a batch the penalty does nothing. `ppo_kl_coef` is 1 in the paper, 0.1 in verl's defaults.
    Raises ValueError without `selected_BT`.

    Metrics, each a mean over tokens: `kl_cov_frac` (share of tokens chosen) and `ppo_kl` (nats, k1 as for the other losses;
    verl logs the mean of |d| under this name).
    """
    chosen_BT, log_ratio_BT = selected(inputs), inputs.log_ratio()
    distance_BT = log_ratio_BT.abs()
    penalty_BT = torch.where(chosen_BT & (distance_BT >= SAME_LOG_PROB), settings.ppo_kl_coef * distance_BT, 0.0)
    metrics = {"kl_cov_frac": inputs.token_mean(chosen_BT), "ppo_kl": inputs.token_mean(-log_ratio_BT)}
    return inputs.aggregate(-inputs.advantages_BT * log_ratio_BT.exp() + penalty_BT, settings.loss_agg_mode), metrics


def choose_kl_cov(tokens: ChoiceTokens, settings: PolicyLossSettings) -> Tensor:
    """Bool [N]: the `kl_cov_ratio` of all tokens with the largest covariance, at least one.

    Of equal ones (two samples that begin alike) each token's own random number decides, and not its place.
    """
    step_N = (covariance(tokens) / COVARIANCE_STEP).round()
    by_chance = tokens.random_N.argsort()
    by_covariance = by_chance[step_N[by_chance].argsort(stable=True, descending=True)]
    return at(by_covariance[: count_of_share(settings.kl_cov_ratio, len(step_N))], len(step_N))
