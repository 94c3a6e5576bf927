"""Masked means, whitening and the four ways to make one number of a loss, against sums done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from agentlightning.algorithms.aggregation import (
    LOSS_AGG_MODES,
    LossDenominators,
    agg_loss,
    global_denominators,
    masked_mean,
    masked_sum,
    masked_whiten,
)


def f64(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


LOSS_BT = f64([[1, 2, 4, 9], [3, 9, 9, 9], [9, 9, 9, 9]])
MASK_BT = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)


def test_masked_sum_and_mean_by_hand():
    assert masked_sum(LOSS_BT, MASK_BT).item() == 10
    assert masked_mean(LOSS_BT, MASK_BT).item() == 2.5
    assert masked_sum(LOSS_BT, MASK_BT, dim=-1).tolist() == [7, 3, 0]
    assert masked_mean(LOSS_BT, MASK_BT, dim=-1).tolist() == [7 / 3, 3, 0]
    assert masked_mean(LOSS_BT, MASK_BT, dim=0).tolist() == [2, 2, 4, 0]


def test_a_float_mask_means_the_same():
    assert masked_mean(LOSS_BT, MASK_BT.double()).item() == 2.5
    assert global_denominators(MASK_BT.double(), 8) == global_denominators(MASK_BT, 8)


def test_nan_outside_the_mask_does_not_count():
    poisoned_BT = torch.where(MASK_BT, LOSS_BT, torch.nan)
    assert masked_mean(poisoned_BT, MASK_BT).item() == 2.5
    for mode in LOSS_AGG_MODES:
        denominators = global_denominators(MASK_BT, 8)
        assert agg_loss(poisoned_BT, MASK_BT, mode, denominators) == agg_loss(LOSS_BT, MASK_BT, mode, denominators)


def test_whitened_values_by_hand():
    # 1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, over n - 1 = 3
    x_BT = f64([[1, 2, 50], [3, 6, -7]])
    mask_BT = torch.tensor([[True, True, False], [True, True, False]])
    deviation = math.sqrt(14 / 3 + 1e-8)
    expected_BT = f64([[-2 / deviation, -1 / deviation, 0], [0, 3 / deviation, 0]])
    torch.testing.assert_close(masked_whiten(x_BT, mask_BT), expected_BT)
    kept_BT = masked_whiten(x_BT, mask_BT, shift_mean=False)
    torch.testing.assert_close(kept_BT, expected_BT + 3 * mask_BT)


def test_whitening_little_or_nothing_gives_zeros():
    x_BT = f64([[5, 7]])
    assert masked_whiten(x_BT, torch.tensor([[False, False]])).tolist() == [[0, 0]]
    assert masked_whiten(x_BT, torch.tensor([[True, False]])).tolist() == [[0, 0]]
    assert masked_whiten(x_BT, torch.tensor([[True, False]]), shift_mean=False).tolist() == [[5, 0]]
    assert masked_whiten(f64([[5, 5]]), torch.tensor([[True, True]])).tolist() == [[0, 0]]


def test_denominators_count_chosen_tokens_and_sequences_that_have_some():
    assert global_denominators(MASK_BT, 8) == LossDenominators(tokens=4.0, sequences=2.0, seq_norm=8.0)


@pytest.mark.parametrize("seq_norm", [0, -1, float("nan")])
def test_seq_norm_must_be_positive(seq_norm: float):
    with pytest.raises(ValueError, match="seq_norm"):
        global_denominators(MASK_BT, seq_norm)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 10 / 4),
        ("seq-mean-token-sum", (7 + 3) / 2),
        ("seq-mean-token-mean", (7 / 3 + 3) / 2),
        ("seq-mean-token-sum-norm", (7 / 8 + 3 / 8) / 2),
    ],
)
def test_agg_loss_by_hand(mode: str, expected: float):
    loss = agg_loss(LOSS_BT, MASK_BT, mode, global_denominators(MASK_BT, 8))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-15)


def test_an_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'mean' is not one of token-mean, seq-mean-token-sum"):
        agg_loss(LOSS_BT, MASK_BT, "mean", global_denominators(MASK_BT, 8))


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_micro_batches_add_up_to_the_global_loss_and_gradient(mode: str):
    generator = torch.Generator().manual_seed(3)
    loss_BT = torch.randn(7, 5, dtype=torch.float64, generator=generator).requires_grad_()
    mask_BT = torch.rand(7, 5, generator=generator) < 0.6
    mask_BT[4] = False
    denominators = global_denominators(mask_BT, 6)
    whole = agg_loss(loss_BT, mask_BT, mode, denominators)
    (whole_gradient_BT,) = torch.autograd.grad(whole, loss_BT)
    for split in ([7], [1] * 7, [2, 4, 1], [3, 1, 3]):
        parts = [
            agg_loss(loss, mask, mode, denominators)
            for loss, mask in zip(loss_BT.split(split), mask_BT.split(split), strict=True)
        ]
        torch.testing.assert_close(torch.stack(parts).sum(), whole)
        (gradient_BT,) = torch.autograd.grad(torch.stack(parts).sum(), loss_BT)
        torch.testing.assert_close(gradient_BT, whole_gradient_BT)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_padding_and_the_order_of_samples_do_not_matter(mode: str):
    denominators = global_denominators(MASK_BT, 8)
    whole = agg_loss(LOSS_BT, MASK_BT, mode, denominators)
    wide = agg_loss(
        torch.nn.functional.pad(LOSS_BT, (0, 3), value=77), torch.nn.functional.pad(MASK_BT, (0, 3)), mode, denominators
    )
    order = [2, 0, 1]
    torch.testing.assert_close(wide, whole)
    torch.testing.assert_close(agg_loss(LOSS_BT[order], MASK_BT[order], mode, denominators), whole)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_a_mini_batch_without_tokens_has_loss_zero_and_no_gradient(mode: str):
    nothing_BT = torch.zeros_like(MASK_BT)
    loss_BT = LOSS_BT.clone().requires_grad_()
    loss = agg_loss(loss_BT, nothing_BT, mode, global_denominators(nothing_BT, 8))
    (gradient_BT,) = torch.autograd.grad(loss, loss_BT)
    assert loss.item() == 0
    assert gradient_BT.abs().sum().item() == 0
