"""The table of the policy losses: `actor_rollout_ref.actor.policy_loss.loss_mode` -> function."""

from __future__ import annotations

from agentlightning.algorithms.policy_losses.cispo import cispo
from agentlightning.algorithms.policy_losses.clip_cov import choose_clip_cov, clip_cov
from agentlightning.algorithms.policy_losses.covariance import TokenChoice
from agentlightning.algorithms.policy_losses.geo_mean import geo_mean
from agentlightning.algorithms.policy_losses.gpg import gpg
from agentlightning.algorithms.policy_losses.gspo import gspo
from agentlightning.algorithms.policy_losses.inputs import PolicyLoss
from agentlightning.algorithms.policy_losses.kl_cov import choose_kl_cov, kl_cov
from agentlightning.algorithms.policy_losses.per_rollout_mean import per_rollout_mean
from agentlightning.algorithms.policy_losses.sapo import sapo
from agentlightning.algorithms.policy_losses.vanilla import vanilla

# A sample whose advantages are all 0 adds exactly nothing to any of these, but for the tokens that kl_cov has chosen.
POLICY_LOSSES: dict[str, PolicyLoss] = {
    "vanilla": vanilla,
    "gspo": gspo,
    "sapo": sapo,
    "gpg": gpg,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "geo_mean": geo_mean,
    "cispo": cispo,
    "per_rollout_mean": per_rollout_mean,
}

# Losses that treat some tokens of the mini-batch in another way: who chooses them.
TOKEN_CHOICES: dict[str, TokenChoice] = {"clip_cov": choose_clip_cov, "kl_cov": choose_kl_cov}
