"""The clipped value loss: each branch by hand, its gradient by finite differences, its sums over micro-batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agentlightning.algorithms.aggregation import LOSS_AGG_MODES, global_denominators
from agentlightning.algorithms.value_loss import value_loss


def f64(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("vpred", "old", "target", "loss", "gradient", "clipped"),
    [
        (1.3, 1.0, 2.0, 0.5 * 0.49, -0.7, 0),  # within the range: the plain squared error
        (1.8, 1.0, 2.0, 0.5 * 0.25, 0.0, 1),  # moved further than 0.5 towards the return: judged at 1.5, no pull
        (0.2, 1.0, 2.0, 0.5 * 3.24, -1.8, 0),  # moved away: the plain error is the larger
        (3.0, 1.0, 2.0, 0.5 * 1.0, 1.0, 0),  # overshot: 1.0 from the return plain, 0.5 when clipped
    ],
)
def test_each_branch_by_hand(vpred: float, old: float, target: float, loss: float, gradient: float, clipped: float):
    vpreds_BT = f64([[vpred]]).requires_grad_()
    mask_BT = torch.ones(1, 1, dtype=torch.bool)
    value, metrics = value_loss(
        vpreds_BT, f64([[old]]), f64([[target]]), mask_BT, 0.5, "token-mean", global_denominators(mask_BT, 4)
    )
    (slope_BT,) = torch.autograd.grad(value, vpreds_BT)
    assert value.item() == pytest.approx(loss, rel=1e-12)
    assert slope_BT.item() == pytest.approx(gradient, abs=1e-12)
    assert metrics["vf_clipfrac"].item() == clipped
    assert metrics["vpred_mean"].item() == vpred


def random_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    values_BT, returns_BT = (torch.randn(5, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    vpreds_BT = values_BT + torch.randn(5, 6, dtype=torch.float64, generator=generator)
    mask_BT = torch.rand(5, 6, generator=generator) < 0.7
    mask_BT[1] = False
    return vpreds_BT, values_BT, returns_BT, mask_BT


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_gradient_by_finite_differences(mode: str):
    vpreds_BT, values_BT, returns_BT, mask_BT = random_case()
    denominators = global_denominators(mask_BT, 8)

    def loss_at(x_BT: Tensor) -> Tensor:
        return value_loss(x_BT, values_BT, returns_BT, mask_BT, 0.5, mode, denominators)[0]

    variable_BT = vpreds_BT.clone().requires_grad_()
    (gradient_BT,) = torch.autograd.grad(loss_at(variable_BT), variable_BT)
    assert 0 < (gradient_BT[mask_BT] == 0).sum() < mask_BT.sum()  # some are clipped, some are not
    step = 1e-6
    for b in range(5):
        for t in range(6):
            nudge_BT = torch.zeros_like(vpreds_BT)
            nudge_BT[b, t] = step
            slope = (loss_at(vpreds_BT + nudge_BT) - loss_at(vpreds_BT - nudge_BT)) / (2 * step)
            assert gradient_BT[b, t].item() == pytest.approx(slope.item(), abs=1e-8)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_micro_batches_add_up(mode: str):
    case = random_case()
    denominators = global_denominators(case[-1], 8)
    whole, whole_metrics = value_loss(*case, 0.5, mode, denominators)
    parts = [value_loss(*part, 0.5, mode, denominators) for part in zip(*(x_BT.split([1, 3, 1]) for x_BT in case), strict=True)]
    torch.testing.assert_close(torch.stack([loss for loss, _ in parts]).sum(), whole)
    for name, value in whole_metrics.items():
        torch.testing.assert_close(torch.stack([metrics[name] for _, metrics in parts]).sum(), value)


def test_metrics_are_token_means_and_padding_does_not_matter():
    vpreds_BT, values_BT, returns_BT, mask_BT = random_case()
    denominators = global_denominators(mask_BT, 8)
    loss, metrics = value_loss(vpreds_BT, values_BT, returns_BT, mask_BT, 0.5, "token-mean", denominators)
    torch.testing.assert_close(metrics["vpred_mean"], vpreds_BT[mask_BT].mean())
    garbage = [torch.where(mask_BT, x_BT, torch.nan) for x_BT in (vpreds_BT, values_BT, returns_BT)]
    same_loss, same_metrics = value_loss(*garbage, mask_BT, 0.5, "token-mean", denominators)
    torch.testing.assert_close(same_loss, loss)
    torch.testing.assert_close(same_metrics, metrics)


def test_a_wide_range_is_the_mean_squared_error():
    vpreds_BT, values_BT, returns_BT, mask_BT = random_case()
    loss, metrics = value_loss(vpreds_BT, values_BT, returns_BT, mask_BT, 1e9, "token-mean", global_denominators(mask_BT, 8))
    torch.testing.assert_close(loss, 0.5 * (vpreds_BT - returns_BT)[mask_BT].square().mean())
    assert metrics["vf_clipfrac"].item() == 0
