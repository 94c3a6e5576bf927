"""The losses of the service: log-probabilities and per-position inputs go in, one loss a position comes out; who calls sums.

Tinker's definitions (https://tinker-docs.thinkingmachines.ai/losses): sums over positions and data, never means, so that
gradients of several calls add up. Different from verl's losses beside them, which aggregate in many ways. Letters: B sequences,
T positions, K targets a position (1 but for distillation on the likeliest tokens).

Every column is filled for every position before it comes here: what a caller left out has its default from `ServiceLoss`.
A position with advantage 0 adds exactly 0 to the policy losses that have a ratio, whatever its log-probabilities are (prompts,
whose sampler log-probabilities nobody knows).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Columns = Mapping[str, Tensor]
LossFn = Callable[[Tensor, Columns, Mapping[str, float]], Tensor]


@dataclass(frozen=True, slots=True)
class ServiceLoss:
    """A loss and what it reads."""

    positions: LossFn  # (log-probabilities, columns, configuration) -> loss of each position, in the shape of the first
    required: tuple[str, ...] = ()  # columns beside target_tokens
    config: Mapping[str, float] = field(default_factory=dict)  # keys of loss_fn_config with their defaults
    several_targets: bool = False  # whether target_tokens may be [T, K]


def cross_entropy(logp_BTK: Tensor, columns: Columns, config: Mapping[str, float]) -> Tensor:
    """`-weights * logp`. Weights may be negative: a custom loss C is this one with weights -dC/dlogp."""
    return -columns["weights"] * logp_BTK


def importance_sampling(logp_BT: Tensor, columns: Columns, config: Mapping[str, float]) -> Tensor:
    """`-ratio * A`, where ratio = exp(logp - logprobs of the sampler): REINFORCE, unbiased off policy."""
    return -_log_ratio(logp_BT, columns).exp() * columns["advantages"]


def ppo(logp_BT: Tensor, columns: Columns, config: Mapping[str, float]) -> Tensor:
    """`-min(ratio * A, clip(ratio, low, high) * A)` (Schulman et al., 2017: arXiv 1707.06347)."""
    ratio_BT, A_BT = _log_ratio(logp_BT, columns).exp(), columns["advantages"]
    return -torch.minimum(ratio_BT * A_BT, _clip(ratio_BT, columns) * A_BT)


def cispo(logp_BT: Tensor, columns: Columns, config: Mapping[str, float]) -> Tensor:
    """`-sg(clip(ratio, low, high)) * logp * A`, sg for stop-gradient (MiniMax, 2025: arXiv 2506.13585)."""
    ratio_BT = _log_ratio(logp_BT.detach(), columns).exp()
    return -_clip(ratio_BT, columns) * logp_BT * columns["advantages"]


def dro(logp_BT: Tensor, columns: Columns, config: Mapping[str, float]) -> Tensor:
    """`-(logp * A - beta / 2 * (logp - logprobs)^2)` (Richemond et al., 2024: arXiv 2405.19107).

    The penalty is paid at positions without advantage too, as in the service: give `weights` 0 to leave them out.
    """
    distance_BT = logp_BT - columns["logprobs"]
    return -(logp_BT * columns["advantages"] - 0.5 * config["beta"] * distance_BT**2)


def gspo(logp_BT: Tensor, columns: Columns, config: Mapping[str, float]) -> Tensor:
    """PPO's loss with one ratio a sequence, in the token form (Zheng et al., 2025: arXiv 2507.18071, section 4.3):

    s = exp(mean of (logp - logprobs) over positions where `sequence_ratio_mask` is not 0), s_t = sg(s) * p_t / sg(p_t).
    """
    inside_BT = columns["sequence_ratio_mask"] != 0
    log_ratio_BT = torch.where(inside_BT, logp_BT.detach() - columns["logprobs"], 0.0)
    mean_B1 = log_ratio_BT.sum(1, keepdim=True) / inside_BT.sum(1, keepdim=True).clamp(min=1)
    A_BT = columns["advantages"]
    ratio_BT = torch.where(A_BT != 0, mean_B1 + logp_BT - logp_BT.detach(), 0.0).exp()
    return -torch.minimum(ratio_BT * A_BT, _clip(ratio_BT, columns) * A_BT)


def _log_ratio(logp_BT: Tensor, columns: Columns) -> Tensor:
    """0 where there is no advantage: exp must not overflow there, for inf * 0 is NaN."""
    return torch.where(columns["advantages"] != 0, logp_BT - columns["logprobs"], 0.0)


def _clip(ratio_BT: Tensor, columns: Columns) -> Tensor:
    return torch.clamp(ratio_BT, columns["clip_low_threshold"], columns["clip_high_threshold"])


_POLICY = ("logprobs", "advantages")
# The clip thresholds are those of the ratio itself. gspo's defaults are the paper's, around a ratio that hardly moves.
SERVICE_LOSSES: Mapping[str, ServiceLoss] = {
    "cross_entropy": ServiceLoss(cross_entropy, several_targets=True),
    "importance_sampling": ServiceLoss(importance_sampling, _POLICY),
    "ppo": ServiceLoss(ppo, _POLICY, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    "cispo": ServiceLoss(cispo, _POLICY, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
    "dro": ServiceLoss(dro, _POLICY, {"beta": 0.05}),
    "gspo": ServiceLoss(gspo, _POLICY, {"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4}),
}
# Configuration that may also come a position at a time, as a column of the same name.
PER_POSITION = ("clip_low_threshold", "clip_high_threshold")
