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


def global_denominators(mask_BT: Tensor, seq_norm: float) -> LossDenominators:
    """Count a whole mini-batch. A sample without a trained token counts as no sequence.

    Raises ValueError unless `seq_norm` (tokens) is positive.
    """
    if not seq_norm > 0:
        raise ValueError(f"seq_norm is {seq_norm}, expected a positive number of tokens (data.max_response_length)")
    chosen_BT = mask_BT.bool()
    return LossDenominators(float(chosen_BT.sum()), float(chosen_BT.any(dim=-1).sum()), float(seq_norm))


def masked_sum(x_BT: Tensor, mask_BT: Tensor, dim: int | None = None) -> Tensor:
    """Sum where the mask is true, over `dim` or over everything. NaN and inf outside the mask do not count."""
    return torch.where(mask_BT.bool(), x_BT, 0.0).sum(dim=dim)


def masked_mean(x_BT: Tensor, mask_BT: Tensor, dim: int | None = None) -> Tensor:
    """Mean where the mask is true, over `dim` or over everything; 0 where nothing is."""
    return masked_sum(x_BT, mask_BT, dim) / mask_BT.bool().sum(dim=dim).clamp(min=1)


def masked_whiten(x_BT: Tensor, mask_BT: Tensor, shift_mean: bool = True) -> Tensor:
    """Bring the masked values to mean 0 and standard deviation 1: (x - mean) / sqrt(var + 1e-8), var Bessel-corrected.

    With `shift_mean=False` the mean is put back. Zero outside the mask; a single value has no deviation and becomes the mean.
    """
    mean = masked_mean(x_BT, mask_BT)
    freedom = (mask_BT.bool().sum() - 1).clamp(min=1)
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
