"""All policy losses: against the formula in Python floats, gradients by finite differences, and what must change nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from policy_loss_reference import REFERENCE, SETTINGS, random_inputs, ratio_clip, sequences_of
from torch import Tensor

from agentlightning.algorithms.aggregation import global_denominators, tokens_of_rollouts
from agentlightning.algorithms.policy_losses.inputs import PolicyLossInputs
from agentlightning.algorithms.policy_losses.names import POLICY_LOSSES

MODES = list(POLICY_LOSSES)
COLUMNS = (
    "log_prob_BT",
    "old_log_prob_BT",
    "advantages_BT",
    "mask_BT",
    "rollout_is_weights_BT",
    "selected_BT",
    "rollout_tokens_BT",
)


def run(mode: str, inputs: PolicyLossInputs) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, metrics, gradient by log_prob [B, T]."""
    variable_BT = inputs.log_prob_BT.detach().clone().requires_grad_()
    loss, metrics = POLICY_LOSSES[mode](replace(inputs, log_prob_BT=variable_BT), SETTINGS)
    (gradient_BT,) = torch.autograd.grad(loss, variable_BT)
    return loss.detach(), metrics, gradient_BT


def with_columns(inputs: PolicyLossInputs, change) -> PolicyLossInputs:
    """`change(name, column)` for every column that is there; the denominators stay."""
    found = {name: getattr(inputs, name) for name in COLUMNS}
    return replace(inputs, **{name: change(name, x_BT) for name, x_BT in found.items() if x_BT is not None})


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_the_formula(mode: str):
    inputs = random_inputs()
    loss, metrics, _ = run(mode, inputs)
    sequences = sequences_of(inputs)
    assert loss.item() == pytest.approx(REFERENCE[mode](sequences), rel=1e-12)
    tokens = [t for s in sequences for t in s]
    assert metrics["ppo_kl"].item() == pytest.approx(sum(-t.d for t in tokens) / len(tokens), rel=1e-12)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("gspo", "cispo")])
def test_the_gradient_is_that_of_finite_differences(mode: str):
    inputs = random_inputs()
    _, _, gradient_BT = run(mode, inputs)
    step = 1e-6
    for b, t in inputs.mask_BT.nonzero().tolist():
        nudge_BT = torch.zeros_like(inputs.log_prob_BT)
        nudge_BT[b, t] = step
        up, down = (
            REFERENCE[mode](sequences_of(replace(inputs, log_prob_BT=inputs.log_prob_BT + sign * nudge_BT))) for sign in (1, -1)
        )
        assert gradient_BT[b, t].item() == pytest.approx((up - down) / (2 * step), abs=1e-8)
    assert gradient_BT[~inputs.mask_BT].abs().sum() == 0


def test_cispo_stops_the_gradient_at_the_weight():
    """No token loses its gradient: it is the clipped ratio times -A."""
    inputs = random_inputs()
    _, metrics, gradient_BT = run("cispo", inputs)
    tokens = inputs.mask_BT.sum().item()
    assert 0 < metrics["pg_clipfrac"] < 1
    for b, t in inputs.mask_BT.nonzero().tolist():
        weight = ratio_clip(math.exp(inputs.log_prob_BT[b, t].item() - inputs.old_log_prob_BT[b, t].item()))
        expected = -weight * (inputs.rollout_is_weights_BT * inputs.advantages_BT)[b, t].item() / tokens
        assert gradient_BT[b, t].item() == pytest.approx(expected, rel=1e-12)


def test_gspo_gives_each_token_the_sequence_ratio_and_its_own_gradient():
    """-A * s / (sequence length * sequences) where the sequence is not clipped, 0 where it is: nothing flows through s."""
    inputs = random_inputs()
    _, _, gradient_BT = run("gspo", inputs)
    clipped = 0
    for b in (0, 1, 2, 4, 5):
        places = inputs.mask_BT[b].nonzero().flatten().tolist()
        log_ratio_T = inputs.log_prob_BT[b] - inputs.old_log_prob_BT[b]
        s = math.exp(sum(log_ratio_T[t].item() for t in places) / len(places))
        for t in places:
            a, w = inputs.advantages_BT[b, t].item(), inputs.rollout_is_weights_BT[b, t].item()
            held = -a * ratio_clip(s) > -a * s
            clipped += held
            assert gradient_BT[b, t].item() == pytest.approx(0 if held else -w * a * s / len(places) / 5, rel=1e-12)
    assert clipped > 0, "the case must reach the clip"


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, SETTINGS.tau_pos), (-2.0, SETTINGS.tau_neg)])
def test_sapo_weighs_the_gradient_by_the_papers_gate(advantage: float, tau: float):
    """arXiv:2511.20347: the gradient of -A r times sech^2(tau / 2 * (r - 1)), which is 1 on policy."""
    mask_BT = torch.ones(1, 1, dtype=torch.bool)
    for r in (0.3, 1.0, 2.5):
        log_prob_BT = torch.tensor([[math.log(r)]], dtype=torch.float64)
        zero_BT = torch.zeros_like(log_prob_BT)
        inputs = PolicyLossInputs(log_prob_BT, zero_BT, zero_BT + advantage, mask_BT, global_denominators(mask_BT, 1))
        _, metrics, gradient_BT = run("sapo", inputs)
        gate = 1 / math.cosh(tau / 2 * (r - 1)) ** 2
        assert gradient_BT.item() == pytest.approx(-advantage * r * gate, rel=1e-12)
        assert metrics["sapo_gate"].item() == pytest.approx(gate, rel=1e-12)


