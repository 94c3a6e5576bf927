"""PPO's clipped loss: each branch by hand, its gradient by finite differences, its sums over micro-batches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from agentlightning.algorithms.aggregation import LOSS_AGG_MODES, LossDenominators, global_denominators
from agentlightning.algorithms.policy_losses.inputs import PolicyLossInputs
from agentlightning.algorithms.policy_losses.settings import PolicyLossSettings
from agentlightning.algorithms.policy_losses.vanilla import vanilla


def f64(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


SETTINGS = PolicyLossSettings(clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_c=3.0, loss_agg_mode="token-mean")


def loss_of(
    log_prob_BT: Tensor,
    old_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    denominators: LossDenominators | None = None,
    **changes: Any,
):
    inputs = PolicyLossInputs(log_prob_BT, old_BT, advantages_BT, mask_BT, denominators or global_denominators(mask_BT, 16))
    return vanilla(inputs, replace(SETTINGS, **changes))


def of_one_token(ratio: float, advantage: float) -> tuple[float, float, dict[str, float]]:
    """Loss, its derivative by log_prob, metrics."""
    log_prob_BT = f64([[math.log(ratio)]]).requires_grad_()
    loss, metrics = loss_of(log_prob_BT, f64([[0]]), f64([[advantage]]), torch.ones(1, 1, dtype=torch.bool))
    loss.backward()
    assert log_prob_BT.grad is not None
    return loss.item(), log_prob_BT.grad.item(), {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped", "clipped_lower"),
    [
        (1.1, 2.0, -2.2, -2.2, 0, 0),  # inside: -A r, slope -A r
        (1.5, 2.0, -2.6, 0.0, 1, 0),  # good and already likelier by more than clip_ratio_high: no pull
        (0.5, 2.0, -1.0, -1.0, 0, 0),  # good but has become rarer: pulled back in full
        (0.5, -2.0, 1.6, 0.0, 1, 0),  # bad and already rarer by more than clip_ratio_low: no push
        (0.9, -2.0, 1.8, 1.8, 0, 0),  # inside
        (2.5, -2.0, 5.0, 5.0, 0, 0),  # bad and likelier: pushed down in full ...
        (4.0, -2.0, 6.0, 0.0, 0, 1),  # ... up to the dual clip at c = 3
        (4.0, 2.0, -2.6, 0.0, 1, 0),  # the dual clip is for bad tokens only
        (4.0, 0.0, 0.0, 0.0, 0, 0),
    ],
)
def test_each_branch_by_hand(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: float, clipped_lower: float
):
    value, slope, metrics = of_one_token(ratio, advantage)
    assert value == pytest.approx(loss, rel=1e-12)
    assert slope == pytest.approx(gradient, rel=1e-12)
    assert metrics["pg_clipfrac"] == clipped
    assert metrics["pg_clipfrac_lower"] == clipped_lower
    assert metrics["ppo_kl"] == pytest.approx(-math.log(ratio), rel=1e-12)


def test_metrics_are_token_means_whatever_the_loss_mode():
    old_BT = torch.zeros(2, 3, dtype=torch.float64)
    log_prob_BT = f64([[math.log(1.5), math.log(4), 0], [math.log(1.1), 0.7, 9]])
    advantages_BT = f64([[1, -1, 1], [1, 1, 1]])
    mask_BT = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    for mode in LOSS_AGG_MODES:
        _, metrics = loss_of(log_prob_BT, old_BT, advantages_BT, mask_BT, loss_agg_mode=mode)
        assert metrics["pg_clipfrac"].item() == 1 / 4
        assert metrics["pg_clipfrac_lower"].item() == 1 / 4
        assert metrics["ppo_kl"].item() == pytest.approx(-(math.log(1.5) + math.log(4) + math.log(1.1)) / 4)
        assert not any(value.requires_grad for value in metrics.values())


def test_a_far_log_ratio_stays_finite_and_pulls_no_more():
    log_prob_BT = f64([[-1.0, -900.0]]).requires_grad_()
    loss, metrics = loss_of(log_prob_BT, f64([[-900.0, -1.0]]), f64([[-1, 1]]), torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx((3 - math.exp(-20)) / 2)
    assert metrics["ppo_kl"].item() == 0  # (-20 + 20) / 2
    assert log_prob_BT.grad is not None
    assert log_prob_BT.grad.tolist() == [[0, 0]]


def random_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Six samples of seven tokens whose ratios reach every branch, none nearer to a kink than the differences below step."""
    generator = torch.Generator().manual_seed(11)
    old_BT = -torch.rand(6, 7, dtype=torch.float64, generator=generator)
    log_prob_BT = old_BT + 0.8 * torch.randn(6, 7, dtype=torch.float64, generator=generator)
    advantages_BT = torch.randn(6, 7, dtype=torch.float64, generator=generator)
    mask_BT = torch.rand(6, 7, generator=generator) < 0.7
    mask_BT[3] = False
    ratio_BT = (log_prob_BT - old_BT).exp()
    assert min((ratio_BT - kink).abs().min().item() for kink in (0.8, 1.3, 3.0)) > 1e-4
    return log_prob_BT, old_BT, advantages_BT, mask_BT


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_gradient_by_finite_differences(mode: str):
    log_prob_BT, old_BT, advantages_BT, mask_BT = random_case()
    variable_BT = log_prob_BT.clone().requires_grad_()
    loss, metrics = loss_of(variable_BT, old_BT, advantages_BT, mask_BT, loss_agg_mode=mode)
    assert metrics["pg_clipfrac"] > 0
    assert metrics["pg_clipfrac_lower"] > 0
    (gradient_BT,) = torch.autograd.grad(loss, variable_BT)
    step = 1e-6
    for b in range(6):
        for t in range(7):
            nudge_BT = torch.zeros_like(log_prob_BT)
            nudge_BT[b, t] = step
            up, _ = loss_of(log_prob_BT + nudge_BT, old_BT, advantages_BT, mask_BT, loss_agg_mode=mode)
            down, _ = loss_of(log_prob_BT - nudge_BT, old_BT, advantages_BT, mask_BT, loss_agg_mode=mode)
            assert gradient_BT[b, t].item() == pytest.approx(((up - down) / (2 * step)).item(), abs=1e-8)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_micro_batches_add_up_in_loss_metrics_and_gradient(mode: str):
    log_prob_BT, *rest, mask_BT = random_case()
    log_prob_BT.requires_grad_()
    denominators = global_denominators(mask_BT, 16)
    whole, whole_metrics = loss_of(log_prob_BT, *rest, mask_BT, loss_agg_mode=mode)
    (whole_gradient_BT,) = torch.autograd.grad(whole, log_prob_BT)
    for split in ([1] * 6, [4, 2], [1, 3, 2]):
        parts = [
            loss_of(*part, loss_agg_mode=mode, denominators=denominators)
            for part in zip(*(x_BT.split(split) for x_BT in (log_prob_BT, *rest, mask_BT)), strict=True)
        ]
        total = torch.stack([loss for loss, _ in parts]).sum()
        (gradient_BT,) = torch.autograd.grad(total, log_prob_BT)
        torch.testing.assert_close(total, whole)
        torch.testing.assert_close(gradient_BT, whole_gradient_BT)
        for name, value in whole_metrics.items():
            torch.testing.assert_close(torch.stack([metrics[name] for _, metrics in parts]).sum(), value)


