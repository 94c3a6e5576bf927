"""KL estimators by hand, by expectation over a real distribution and by gradient; the penalty in the reward; controllers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from agentlightning.algorithms.kl import (
    KL_PENALTIES,
    AdaptiveKLController,
    FixedKLController,
    apply_kl_penalty,
    kl_penalty,
)

NAMES = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")


def f64(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kl", [0.5, -0.25]),
        ("k1", [0.5, -0.25]),
        ("abs", [0.5, 0.25]),
        ("mse", [0.125, 0.03125]),
        ("k2", [0.125, 0.03125]),
        ("low_var_kl", [math.exp(-0.5) + 0.5 - 1, math.exp(0.25) - 0.25 - 1]),
        ("k3", [math.exp(-0.5) + 0.5 - 1, math.exp(0.25) - 0.25 - 1]),
    ],
)
@pytest.mark.parametrize("suffix", ["", "+"])
def test_values_by_hand(name: str, expected: list[float], suffix: str):
    estimate_BT = kl_penalty(f64([[-1.0, -1.5]]), f64([[-1.5, -1.25]]), name + suffix)
    torch.testing.assert_close(estimate_BT, f64([expected]), rtol=1e-12, atol=0)


def test_all_names_are_listed():
    assert set(KL_PENALTIES) == {*NAMES, *(f"{name}+" for name in NAMES)}


@pytest.mark.parametrize("name", ["full", "k4", "k3++", "+", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str):
    with pytest.raises(ValueError, match="is not one of kl, k1, abs"):
        kl_penalty(f64([[0]]), f64([[0]]), name)


def test_k3_is_clamped():
    logp_BT = f64([[-1000.0, 0.0]]).requires_grad_()
    estimate_BT = kl_penalty(logp_BT, f64([[0.0, -1000.0]]), "k3")
    (gradient_BT,) = torch.autograd.grad(estimate_BT.sum(), logp_BT)
    assert estimate_BT.tolist() == [[10, 10]]
    assert gradient_BT.tolist() == [[0, 0]]  # and not 0 * inf


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_finite_differences(name: str):
    logp_BT, ref_BT, step = f64([[-1.0, -1.5, -0.2]]), f64([[-1.5, -1.25, -3.0]]), 1e-6
    variable_BT = logp_BT.clone().requires_grad_()
    (gradient_BT,) = torch.autograd.grad(kl_penalty(variable_BT, ref_BT, name).sum(), variable_BT)
    slope_BT = (kl_penalty(logp_BT + step, ref_BT, name) - kl_penalty(logp_BT - step, ref_BT, name)) / (2 * step)
    torch.testing.assert_close(gradient_BT, slope_BT, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_a_plus_takes_the_gradient_of_k2(name: str):
    logp_BT, ref_BT = f64([[-1.0, -1.5, -30.0]]).requires_grad_(), f64([[-1.5, -1.25, 0.0]])
    (gradient_BT,) = torch.autograd.grad(kl_penalty(logp_BT, ref_BT, f"{name}+").sum(), logp_BT)
    torch.testing.assert_close(gradient_BT, (logp_BT - ref_BT).detach())


def policy_and_reference() -> tuple[Tensor, Tensor]:
    logits_V = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    ref_V = torch.tensor([0.0, 0.5, 0.2, -0.4], dtype=torch.float64).log_softmax(-1)
    return logits_V, ref_V


@pytest.mark.parametrize("name", ["k1", "k3", "k1+", "k3+"])
def test_k1_and_k3_are_unbiased(name: str):
    """Their expectation under the policy, over a whole vocabulary of four, is the KL itself."""
    logits_V, ref_V = policy_and_reference()
    logp_V = logits_V.log_softmax(-1)
    exact = (logp_V.exp() * (logp_V - ref_V)).sum()
    torch.testing.assert_close((logp_V.exp() * kl_penalty(logp_V, ref_V, name)).sum(), exact)


@pytest.mark.parametrize(("name", "right"), [("k2", True), ("k1+", True), ("k3+", True), ("k1", False), ("k3", False)])
def test_whose_expected_gradient_is_that_of_the_kl(name: str, right: bool):
    logits_V, ref_V = policy_and_reference()
    logp_V = logits_V.log_softmax(-1)
    (exact_V,) = torch.autograd.grad((logp_V.exp() * (logp_V - ref_V)).sum(), logits_V, retain_graph=True)
    sampled = (logp_V.exp().detach() * kl_penalty(logp_V, ref_V, name)).sum()
    (expected_V,) = torch.autograd.grad(sampled, logits_V)
    assert torch.allclose(expected_V, exact_V) is right


def test_the_penalty_in_the_reward_by_hand():
    scores_BT = f64([[0, 1, 0], [0, 0, 2]])
    old_BT, ref_BT = f64([[-1, -2, 5], [-1, -1, -1]]), f64([[-1.5, -1, 0], [-1, -3, -5]])
    mask_BT = torch.tensor([[1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    rewards_BT, mean_kl = apply_kl_penalty(scores_BT, old_BT, ref_BT, mask_BT, 0.1, "kl")
    torch.testing.assert_close(rewards_BT, f64([[-0.05, 1.1, 0], [0, 0, 1.6]]))
    assert mean_kl == pytest.approx(((0.5 - 1) / 2 + (0 + 4) / 2) / 2)
    assert isinstance(mean_kl, float)


def test_a_sample_without_chosen_tokens_has_no_kl():
    old_BT, ref_BT = f64([[-1, -2], [-3, torch.nan]]), f64([[-2, -4], [-1, -1]])
    mask_BT = torch.tensor([[1, 1], [0, 0]], dtype=torch.bool)
    rewards_BT, mean_kl = apply_kl_penalty(f64([[0, 0], [0, 5]]), old_BT, ref_BT, mask_BT, 1.0, "k1")
    assert rewards_BT.tolist() == [[-1, -2], [0, 5]]
    assert mean_kl == 0.75


def test_the_fixed_controller_stays():
    controller = FixedKLController(0.01)
    controller.update(5.0, 1000)
    assert controller.value == 0.01
    controller.load_state_dict({"value": 7.0})
    assert controller.value == 0.01


@pytest.mark.parametrize(
    ("current_kl", "factor"),
    [(6.0, 1.0), (6.6, 1 + 0.1 * 0.25), (60.0, 1 + 0.2 * 0.25), (5.4, 1 - 0.1 * 0.25), (0.0, 1 - 0.2 * 0.25)],
)
def test_the_adaptive_controller_by_hand(current_kl: float, factor: float):
    controller = AdaptiveKLController(0.2, target_kl=6.0, horizon=1000)
    controller.update(current_kl, n_steps=250)
    assert controller.value == pytest.approx(0.2 * factor, rel=1e-12)


def test_the_adaptive_controller_goes_on_where_it_was_saved():
    first, second = (AdaptiveKLController(0.2, target_kl=6.0, horizon=1000) for _ in range(2))
    first.update(9.0, 100)
    second.load_state_dict(first.state_dict())
    for controller in (first, second):
        controller.update(2.0, 100)
    assert first.value == second.value != 0.2


@pytest.mark.parametrize(("target_kl", "horizon"), [(0.0, 10), (-1.0, 10), (1.0, 0), (float("nan"), 10)])
def test_the_adaptive_controller_refuses_what_cannot_work(target_kl: float, horizon: float):
    with pytest.raises(ValueError, match=r"algorithm\.kl_ctrl\.target_kl > 0"):
        AdaptiveKLController(0.2, target_kl, horizon)


@pytest.mark.parametrize("current_kl", [float("nan"), float("inf")])
def test_a_kl_that_is_not_finite_does_not_reach_the_coefficient(current_kl: float):
    controller = AdaptiveKLController(0.2, target_kl=6.0, horizon=1000)
    with pytest.raises(ValueError, match="finite"):
        controller.update(current_kl, 100)
    assert controller.value == 0.2
