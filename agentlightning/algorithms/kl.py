"""How far the policy has gone from the reference: log-probabilities go in, estimates or penalised rewards leave.

The estimators are Schulman's (http://joschu.net/blog/kl-approx.html), of KL(policy, reference) in nats, on tokens that the
policy drew. The controllers hold the coefficient; their state goes into the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from agentlightning.algorithms.aggregation import masked_mean


def _k1(logprob_BT: Tensor, ref_logprob_BT: Tensor) -> Tensor:
    """Unbiased, may be negative."""
    return logprob_BT - ref_logprob_BT


def _abs(logprob_BT: Tensor, ref_logprob_BT: Tensor) -> Tensor:
    return (logprob_BT - ref_logprob_BT).abs()


def _k2(logprob_BT: Tensor, ref_logprob_BT: Tensor) -> Tensor:
    """Biased, but its gradient is an unbiased gradient of the KL."""
    return 0.5 * (logprob_BT - ref_logprob_BT).square()


def _k3(logprob_BT: Tensor, ref_logprob_BT: Tensor) -> Tensor:
    """Unbiased and never negative; clamped as verl does, so that one improbable token cannot drown the rest."""
    difference_BT = (ref_logprob_BT - logprob_BT).clamp(-20.0, 20.0)
    return (difference_BT.exp() - difference_BT - 1).clamp(-10.0, 10.0)


_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": _k1,
    "k1": _k1,
    "abs": _abs,
    "mse": _k2,
    "k2": _k2,
    "low_var_kl": _k3,
    "k3": _k3,
}
KL_PENALTIES = (*_ESTIMATORS, *(f"{name}+" for name in _ESTIMATORS))


def kl_penalty(logprob_BT: Tensor, ref_logprob_BT: Tensor, kl_penalty: str) -> Tensor:
    """Per-token estimate [B, T] of the KL divergence, in nats. Gradients flow.

    `kl_penalty` names it: `kl`/`k1`, `abs`, `mse`/`k2`, `low_var_kl`/`k3`; with d = logprob - ref_logprob: d, |d|, d^2/2 and
    exp(-d) + d - 1. A trailing `+` keeps the named value and takes the gradient of k2, the only one of them whose expected
    gradient is that of the KL. Raises ValueError for any other name.
    """
    if kl_penalty not in KL_PENALTIES:
        raise ValueError(f"KL penalty {kl_penalty!r} is not one of {', '.join(KL_PENALTIES)}")
    value_BT = _ESTIMATORS[kl_penalty.removesuffix("+")](logprob_BT, ref_logprob_BT)
    if not kl_penalty.endswith("+"):
        return value_BT
    slope_BT = _k2(logprob_BT, ref_logprob_BT)
    return value_BT.detach() + (slope_BT - slope_BT.detach())


@torch.no_grad()
def apply_kl_penalty(
    token_level_scores_BT: Tensor,
    old_logp_BT: Tensor,
    ref_logp_BT: Tensor,
    mask_BT: Tensor,
    coef: float,
    kl_penalty_name: str,
) -> tuple[Tensor, float]:
    """KL in the reward: `score - coef * kl` on each chosen token.

    Returns the rewards [B, T] and the mean over samples of their mean KL a token, in nats: what a controller is updated with.
    """
    kl_BT = kl_penalty(old_logp_BT, ref_logp_BT, kl_penalty_name)
    rewards_BT = token_level_scores_BT - coef * torch.where(mask_BT.bool(), kl_BT, 0.0)
    return rewards_BT, float(masked_mean(kl_BT, mask_BT, dim=-1).mean())


class FixedKLController:
    """A coefficient that stays as it is."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current_kl: float, n_steps: int) -> None:
        """Change nothing; here so that a loop need not know which controller it holds."""

    def state_dict(self) -> dict[str, float]:
        """`{"value": coefficient}`, as the checkpoint keeps it."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take nothing over: the coefficient is what the configuration says, also after a resume with another one."""


class AdaptiveKLController:
    """A coefficient that steers the KL to a target (arXiv:1909.08593, section 2.2):

        value *= 1 + clip(kl / target_kl - 1, -0.2, 0.2) * n_steps / horizon

    `target_kl` is in nats, `horizon` in samples. Raises ValueError unless both are positive.
    """

    def __init__(self, init_kl_coef: float, target_kl: float, horizon: float) -> None:
        if not (target_kl > 0 and horizon > 0):
            raise ValueError(
                f"an adaptive KL controller needs algorithm.kl_ctrl.target_kl > 0 and algorithm.kl_ctrl.horizon > 0, "
                f"was given {target_kl} and {horizon}"
            )
        self.value, self.target_kl, self.horizon = init_kl_coef, target_kl, horizon

    def update(self, current_kl: float, n_steps: int) -> None:
        """Move the coefficient after `n_steps` samples whose mean KL was `current_kl`, which must be finite (ValueError)."""
        if not math.isfinite(current_kl):
            raise ValueError(f"the KL to the reference policy is {current_kl}, expected a finite number")
        error = max(-0.2, min(0.2, current_kl / self.target_kl - 1))
        self.value *= 1 + error * n_steps / self.horizon

    def state_dict(self) -> dict[str, float]:
        """`{"value": coefficient}`, as the checkpoint keeps it."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from the coefficient that `state_dict` gave."""
        self.value = float(state["value"])
