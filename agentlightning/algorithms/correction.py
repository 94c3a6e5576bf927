"""What to do where another policy, or another numeric, has drawn the samples: weights and a smaller mask leave.

The log-probabilities of the same tokens under two policies go in: `old`, the one that is about to be trained, and `rollout`,
the one that sampled. With r = pi_old / pi_rollout (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
Training", https://fengyao.notion.site/off-policy-rl; verl, docs/algo/rollout_corr_math.md):

- weights: the loss of each token is multiplied by min(r, threshold), with the r of the token or of its whole sequence
  (truncated importance sampling);
- rejection: tokens or sequences whose r is outside [lower, upper] leave the mask and are not trained on.

If the two are the same numbers (verl's bypass mode takes the rollout's log-probs for the old ones), every r is 1: nothing is
weighted and nothing rejected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agentlightning.algorithms.aggregation import masked_mean, masked_sum

LOG_RATIO_LIMIT = 20.0  # nats, verl's: what is exponentiated stays finite
KEY = "algorithm.rollout_correction"


@dataclass(frozen=True, slots=True)
class CorrectionSettings:
    """verl's `algorithm.rollout_correction`. Raises ValueError for thresholds between which nothing can lie."""

    rollout_is: str | None = None  # weights: "token", "sequence"
    rollout_is_threshold: float = 2.0
    rollout_is_batch_normalize: bool = False  # divide the weights by their mean over what is trained
    rollout_rs: str | None = None  # rejection: "token", "sequence", "geometric"
    rollout_rs_threshold: float = 2.0
    rollout_rs_threshold_lower: float | None = None  # None: 1 / rollout_rs_threshold

    def __post_init__(self) -> None:
        for key, given, levels in (
            ("rollout_is", self.rollout_is, ("token", "sequence")),
            ("rollout_rs", self.rollout_rs, tuple(_LEVELS)),
        ):
            if given is not None and given not in levels:
                raise ValueError(f"{KEY}.{key}: given {given!r}, expected null or one of {', '.join(levels)}")
        if not self.rollout_is_threshold > 0:
            raise ValueError(
                f"{KEY}.rollout_is_threshold: given {self.rollout_is_threshold}, expected a positive ratio; mend it with "
                f"{KEY}.rollout_is_threshold=2.0"
            )
        if not 0 < self.lower <= self.rollout_rs_threshold:
            raise ValueError(
                f"{KEY}.rollout_rs_threshold: given {self.rollout_rs_threshold} with a lower bound of {self.lower:g}, expected "
                f"a ratio above it; mend it with {KEY}.rollout_rs_threshold=2.0 {KEY}.rollout_rs_threshold_lower=null"
            )

    @property
    def lower(self) -> float:
        """The smallest ratio that is not rejected."""
        if self.rollout_rs_threshold_lower is not None:
            return self.rollout_rs_threshold_lower
        return 1 / self.rollout_rs_threshold if self.rollout_rs_threshold > 0 else 0.0


@torch.no_grad()
def rollout_correction(
    old_logp_BT: Tensor, rollout_logp_BT: Tensor, mask_BT: Tensor, settings: CorrectionSettings
) -> tuple[Tensor | None, Tensor, dict[str, float]]:
    """Importance weights [B, T] (None unless `rollout_is`), the mask without what was rejected (bool), and metrics.

    Log-probabilities are in nats and are read inside the mask alone; weights are zero outside the new mask. NaN inside it is
    not rejected but stays, in the weights too, so that whoever checks for it finds it. Metrics are `rollout_corr/<name>`: those
    of `_weight_metrics` and `_rejection_metrics` if switched on, and `off_policy_metrics`; all over the mask before rejection,
    none if it is empty.
    """
    mask_BT = mask_BT.bool()
    log_ratio_BT = torch.where(mask_BT, old_logp_BT - rollout_logp_BT, 0.0)
    metrics = off_policy_metrics(old_logp_BT, rollout_logp_BT, mask_BT)
    kept_BT, weights_BT = mask_BT, None
    if settings.rollout_rs is not None:
        ratio_log_BT = _LEVELS[settings.rollout_rs](log_ratio_BT, mask_BT)
        high_BT, low_BT = ratio_log_BT > math.log(settings.rollout_rs_threshold), ratio_log_BT < math.log(settings.lower)
        kept_BT = mask_BT & ~(high_BT | low_BT)
        metrics |= _rejection_metrics(high_BT, low_BT, kept_BT, mask_BT)
    if settings.rollout_is is not None:
        ratio_BT = _exp(_LEVELS[settings.rollout_is](log_ratio_BT, mask_BT))
        weights_BT = ratio_BT.clamp(max=settings.rollout_is_threshold)
        metrics |= _weight_metrics(ratio_BT, weights_BT, mask_BT, settings)
        weights_BT = torch.where(kept_BT, weights_BT, 0.0)
        if settings.rollout_is_batch_normalize:
            mean = _mean_weight(weights_BT, kept_BT, settings.rollout_is)
            metrics["rollout_is_batch_norm_factor"] = mean
            weights_BT = weights_BT / mean
    if not bool(mask_BT.any()):
        return weights_BT, kept_BT, {}
    return weights_BT, kept_BT, {f"rollout_corr/{name}": float(value) for name, value in metrics.items()}