def test_geo_mean_counts_the_tokens_that_its_clip_changes():
    mask_BT = torch.ones(1, 4, dtype=torch.bool)
    log_ratio_BT = torch.tensor([[0.4, -0.4, 0.4, -0.4]], dtype=torch.float64)
    advantages_BT = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    inputs = PolicyLossInputs(
        log_ratio_BT, torch.zeros_like(log_ratio_BT), advantages_BT, mask_BT, global_denominators(mask_BT, 4)
    )
    _, metrics, _ = run("geo_mean", inputs)
    assert metrics["pg_clipfrac"].item() == 1 / 4  # good and likelier by more than 0.3
    assert metrics["pg_clipfrac_lower"].item() == 1 / 4  # bad and rarer by more than 0.2


@pytest.mark.parametrize("mode", ["clip_cov", "kl_cov"])
def test_the_chosen_tokens_are_counted_and_must_be_given(mode: str):
    inputs = random_inputs()
    _, metrics, _ = run(mode, inputs)
    share = sum(t.chosen for s in sequences_of(inputs) for t in s) / inputs.mask_BT.sum().item()
    assert metrics["pg_clipfrac" if mode == "clip_cov" else "kl_cov_frac"].item() == pytest.approx(share, rel=1e-12)
    with pytest.raises(ValueError, match="selected_BT"):
        POLICY_LOSSES[mode](replace(inputs, selected_BT=None), SETTINGS)


@pytest.mark.parametrize("mode", MODES)
def test_on_policy_the_gradient_is_reinforce(mode: str):
    """Ratio 1: each token's gradient is -A over the count that the loss is averaged by; kl_cov's penalty has none there."""
    inputs = replace(random_inputs(), rollout_is_weights_BT=None)
    advantage_B1 = inputs.advantages_BT[:, :1]
    inputs = replace(
        inputs,
        old_log_prob_BT=inputs.log_prob_BT,
        advantages_BT=advantage_B1.expand(-1, 7),
        selected_BT=torch.zeros_like(inputs.mask_BT) if mode == "clip_cov" else inputs.selected_BT,
    )
    _, metrics, gradient_BT = run(mode, inputs)
    length_B1 = inputs.mask_BT.sum(dim=1, keepdim=True)
    by_sequence = mode in ("gspo", "sapo", "geo_mean", "per_rollout_mean")
    count_B1 = length_B1 * 5 if by_sequence else length_B1.sum().expand(6, 1)
    torch.testing.assert_close(gradient_BT, torch.where(inputs.mask_BT, -advantage_B1 / count_B1, 0.0))
    assert metrics["ppo_kl"] == 0


def test_kl_cov_does_not_pull_by_the_sign_of_noise():
    """A second pass over the same weights differs by a float's last bits; |d| would turn them into a whole gradient."""
    inputs = random_inputs()
    still = replace(inputs, old_log_prob_BT=inputs.log_prob_BT)
    noisy = replace(inputs, old_log_prob_BT=inputs.log_prob_BT + 1e-6 * (inputs.advantages_BT.sign()))
    torch.testing.assert_close(run("kl_cov", noisy)[2], run("kl_cov", still)[2], rtol=1e-5, atol=1e-5)
    moved = replace(inputs, old_log_prob_BT=inputs.log_prob_BT + 1e-4)
    assert (run("kl_cov", moved)[2] - run("kl_cov", still)[2]).abs().max() > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_and_padding_change_nothing(mode: str):
    inputs = random_inputs()
    loss, metrics, gradient_BT = run(mode, inputs)
    pad = {"log_prob_BT": -3.0, "old_log_prob_BT": math.nan, "rollout_is_weights_BT": math.nan}

    def part(rows: list[int]) -> PolicyLossInputs:
        def cut(name: str, x_BT: Tensor) -> Tensor:
            return torch.nn.functional.pad(x_BT[rows], (0, 2), value=pad.get(name, 0))

        return with_columns(inputs, cut)

    for split in ([[0], [1], [2], [3], [4], [5]], [[5, 0, 3], [2, 4, 1]], [[1, 3], [4, 5, 2, 0]]):
        parts = [run(mode, part(rows)) for rows in split]
        torch.testing.assert_close(torch.stack([p[0] for p in parts]).sum(), loss)
        for rows, (_, _, part_gradient_bT) in zip(split, parts, strict=True):
            torch.testing.assert_close(part_gradient_bT[:, :7], gradient_BT[rows])
        for name, value in metrics.items():
            torch.testing.assert_close(torch.stack([p[1][name] for p in parts]).sum(), value)


