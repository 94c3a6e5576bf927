"""Weights, rejection and their metrics against plain loops and against expectations that are known exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from agentlightning.algorithms.correction import CorrectionSettings, off_policy_metrics, rollout_correction

GENERATOR = torch.Generator().manual_seed(4)
MASK_BT = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
ROLLOUT_BT = -3 * torch.rand(4, 4, dtype=torch.float64, generator=GENERATOR)
OLD_BT = ROLLOUT_BT + 0.5 * torch.randn(4, 4, dtype=torch.float64, generator=GENERATOR)


def ratio(b: int, level: str) -> list[float]:
    """The ratio that each chosen token of sample b has at a level."""
    logs = [(OLD_BT - ROLLOUT_BT)[b, t].item() for t in range(4) if MASK_BT[b, t]]
    if level == "token":
        return [math.exp(x) for x in logs]
    total = sum(logs) if level == "sequence" else sum(logs) / max(len(logs), 1)
    return [math.exp(total)] * len(logs)


def by_hand(level: str, function) -> list[list[float]]:
    rows = []
    for b in range(4):
        values = iter(ratio(b, level))
        rows.append([function(next(values)) if MASK_BT[b, t] else 0.0 for t in range(4)])
    return rows


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_are_truncated_ratios(level: str):
    settings = CorrectionSettings(rollout_is=level, rollout_is_threshold=1.2)
    weights_BT, mask_BT, _ = rollout_correction(OLD_BT, ROLLOUT_BT, MASK_BT, settings)
    expected = torch.tensor(by_hand(level, lambda r: min(r, 1.2)), dtype=torch.float64)
    assert weights_BT is not None
    torch.testing.assert_close(weights_BT, expected)
    assert (expected == 1.2).any()
    assert ((expected > 0) & (expected < 1.2)).any()
    assert torch.equal(mask_BT, MASK_BT)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("lower", [None, 0.9])
def test_rejection_keeps_what_lies_between_the_thresholds(level: str, lower: float | None):
    settings = CorrectionSettings(rollout_rs=level, rollout_rs_threshold=1.5, rollout_rs_threshold_lower=lower)
    weights_BT, mask_BT, metrics = rollout_correction(OLD_BT, ROLLOUT_BT, MASK_BT, settings)
    low = 1 / 1.5 if lower is None else lower
    expected_BT = torch.tensor(by_hand(level, lambda r: float(low <= r <= 1.5))).bool()
    assert weights_BT is None
    assert torch.equal(mask_BT, expected_BT)
    assert expected_BT.any()
    lost = MASK_BT & ~expected_BT
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(lost.sum().item() / 8)
    assert metrics["rollout_corr/rollout_rs_seq_masked_fraction"] == pytest.approx(lost.any(-1).sum().item() / 3)
    shares = [metrics[f"rollout_corr/rollout_rs_ratio_fraction_{side}"] for side in ("high", "low")]
    assert sum(shares) == pytest.approx(lost.sum().item() / 8)


def test_normalised_weights_have_mean_one_over_the_tokens_that_are_left():
    settings = CorrectionSettings("token", 2.0, True, "token", 1.5)
    weights_BT, mask_BT, metrics = rollout_correction(OLD_BT, ROLLOUT_BT, MASK_BT, settings)
    raw_BT, _, _ = rollout_correction(OLD_BT, ROLLOUT_BT, MASK_BT, CorrectionSettings("token", 2.0, False, "token", 1.5))
    assert weights_BT is not None
    assert raw_BT is not None
    assert weights_BT[mask_BT].mean().item() == pytest.approx(1)
    assert weights_BT[~mask_BT].abs().max() == 0
    torch.testing.assert_close(weights_BT * metrics["rollout_corr/rollout_is_batch_norm_factor"], raw_BT)


def test_normalised_sequence_weights_have_mean_one_over_sequences():
    weights_BT, _, _ = rollout_correction(OLD_BT, ROLLOUT_BT, MASK_BT, CorrectionSettings("sequence", 5.0, True))
    assert weights_BT is not None
    assert sum(weights_BT[b, 0].item() for b in (0, 1, 3)) / 3 == pytest.approx(1)


def test_without_truncation_the_weighted_mean_is_that_of_the_other_policy():
    """E_rollout[r * f] = E_old[f], exactly, over all answers of a policy of two tokens of three values."""
    rollout_V, old_V = (torch.randn(3, dtype=torch.float64, generator=GENERATOR).log_softmax(-1) for _ in range(2))
    answers = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    reward_B = torch.randn(9, dtype=torch.float64, generator=GENERATOR)
    settings = CorrectionSettings("sequence", rollout_is_threshold=1e6)
    weights_BT, _, _ = rollout_correction(old_V[answers], rollout_V[answers], torch.ones(9, 2), settings)
    assert weights_BT is not None
    chance_B, target_B = (logp_V[answers].sum(-1).exp() for logp_V in (rollout_V, old_V))
    torch.testing.assert_close((chance_B * weights_BT[:, 0] * reward_B).sum(), (target_B * reward_B).sum())


def test_weight_metrics_by_hand():
    # ratios 4 and 1 and 0.25, truncated at 2: weights 2, 1, 0.25
    old_BT = torch.tensor([[4.0, 1.0, 0.25]], dtype=torch.float64).log()
    _, _, metrics = rollout_correction(old_BT, torch.zeros_like(old_BT), torch.ones(1, 3), CorrectionSettings("token"))
    found = {name.removeprefix("rollout_corr/rollout_is_"): value for name, value in metrics.items() if "rollout_is" in name}
    mean, square = 3.25 / 3, (4 + 1 + 0.0625) / 3
    expected = {
        "mean": mean,
        "std": math.sqrt(square - mean**2),
        "max": 4,
        "min": 0.25,
        "eff_sample_size": mean**2 / square,
        "ratio_fraction_high": 1 / 3,
        "ratio_fraction_low": 1 / 3,
    }
    assert found == pytest.approx(expected)


def test_off_policy_metrics_against_loops():
    gap = [[(ROLLOUT_BT - OLD_BT)[b, t].item() for t in range(4) if MASK_BT[b, t]] for b in (0, 1, 3)]
    old = [[OLD_BT[b, t].item() for t in range(4) if MASK_BT[b, t]] for b in (0, 1, 3)]
    tokens = [d for row in gap for d in row]
    means = [sum(row) / len(row) for row in gap]
    metrics = off_policy_metrics(OLD_BT, ROLLOUT_BT, MASK_BT)
    expected = {
        "kl": sum(tokens) / 8,
        "k3_kl": sum(math.exp(-d) + d - 1 for d in tokens) / 8,
        "training_ppl": sum(math.exp(-sum(row) / len(row)) for row in old) / 3,
        "log_ppl_diff": sum(means) / 3,
        "log_ppl_abs_diff": sum(map(abs, means)) / 3,
        "log_ppl_diff_max": max(means),
        "log_ppl_diff_min": min(means),
        "ppl_ratio": sum(map(math.exp, means)) / 3,
        "chi2_token": sum(math.exp(-2 * d) for d in tokens) / 8 - 1,
        "chi2_seq": sum(math.exp(-2 * sum(row)) for row in gap) / 3 - 1,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["rollout_log_ppl"] == pytest.approx(metrics["training_log_ppl"] - metrics["log_ppl_diff"])
    assert metrics["rollout_ppl"] > 1


def test_equal_policies_weigh_one_and_reject_nothing():
    """What verl's bypass mode comes to."""
    settings = CorrectionSettings("sequence", 1.0, True, "geometric", 1.0001)
    weights_BT, mask_BT, metrics = rollout_correction(OLD_BT, OLD_BT, MASK_BT, settings)
    assert weights_BT is not None
    assert torch.equal(weights_BT, MASK_BT.double())
    assert torch.equal(mask_BT, MASK_BT)
    assert metrics["rollout_corr/kl"] == metrics["rollout_corr/chi2_seq"] == 0
    assert metrics["rollout_corr/rollout_is_eff_sample_size"] == 1


