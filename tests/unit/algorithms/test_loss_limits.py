"""Where a loss could go wrong unseen: NaN outside the mask in the gradient, an exponent that overflows, a clip's lower side."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from agentlightning.algorithms.advantages import grpo
from agentlightning.algorithms.aggregation import LOSS_AGG_MODES, global_denominators
from agentlightning.algorithms.kl import kl_penalty
from agentlightning.algorithms.policy_losses.inputs import PolicyLossInputs
from agentlightning.algorithms.policy_losses.settings import PolicyLossSettings
from agentlightning.algorithms.policy_losses.vanilla import vanilla
from agentlightning.algorithms.value_loss import value_loss


def f64(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


NAN = math.nan
MASK_BT = torch.tensor([[1, 1, 0], [0, 1, 0]], dtype=torch.bool)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_nan_outside_the_mask_does_not_come_back_in_the_policy_gradient(mode: str):
    denominators = global_denominators(MASK_BT, 3)

    def gradient(filler: float) -> Tensor:
        columns = [f64([[-1.0, -2.0, 0], [0, -3.0, 0]]), f64([[-1.1, -1.9, 0], [0, -3.0, 0]]), f64([[1, -1, 0], [0, 2, 0]])]
        log_prob_BT, old_BT, advantages_BT = (torch.where(MASK_BT, x_BT, filler) for x_BT in columns)
        inputs = PolicyLossInputs(log_prob_BT.requires_grad_(), old_BT, advantages_BT, MASK_BT, denominators)
        loss, _ = vanilla(
            inputs, PolicyLossSettings(clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_c=3.0, loss_agg_mode=mode)
        )
        return torch.autograd.grad(loss, log_prob_BT)[0]

    torch.testing.assert_close(gradient(NAN), gradient(0.0))
    assert (gradient(NAN)[MASK_BT] != 0).all()


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_nan_outside_the_mask_does_not_come_back_in_the_value_gradient(mode: str):
    denominators = global_denominators(MASK_BT, 3)

    def gradient(filler: float) -> Tensor:
        columns = [f64([[1.0, 2.0, 0], [0, 3.0, 0]]), f64([[1.1, 1.9, 0], [0, 3.0, 0]]), f64([[2, -1, 0], [0, 2, 0]])]
        vpreds_BT, values_BT, returns_BT = (torch.where(MASK_BT, x_BT, filler) for x_BT in columns)
        loss, _ = value_loss(vpreds_BT.requires_grad_(), values_BT, returns_BT, MASK_BT, 0.5, mode, denominators)
        return torch.autograd.grad(loss, vpreds_BT)[0]

    torch.testing.assert_close(gradient(NAN), gradient(0.0))
    assert (gradient(NAN)[MASK_BT] != 0).all()


@pytest.mark.parametrize(
    ("vpred", "target", "loss", "gradient"),
    [
        (0.2, 0.0, 0.5 * 0.25, 0.0),  # moved further than 0.5 down, towards the return: judged at 0.5, no pull
        (0.7, 0.0, 0.5 * 0.49, 0.7),  # within the range
    ],
)
def test_the_value_is_clipped_below_the_old_value_too(vpred: float, target: float, loss: float, gradient: float):
    mask_BT = torch.ones(1, 1, dtype=torch.bool)
    vpreds_BT = f64([[vpred]]).requires_grad_()
    value, _ = value_loss(vpreds_BT, f64([[1.0]]), f64([[target]]), mask_BT, 0.5, "token-mean", global_denominators(mask_BT, 1))
    assert value.item() == pytest.approx(loss, rel=1e-12)
    assert torch.autograd.grad(value, vpreds_BT)[0].item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize("name", ["k3", "low_var_kl", "k3+"])
def test_an_impossible_token_leaves_k3_and_its_gradient_finite(name: str):
    """exp(800) is inf in float64, and an inf that is only clamped afterwards has the gradient 0 * inf."""
    logprob_BT = f64([[-800.0, -1.0]]).requires_grad_()
    kl_BT = kl_penalty(logprob_BT, f64([[0.0, -1.0]]), name)
    assert kl_BT.tolist() == [[10, 0]]
    (gradient_BT,) = torch.autograd.grad(kl_BT.sum(), logprob_BT)
    assert gradient_BT.isfinite().all()


def test_epsilon_bounds_what_a_nearly_equal_group_can_teach():
    # scores 0 and 2e-6: mean 1e-6, std 1e-6 * sqrt(2); with epsilon 1e-6 the advantage is 1 / (sqrt(2) + 1)
    rewards_BT, mask_BT = f64([[0.0], [2e-6]]), torch.ones(2, 1, dtype=torch.bool)
    advantages_BT, _ = grpo(rewards_BT, mask_BT, torch.tensor([3, 3]), epsilon=1e-6)
    torch.testing.assert_close(advantages_BT, f64([[-1 / (math.sqrt(2) + 1)], [1 / (math.sqrt(2) + 1)]]))