@pytest.mark.parametrize("mode", MODES)
def test_nan_outside_the_mask_changes_neither_loss_nor_gradient(mode: str):
    inputs = random_inputs()
    loss, metrics, gradient_BT = run(mode, inputs)

    def poison(name: str, x_BT: Tensor) -> Tensor:
        return torch.where(inputs.mask_BT, x_BT, math.nan) if x_BT.is_floating_point() else x_BT

    variable_BT = torch.where(inputs.mask_BT, inputs.log_prob_BT, math.nan).requires_grad_()
    poisoned = replace(with_columns(inputs, poison), log_prob_BT=variable_BT)
    poisoned_loss, poisoned_metrics = POLICY_LOSSES[mode](poisoned, SETTINGS)
    torch.testing.assert_close(poisoned_loss.detach(), loss)
    torch.testing.assert_close(poisoned_metrics, metrics)
    torch.testing.assert_close(torch.autograd.grad(poisoned_loss, variable_BT)[0], gradient_BT)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [6, 0])
def test_nothing_to_train_on_is_zero(mode: str, rows: int):
    inputs = with_columns(random_inputs(), lambda name, x_BT: x_BT[:rows])
    mask_BT = torch.zeros_like(inputs.mask_BT)
    inputs = replace(inputs, mask_BT=mask_BT, denominators=global_denominators(mask_BT, 16))
    loss, metrics, gradient_BT = run(mode, inputs)
    assert loss == 0
    assert all(value == 0 for value in metrics.values())
    assert (gradient_BT == 0).all()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "kl_cov"])
def test_a_sample_without_advantage_adds_exactly_nothing(mode: str):
    """What the update relies on when it leaves such samples out."""
    inputs = random_inputs()
    advantages_BT = inputs.advantages_BT.clone()
    advantages_BT[2] = 0
    _, _, gradient_BT = run(mode, replace(inputs, advantages_BT=advantages_BT))
    assert (gradient_BT[2] == 0).all()
    alone = with_columns(replace(inputs, advantages_BT=advantages_BT), lambda name, x_BT: x_BT[2:3])
    assert run(mode, alone)[0] == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_far_log_ratio_stays_finite(mode: str):
    mask_BT = torch.ones(2, 2, dtype=torch.bool)
    log_prob_BT = torch.tensor([[-1.0, -900.0], [-900.0, -900.0]])
    old_BT = torch.tensor([[-900.0, -1.0], [-1.0, -900.0]])
    advantages_BT = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    inputs = PolicyLossInputs(
        log_prob_BT, old_BT, advantages_BT, mask_BT, global_denominators(mask_BT, 4), selected_BT=torch.ones_like(mask_BT)
    )
    loss, _, gradient_BT = run(mode, inputs)
    assert loss.isfinite()
    assert gradient_BT.isfinite().all()


def test_a_rollout_of_several_samples_counts_once_however_it_is_cut():
    # rollout 7: samples 0 and 2 with 2 + 1 tokens; rollout 4: sample 1 with 2 tokens; sample 3 has none
    mask_BT = torch.tensor([[1, 1], [1, 1], [0, 1], [0, 0]], dtype=torch.bool)
    rollout_B = torch.tensor([7, 4, 7, 9])
    advantages_BT = torch.tensor([[1.0, 2.0], [4.0, 8.0], [9.0, 6.0], [9.0, 9.0]], dtype=torch.float64)
    zero_BT = torch.zeros_like(advantages_BT)
    denominators = global_denominators(mask_BT, 2, rollout_B)
    assert denominators.rollouts == 2
    tokens_B = tokens_of_rollouts(mask_BT, rollout_B)
    assert tokens_B.tolist() == [3, 2, 3, 0]
    inputs = PolicyLossInputs(
        zero_BT, zero_BT, advantages_BT, mask_BT, denominators, rollout_tokens_BT=tokens_B[:, None].expand(-1, 2)
    )
    loss, _, _ = run("per_rollout_mean", inputs)
    assert loss.item() == pytest.approx(-((1 + 2 + 6) / 3 + (4 + 8) / 2) / 2, rel=1e-12)
    parts = [run("per_rollout_mean", with_columns(inputs, lambda name, x_BT, r=r: x_BT[r]))[0] for r in ([0, 1], [2], [3])]
    torch.testing.assert_close(torch.stack(parts).sum(), loss)
