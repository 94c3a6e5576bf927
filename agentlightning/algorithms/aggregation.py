"""Reductions over the tokens that the policy chose: [B, T] and its mask go in, a mean, whitened values or a scalar loss leave.

Losses are divided by the counts of the whole mini-batch, which the caller hands in: so the losses (and gradients) of
micro-batches and of workers simply add up to the global one, however the rows were cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOSS_AGG_MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@dataclass(frozen=True, slots=True)
class LossDenominators:
    """What the losses of one mini-batch are divided by, counted over all its micro-batches and workers."""

    tokens: float  # tokens that the policy chose
    sequences: float  # samples with at least one such token
    seq_norm: float  # tokens; the constant of seq-mean-token-sum-norm, the response length allowed
    rollouts: float | None = None  # rollouts with at least one such token; None where each sample is a rollout of its own


def global_denominators(mask_BT: Tensor, seq_norm: float, rollout_B: Tensor | None = None) -> LossDenominators:
    """Count a whole mini-batch. A sample without a trained token counts as no sequence, and for no rollout.

    `rollout_B`: integers, the same where samples belong to one rollout; None where each sample is one.
    Raises ValueError unless `seq_norm` (tokens) is positive.
    """
    if not seq_norm > 0:
        raise ValueError(f"seq_norm is {seq_norm}, expected a positive number of tokens (data.max_response_length)")
    chosen_BT = mask_BT.bool()
    sequence_B = chosen_BT.any(dim=-1)
    rollouts = None if rollout_B is None else float(len(rollout_B[sequence_B].unique()))
    return LossDenominators(float(chosen_BT.count_nonzero()), float(sequence_B.count_nonzero()), float(seq_norm), rollouts)


def tokens_of_rollouts(mask_BT: Tensor, rollout_B: Tensor) -> Tensor:
    """How many trained tokens the rollout of each sample has in all, int64 [B]. Hand in all samples of each rollout."""
    rollouts, place_B = rollout_B.unique(return_inverse=True)
    total_R = torch.zeros(len(rollouts), dtype=torch.int64, device=mask_BT.device)
    return total_R.index_add(0, place_B, mask_BT.bool().sum(dim=-1))[place_B]


def masked_sum(x_BT: Tensor, mask_BT: Tensor, dim: int | None = None) -> Tensor:
    """Sum where the mask is true, over `dim` or over everything. NaN and inf outside the mask do not count."""
    return torch.where(mask_BT.bool(), x_BT, 0.0).sum(dim=dim)


def masked_mean(x_BT: Tensor, mask_BT: Tensor, dim: int | None = None) -> Tensor:
    """Mean where the mask is true, over `dim` or over everything; 0 where nothing is."""
    return masked_sum(x_BT, mask_BT, dim) / mask_BT.count_nonzero(dim=dim).clamp(min=1)


def masked_whiten(x_BT: Tensor, mask_BT: Tensor, shift_mean: bool = True) -> Tensor:
    """Bring the masked values to mean 0 and standard deviation 1: (x - mean) / sqrt(var + 1e-8), var Bessel-corrected.

    With `shift_mean=False` the mean is put back. Zero outside the mask; a single value has no deviation and becomes the mean.
    """
    mean = masked_mean(x_BT, mask_BT)
    freedom = (mask_BT.count_nonzero() - 1).clamp(min=1)
    variance = masked_sum((x_BT - mean).square(), mask_BT) / freedom
    whitened_BT = (x_BT - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened_BT = whitened_BT + mean
    return torch.where(mask_BT.bool(), whitened_BT, 0.0)


def agg_loss(loss_BT: Tensor, mask_BT: Tensor, loss_agg_mode: str, denominators: LossDenominators) -> Tensor:
    """A per-token loss as one number (0-d) that adds up over micro-batches and workers. Gradients flow.

    - `token-mean`: every token of the mini-batch weighs the same (DAPO, arXiv:2503.14476).
    - `seq-mean-token-sum`: the sums of the sequences, averaged.
    - `seq-mean-token-mean`: the means of the sequences, averaged: every sequence weighs the same (GRPO, arXiv:2402.03300).
    - `seq-mean-token-sum-norm`: the sums divided by a constant length, averaged: no length bias (Dr.GRPO, arXiv:2503.20783).

    A mini-batch without a trained token has loss 0. Raises ValueError for any other mode.
    """
    sequences = max(denominators.sequences, 1.0)
    if loss_agg_mode == "token-mean":
        return masked_sum(loss_BT, mask_BT) / max(denominators.tokens, 1.0)
    if loss_agg_mode == "seq-mean-token-sum":
        return masked_sum(loss_BT, mask_BT) / sequences
    if loss_agg_mode == "seq-mean-token-mean":
        return masked_mean(loss_BT, mask_BT, dim=-1).sum() / sequences
    if loss_agg_mode == "seq-mean-token-sum-norm":
        return masked_sum(loss_BT, mask_BT) / denominators.seq_norm / sequences
    raise ValueError(f"loss_agg_mode={loss_agg_mode!r} is not one of {', '.join(LOSS_AGG_MODES)}")


def agg_rollouts(
    loss_BT: Tensor, mask_BT: Tensor, denominators: LossDenominators, rollout_tokens_BT: Tensor | None = None
) -> Tensor:
    """A per-token loss as the mean over rollouts of the mean over each rollout's tokens (0-d). Gradients flow.

    `rollout_tokens_BT` is the token count of the whole rollout that each token belongs to (see `tokens_of_rollouts`), so the
    sum is right even where a rollout's samples lie in several micro-batches. None: each sample is a rollout of its own.
    """
    if rollout_tokens_BT is None:
        rollout_tokens_BT = mask_BT.bool().sum(dim=-1, keepdim=True)
    rollouts = denominators.sequences if denominators.rollouts is None else denominators.rollouts
    return masked_sum(loss_BT / rollout_tokens_BT.clamp(min=1), mask_BT) / max(rollouts, 1.0)
