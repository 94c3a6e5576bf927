"""The constants of the policy losses, in verl's words. Imports nothing, so that whoever only passes them on starts fast."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLossSettings:
    """`actor_rollout_ref.actor.{clip_ratio_*, loss_agg_mode, policy_loss.*}`; each loss reads what its docstring names."""

    clip_ratio_low: float
    clip_ratio_high: float
    clip_ratio_c: float
    loss_agg_mode: str
    loss_mode: str = "vanilla"
    clip_cov_ratio: float = 0.0002  # share of tokens
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    kl_cov_ratio: float = 0.0002  # share of tokens
    ppo_kl_coef: float = 0.1
    tau_pos: float = 1.0
    tau_neg: float = 1.05