SETTINGS = [
    CorrectionSettings(is_, 2.0, True, rs, 1.5) for is_ in ("token", "sequence") for rs in ("token", "sequence", "geometric")
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.rollout_is} {s.rollout_rs}")
def test_nan_outside_the_mask_is_not_read(settings: CorrectionSettings):
    holes = [torch.where(MASK_BT, x_BT, torch.nan) for x_BT in (OLD_BT, ROLLOUT_BT)]
    with_nan, without = (rollout_correction(*logps, MASK_BT, settings) for logps in (holes, [OLD_BT, ROLLOUT_BT]))
    torch.testing.assert_close(with_nan, without)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_nan_inside_the_mask_is_not_rejected_in_silence(level: str):
    old_BT: Tensor = OLD_BT.clone()
    old_BT[0, 0] = torch.nan
    settings = CorrectionSettings(level, rollout_rs=level)
    weights_BT, mask_BT, _ = rollout_correction(old_BT, ROLLOUT_BT, MASK_BT, settings)
    assert weights_BT is not None
    assert bool(mask_BT[0, 0])
    assert math.isnan(weights_BT[0, 0])


def test_extreme_ratios_stay_finite():
    far_BT = torch.tensor([[-500.0, 500.0]])
    weights_BT, _, metrics = rollout_correction(far_BT, torch.zeros(1, 2), torch.ones(1, 2), CorrectionSettings("token"))
    assert weights_BT is not None
    assert weights_BT.tolist() == [[pytest.approx(0, abs=1e-8), 2]]
    finite = {name for name, value in metrics.items() if math.isfinite(value)}
    assert {f"rollout_corr/{name}" for name in ("rollout_is_max", "k3_kl", "chi2_token", "chi2_seq")} <= finite


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=["token", "sequence"])
def test_an_empty_mask_gives_zeros_and_no_metrics(settings: CorrectionSettings):
    weights_BT, mask_BT, metrics = rollout_correction(OLD_BT, ROLLOUT_BT, torch.zeros_like(MASK_BT), settings)
    assert weights_BT is not None
    assert weights_BT.abs().max() == 0
    assert not mask_BT.any()
    assert metrics == {}


def test_all_rejected_gives_zeros():
    settings = CorrectionSettings("token", 2.0, True, "token", 1.5)
    weights_BT, mask_BT, metrics = rollout_correction(OLD_BT + 5, ROLLOUT_BT, MASK_BT, settings)
    assert weights_BT is not None
    assert weights_BT.abs().max() == 0
    assert not mask_BT.any()
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == 1
    assert metrics["rollout_corr/rollout_is_batch_norm_factor"] == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rollout_is": "geometric"}, "rollout_is: given 'geometric'"),
        ({"rollout_rs": "row"}, "rollout_rs: given 'row'"),
        ({"rollout_is_threshold": 0.0}, "rollout_is_threshold=2.0"),
        ({"rollout_rs_threshold": 0.5}, "rollout_rs_threshold=2.0"),
        ({"rollout_rs_threshold": 1.1, "rollout_rs_threshold_lower": 1.2}, "rollout_rs_threshold_lower=null"),
    ],
)
def test_settings_between_which_nothing_lies_are_refused(wrong: dict[str, object], words: str):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        CorrectionSettings(**wrong)  # pyright: ignore[reportArgumentType]