def off_policy_metrics(old_logp_BT: Tensor, rollout_logp_BT: Tensor, mask_BT: Tensor) -> dict[str, float]:
    """How far the two policies are apart on the sampled tokens; verl's names. With d = rollout - old, in nats:

    - `kl`: mean d a token, the k1 estimate of KL(rollout, old); `k3_kl`: mean exp(-d) + d - 1, its k3 estimate.
    - `training_ppl`, `rollout_ppl`: perplexity of a sample under the old and the rollout policy, averaged; `_log_ppl`: its log.
    - `log_ppl_diff`: mean d of a sample, averaged, `log_ppl_abs_diff`, `_max`, `_min` likewise; `ppl_ratio`: its exponential.
    - `chi2_token`, `chi2_seq`: mean r^2 - 1 over tokens and over whole samples, the variance that the weights would have.

    Samples without a token are left out.
    """
    live_B = mask_BT.any(dim=-1)
    old_logp_BT, rollout_logp_BT = (torch.where(mask_BT, logp_BT, 0.0) for logp_BT in (old_logp_BT, rollout_logp_BT))
    gap_BT = rollout_logp_BT - old_logp_BT
    old_B, rollout_B = (masked_mean(logp_BT, mask_BT, dim=-1)[live_B] for logp_BT in (old_logp_BT, rollout_logp_BT))
    gap_B = rollout_B - old_B
    if len(gap_B) == 0:
        return {}
    return {
        "kl": float(masked_mean(gap_BT, mask_BT)),
        "k3_kl": float(masked_mean(_exp(-gap_BT) + gap_BT - 1, mask_BT)),
        "training_ppl": float((-old_B).exp().mean()),
        "training_log_ppl": float(-old_B.mean()),
        "rollout_ppl": float((-rollout_B).exp().mean()),
        "rollout_log_ppl": float(-rollout_B.mean()),
        "log_ppl_diff": float(gap_B.mean()),
        "log_ppl_abs_diff": float(gap_B.abs().mean()),
        "log_ppl_diff_max": float(gap_B.max()),
        "log_ppl_diff_min": float(gap_B.min()),
        "ppl_ratio": float(gap_B.exp().mean()),
        "chi2_token": float(masked_mean(_exp(-gap_BT).square(), mask_BT) - 1),
        "chi2_seq": float(_exp(-masked_sum(gap_BT, mask_BT, dim=-1)[live_B]).square().mean() - 1),
    }


def _token(log_ratio_BT: Tensor, _mask_BT: Tensor) -> Tensor:
    return log_ratio_BT


def _sequence(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log of the product of the ratios: the ratio of the probabilities of the whole sample."""
    return masked_sum(log_ratio_BT, mask_BT, dim=-1)[:, None].expand_as(log_ratio_BT)


def _geometric(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log of the geometric mean of the ratios: that of the whole sample, whatever its length."""
    return masked_mean(log_ratio_BT, mask_BT, dim=-1)[:, None].expand_as(log_ratio_BT)


_LEVELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"token": _token, "sequence": _sequence, "geometric": _geometric}


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _mean_weight(weights_BT: Tensor, kept_BT: Tensor, level: str) -> float:
    """Over tokens, or over sequences, which have one weight each; 1 if nothing is left."""
    if not bool(kept_BT.any()):
        return 1.0
    if level == "token":
        return float(masked_mean(weights_BT, kept_BT))
    return float(masked_mean(weights_BT, kept_BT, dim=-1)[kept_BT.any(dim=-1)].mean())


def _weight_metrics(ratio_BT: Tensor, weights_BT: Tensor, mask_BT: Tensor, settings: CorrectionSettings) -> dict[str, float]:
    """Mean, deviation and effective sample size (a share of all) of the truncated weights, over tokens; largest, smallest and
    the shares above the threshold and below its reciprocal of the ratios before, over tokens or, at that level, sequences."""
    weight_N, ratio_N = weights_BT[mask_BT], ratio_BT[mask_BT]
    if len(weight_N) == 0:
        return {}
    if settings.rollout_is == "sequence":
        ratio_N = ratio_BT[mask_BT.any(dim=-1), 0]
    mean, threshold = weight_N.mean(), settings.rollout_is_threshold
    return {
        "rollout_is_mean": float(mean),
        "rollout_is_std": float(weight_N.std(correction=0)),
        "rollout_is_max": float(ratio_N.max()),
        "rollout_is_min": float(ratio_N.min()),
        "rollout_is_eff_sample_size": float(mean.square() / weight_N.square().mean()),
        "rollout_is_ratio_fraction_high": float((ratio_N > threshold).double().mean()),
        "rollout_is_ratio_fraction_low": float((ratio_N < 1 / threshold).double().mean()),
    }


def _rejection_metrics(high_BT: Tensor, low_BT: Tensor, kept_BT: Tensor, mask_BT: Tensor) -> dict[str, float]:
    """Shares of tokens that were rejected, as too likely and as too unlikely, and of samples that lost any."""
    tokens, samples = max(int(mask_BT.sum()), 1), max(int(mask_BT.any(dim=-1).sum()), 1)
    lost_BT = mask_BT & ~kept_BT
    return {
        "rollout_rs_masked_fraction": int(lost_BT.sum()) / tokens,
        "rollout_rs_seq_masked_fraction": int(lost_BT.any(dim=-1).sum()) / samples,
        "rollout_rs_ratio_fraction_high": int((high_BT & mask_BT).sum()) / tokens,
        "rollout_rs_ratio_fraction_low": int((low_BT & mask_BT).sum()) / tokens,
    }