def test_on_policy_the_gradient_is_reinforce():
    """Ratio 1 everywhere: the gradient by each log-probability is -A / tokens."""
    log_prob_BT, _, advantages_BT, mask_BT = random_case()
    log_prob_BT.requires_grad_()
    loss, metrics = loss_of(log_prob_BT, log_prob_BT.detach(), advantages_BT, mask_BT)
    (gradient_BT,) = torch.autograd.grad(loss, log_prob_BT)
    torch.testing.assert_close(gradient_BT, -advantages_BT * mask_BT / mask_BT.sum())
    assert [float(value) for value in metrics.values()] == [0, 0, 0]


def test_padding_does_not_matter():
    log_prob_BT, old_BT, advantages_BT, mask_BT = random_case()
    pad = torch.nn.functional.pad
    loss, metrics = loss_of(log_prob_BT, old_BT, advantages_BT, mask_BT)
    wide_loss, wide_metrics = loss_of(
        pad(log_prob_BT, (0, 2), value=-3),
        pad(old_BT, (0, 2), value=torch.nan),
        pad(advantages_BT, (0, 2)),
        pad(mask_BT, (0, 2)),
    )
    torch.testing.assert_close(wide_loss, loss)
    torch.testing.assert_close(wide_metrics, metrics)


@pytest.mark.parametrize("clip_ratio_c", [1.0, 0.5, float("nan")])
def test_the_dual_clip_must_lie_above_one(clip_ratio_c: float):
    log_prob_BT, old_BT, advantages_BT, mask_BT = random_case()
    with pytest.raises(ValueError, match="clip_ratio_c"):
        loss_of(log_prob_BT, old_BT, advantages_BT, mask_BT, clip_ratio_c=clip_ratio_c)
