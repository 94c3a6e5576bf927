"""The estimators beside GAE, GRPO and RLOO: by hand, against their formulas as plain loops, and by their invariants."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from agentlightning.algorithms.advantages import (
    gdpo,
    gpg,
    grpo,
    grpo_passk,
    opo,
    optimal_token_baseline,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
)


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def at_end(scores: list[float], lengths: list[int], width: int) -> Tensor:
    rewards_BT = torch.zeros(len(scores), width, dtype=torch.float64)
    rewards_BT[torch.arange(len(scores)), torch.tensor(lengths) - 1] = f64(scores)
    return rewards_BT


def whitened_by_hand(values_BT: list[list[float]], mask_BT: Tensor) -> list[list[float]]:
    flat = [x for row, mask in zip(values_BT, mask_BT.tolist(), strict=True) for x, m in zip(row, mask, strict=True) if m]
    mean, variance = statistics.mean(flat), statistics.variance(flat)
    return [
        [(x - mean) / math.sqrt(variance + 1e-8) if m else 0.0 for x, m in zip(row, mask, strict=True)]
        for row, mask in zip(values_BT, mask_BT.tolist(), strict=True)
    ]


# A made-up batch: three prompts, interleaved, lengths 1 to 6.
GROUPS = [0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 2, 0]
LENGTHS = [3, 6, 1, 4, 2, 5, 6, 2, 3, 3, 4, 1]
SCORES = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).tolist()
MASK_BT = mask_of(LENGTHS, 6)
REWARDS_BT = at_end(SCORES, LENGTHS, 6)
GROUP_B = torch.tensor(GROUPS)
PEERS = [[j for j in range(12) if GROUPS[j] == GROUPS[i]] for i in range(12)]


def on_tokens(advantages: list[float]) -> Tensor:
    return f64(advantages)[:, None] * MASK_BT


# ---- grpo_passk


def test_grpo_passk_by_hand():
    # 1, 4, 2: only the second, by 4 - 2; std of 1, 4, 2 is sqrt(7/3)
    advantages_BT, returns_BT = grpo_passk(f64([[1], [4], [2]]), mask_of([1] * 3, 1), torch.zeros(3, dtype=torch.int64), False)
    assert advantages_BT.tolist() == returns_BT.tolist() == [[0], [2], [0]]
    advantages_BT, _ = grpo_passk(f64([[1], [4], [2]]), mask_of([1] * 3, 1), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(advantages_BT, f64([[0], [2 / (math.sqrt(7 / 3) + 1e-6)], [0]]))


def test_grpo_passk_against_loops():
    expected = []
    for i in range(12):
        first, second = sorted((SCORES[j] for j in PEERS[i]), reverse=True)[:2]
        gap = (first - second) / (statistics.stdev(SCORES[j] for j in PEERS[i]) + 1e-6)
        expected.append(gap if SCORES[i] == first else 0.0)
    torch.testing.assert_close(grpo_passk(REWARDS_BT, MASK_BT, GROUP_B)[0], on_tokens(expected))


def test_grpo_passk_a_shared_best_score_moves_nobody():
    advantages_BT, _ = grpo_passk(f64([[1], [1], [0]]), mask_of([1] * 3, 1), torch.zeros(3, dtype=torch.int64))
    assert advantages_BT.tolist() == [[0], [0], [0]]


def test_grpo_passk_is_the_gradient_of_the_expected_maximum():
    """Its expectation over all outcomes, exactly, for a policy of three answers and groups of two (arXiv:2503.19595)."""
    logits_V = f64([0.3, -0.2, 0.5]).requires_grad_()
    reward = [0.0, 1.0, 3.0]
    log_p_V = logits_V.log_softmax(-1)
    pairs = [(a, b) for a in range(3) for b in range(3)]
    maximum = sum((log_p_V[a] + log_p_V[b]).exp() * max(reward[a], reward[b]) for a, b in pairs)
    surrogate = f64(0.0)
    for a, b in pairs:
        rewards_BT = f64([[reward[a]], [reward[b]]])
        advantages_BT, _ = grpo_passk(rewards_BT, mask_of([1, 1], 1), torch.tensor([5, 5]), norm_adv_by_std_in_grpo=False)
        chance = (log_p_V[a] + log_p_V[b]).exp().detach()
        surrogate = surrogate + chance * (advantages_BT[0, 0] * log_p_V[a] + advantages_BT[1, 0] * log_p_V[b])
    (expected,) = torch.autograd.grad(maximum, logits_V, retain_graph=True)
    (actual,) = torch.autograd.grad(surrogate, logits_V)
    torch.testing.assert_close(actual, expected)


# ---- reinforce_plus_plus and its baseline


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_reinforce_plus_plus_against_loops(gamma: float):
    generator = torch.Generator().manual_seed(1)
    rewards_BT = torch.randn(4, 7, dtype=torch.float64, generator=generator)
    mask_BT = torch.rand(4, 7, generator=generator) < 0.6
    mask_BT[:, 0] = True
    expected = [[0.0] * 7 for _ in range(4)]
    for b in range(4):
        places = [t for t in range(7) if mask_BT[b, t]]
        paid = [sum(rewards_BT[b, p:q].tolist()) for p, q in zip(places, [*places[1:], 7], strict=True)]
        for i, t in enumerate(places):
            expected[b][t] = sum(gamma ** (j - i) * paid[j] for j in range(i, len(places)))
    advantages_BT, returns_BT = reinforce_plus_plus(rewards_BT, mask_BT, gamma)
    torch.testing.assert_close(returns_BT, f64(expected))
    torch.testing.assert_close(advantages_BT, f64(whitened_by_hand(expected, mask_BT)))


def test_reinforce_plus_plus_by_hand():
    # gamma 0.5, reward 8 at the end of three tokens: 2, 4, 8, mean 14/3, variance 28/3
    advantages_BT, returns_BT = reinforce_plus_plus(f64([[0, 0, 8]]), mask_of([3], 3), 0.5)
    assert returns_BT.tolist() == [[2, 4, 8]]
    torch.testing.assert_close(advantages_BT, f64([[(x - 14 / 3) / math.sqrt(28 / 3) for x in (2, 4, 8)]]))


def test_reinforce_plus_plus_equal_returns_are_not_whitened_into_noise():
    """The float32 mean of a thousand 0.7 is not 0.7; divided by a deviation of nothing, the error would be trained on."""
    advantages_BT, _ = reinforce_plus_plus(at_end([0.7] * 2, [500, 500], 500).float(), mask_of([500, 500], 500), 1.0)
    assert advantages_BT.abs().max().item() == 0


def test_reinforce_plus_plus_baseline_against_loops():
    centred = [SCORES[i] - statistics.mean(SCORES[j] for j in PEERS[i]) for i in range(12)]
    expected = whitened_by_hand([[x] * 6 for x in centred], MASK_BT)
    torch.testing.assert_close(reinforce_plus_plus_baseline(REWARDS_BT, MASK_BT, GROUP_B)[0], f64(expected))


# ---- remax


def test_remax_by_hand():
    # rewards to go 6, 5, 3 less the 2 of the greedy answer; the second sample is one token long
    rewards_BT, mask_BT = f64([[1, 2, 3], [4, 0, 0]]), mask_of([3, 1], 3)
    advantages_BT, returns_BT = remax(rewards_BT, mask_BT, f64([2, 5]))
    assert returns_BT.tolist() == [[6, 5, 3], [4, 0, 0]]
    assert advantages_BT.tolist() == [[4, 3, 1], [-1, 0, 0]]


def test_remax_a_sample_as_good_as_the_greedy_answer_gets_zeros():
    advantages_BT, _ = remax(REWARDS_BT, MASK_BT, f64(SCORES))
    assert advantages_BT.abs().max() == 0


# ---- opo


def test_opo_by_hand():
    # lengths 1 and 3, scores 1 and 0: b = 1/4
    advantages_BT, _ = opo(at_end([1, 0], [1, 3], 3), mask_of([1, 3], 3), torch.tensor([4, 4]))
    assert advantages_BT.tolist() == [[0.75, 0, 0], [-0.25] * 3]


def test_opo_against_loops():
    expected = []
    for i in range(12):
        weighted = sum(LENGTHS[j] * SCORES[j] for j in PEERS[i]) / sum(LENGTHS[j] for j in PEERS[i])
        expected.append(SCORES[i] - weighted)
    torch.testing.assert_close(opo(REWARDS_BT, MASK_BT, GROUP_B)[0], on_tokens(expected))


def test_opo_with_equal_lengths_is_dr_grpo():
    rewards_BT, mask_BT = at_end(SCORES, [2] * 12, 2), mask_of([2] * 12, 2)
    torch.testing.assert_close(opo(rewards_BT, mask_BT, GROUP_B), grpo(rewards_BT, mask_BT, GROUP_B, False))


# ---- gpg


def test_gpg_by_hand():
    # one prompt of two is always right: half of the four samples have a gradient, so alpha = 2
    advantages_BT, _ = gpg(f64([[1], [0], [1], [1]]), mask_of([1] * 4, 1), torch.tensor([0, 0, 1, 1]))
    assert advantages_BT.tolist() == [[1], [-1], [0], [0]]


def test_gpg_samples_without_tokens_are_in_neither_count():
    mask_BT = mask_of([1, 1, 1, 0], 1)
    advantages_BT, _ = gpg(f64([[1], [0], [1], [1]]), mask_BT, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(advantages_BT, f64([[0.75], [-0.75], [0], [0]]))  # alpha = 3 / 2


def test_gpg_without_degenerate_groups_is_dr_grpo():
    torch.testing.assert_close(gpg(REWARDS_BT, MASK_BT, GROUP_B), grpo(REWARDS_BT, MASK_BT, GROUP_B, False))


# ---- gdpo


def test_gdpo_tells_apart_what_grpo_cannot():
    """Two rewards, one of them with a spread a hundred times the other's: GRPO all but ignores the small one."""
    big, small = f64([100, 0, 0, 100]), f64([0, 1, 0, 1])
    mask_BT, group_B = mask_of([1] * 4, 1), torch.zeros(4, dtype=torch.int64)
    decoupled_BT, _ = gdpo(torch.stack([big, small]), f64([1, 1]), mask_BT, group_B)
    together_BT, _ = grpo((big + small)[:, None], mask_BT, group_B)
    torch.testing.assert_close(decoupled_BT[0], decoupled_BT[1], rtol=1e-4, atol=1e-4)
    assert together_BT[0] - together_BT[1] > 1.5


def test_gdpo_against_loops():
    generator = torch.Generator().manual_seed(9)
    components, weights = torch.randn(2, 12, dtype=torch.float64, generator=generator).tolist(), [1.0, -0.3]
    sums = [0.0] * 12
    for component, weight in zip(components, weights, strict=True):
        for i in range(12):
            peers = [component[j] for j in PEERS[i]]
            sums[i] += weight * (component[i] - statistics.mean(peers)) / (statistics.stdev(peers) + 1e-6)
    expected = whitened_by_hand([[x] * 6 for x in sums], MASK_BT)
    torch.testing.assert_close(gdpo(f64(components), f64(weights), MASK_BT, GROUP_B)[0], f64(expected))


def test_gdpo_a_reward_without_spread_or_weight_does_not_matter():
    components_KB = torch.stack(
        [f64(SCORES), torch.full((12,), 0.1, dtype=torch.float64), GROUP_B.double().exp() * f64(SCORES)]
    )
    alone_BT, _ = gdpo(components_KB[:1], f64([1]), MASK_BT, GROUP_B)
    torch.testing.assert_close(gdpo(components_KB, f64([1, 1, 0]), MASK_BT, GROUP_B)[0], alone_BT)


def test_gdpo_wants_a_weight_for_each_reward():
    with pytest.raises(ValueError, match=r"2 reward components and 1 weights.*reward\.functions"):
        gdpo(torch.zeros(2, 12), f64([1]), MASK_BT, GROUP_B)


# ---- optimal_token_baseline


def probabilities(batch: int, width: int, vocabulary: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen log-probs, sums of squared probabilities, and the distributions themselves."""
    generator = torch.Generator().manual_seed(6)
    log_p_BTV = torch.randn(batch, width, vocabulary, dtype=torch.float64, generator=generator).log_softmax(-1)
    return log_p_BTV[..., 0], log_p_BTV.exp().square().sum(-1), log_p_BTV


def test_the_energy_of_a_token_is_the_squared_gradient_by_its_logits():
    logp_BT, squares_BT, log_p_BTV = probabilities(2, 3)
    for b in range(2):
        for t in range(3):
            logits_V = log_p_BTV[b, t].clone().requires_grad_()
            (gradient_V,) = torch.autograd.grad(logits_V.log_softmax(-1)[0], logits_V)
            energy = 1 - 2 * logp_BT[b, t].exp() + squares_BT[b, t]
            torch.testing.assert_close(energy, gradient_V.square().sum())


@pytest.mark.parametrize("weighted", [False, True])
def test_optimal_token_baseline_against_loops(weighted: bool):
    """With gaps in the mask: the t-th chosen tokens of a prompt's samples are compared."""
    generator = torch.Generator().manual_seed(2)
    mask_BT = MASK_BT & (torch.rand(12, 6, generator=generator) < 0.8)
    mask_BT[:, 0] = True
    rewards_BT = torch.randn(12, 6, dtype=torch.float64, generator=generator) * mask_BT
    logp_BT, squares_BT, _ = probabilities(12, 6)
    weights_BT = torch.rand(12, 6, dtype=torch.float64, generator=generator) + 0.5 if weighted else None
    togo, energy, places = [], [], []
    for b in range(12):
        here = [t for t in range(6) if mask_BT[b, t]]
        places.append(here)
        togo.append([sum(rewards_BT[b, t].item() for t in here[i:]) for i in range(len(here))])
        w = [1 - 2 * math.exp(logp_BT[b, t]) + squares_BT[b, t].item() for t in here]
        if weights_BT is not None:
            w = [x * weights_BT[b, t].item() ** 2 for x, t in zip(w, here, strict=True)]
        energy.append([sum(w[: i + 1]) for i in range(len(here))])
    expected = [[0.0] * 6 for _ in range(12)]
    for b in range(12):
        for i, t in enumerate(places[b]):
            there = [j for j in PEERS[b] if len(places[j]) > i]
            baseline = sum(togo[j][i] * energy[j][i] for j in there) / (sum(energy[j][i] for j in there) + 1e-8)
            expected[b][t] = togo[b][i] - (baseline if len(there) > 1 else 0.0)
    advantages_BT, returns_BT = optimal_token_baseline(rewards_BT, mask_BT, GROUP_B, logp_BT, squares_BT, weights_BT)
    torch.testing.assert_close(advantages_BT, f64(expected))
    torch.testing.assert_close(returns_BT[5][mask_BT[5]], f64(togo[5]))


def test_optimal_token_baseline_by_hand():
    # pi = 1/2 of two answers: w = 1 - 1 + 1/2; W = 0.5, 1.0. Scores 1 and 0, equal W: b = 1/2. The third token is alone: b = 0
    half_BT, squares_BT = torch.full((2, 3), math.log(0.5), dtype=torch.float64), torch.full((2, 3), 0.5, dtype=torch.float64)
    rewards_BT, mask_BT = at_end([1, 0], [3, 2], 3), mask_of([3, 2], 3)
    advantages_BT, _ = optimal_token_baseline(rewards_BT, mask_BT, torch.tensor([1, 1]), half_BT, squares_BT)
    torch.testing.assert_close(advantages_BT, f64([[0.5, 0.5, 1], [-0.5, -0.5, 0]]))


# ---- what holds for all


def _with_probabilities(rewards_BT: Tensor, mask_BT: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """OTB with probabilities that depend on the reward, so that they go with the sample when it is moved."""
    logp_BT = -1 - rewards_BT.sum(-1, keepdim=True).sigmoid().expand_as(rewards_BT)
    return optimal_token_baseline(rewards_BT, mask_BT, group_B, logp_BT, logp_BT.exp().square() + 0.01)


ESTIMATORS = {
    "grpo_passk": grpo_passk,
    "gdpo": lambda rewards_BT, mask_BT, group_B: gdpo(rewards_BT.sum(-1)[None], f64([1]), mask_BT, group_B),
    "opo": opo,
    "gpg": gpg,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "optimal_token_baseline": _with_probabilities,
}
UNGROUPED = {
    "reinforce_plus_plus": lambda rewards_BT, mask_BT, _group_B: reinforce_plus_plus(rewards_BT, mask_BT, 1.0),
    "remax": lambda rewards_BT, mask_BT, _group_B: remax(rewards_BT, mask_BT, torch.zeros_like(rewards_BT[:, 0])),
}


@pytest.fixture(params=list(ESTIMATORS))
def estimator(request: pytest.FixtureRequest):
    return ESTIMATORS[request.param]


@pytest.fixture(params=list(ESTIMATORS | UNGROUPED))
def any_estimator(request: pytest.FixtureRequest):
    return (ESTIMATORS | UNGROUPED)[request.param]


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "optimal_token_baseline"])
def test_a_constant_added_to_all_rewards_of_a_group_changes_nothing(name: str):
    """OTB's baseline is 0 at the end of the longest sample, so it is none of these."""
    shifted_BT = at_end([score + 100 * group for score, group in zip(SCORES, GROUPS, strict=True)], LENGTHS, 6)
    before_BT, _ = ESTIMATORS[name](REWARDS_BT, MASK_BT, GROUP_B)
    torch.testing.assert_close(ESTIMATORS[name](shifted_BT, MASK_BT, GROUP_B)[0], before_BT)
    assert before_BT.abs().sum() > 1


def test_a_constant_changes_nothing_in_reinforce_plus_plus_without_discount():
    shifted_BT = at_end([score + 7 for score in SCORES], LENGTHS, 6)
    before_BT, _ = reinforce_plus_plus(REWARDS_BT, MASK_BT, 1.0)
    torch.testing.assert_close(reinforce_plus_plus(shifted_BT, MASK_BT, 1.0)[0], before_BT)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("opo", 3), ("gpg", 3), ("gdpo", 1), ("reinforce_plus_plus_baseline", 1), ("reinforce_plus_plus", 1), ("remax", 3)],
)
def test_scaling_rewards_scales_advantages_or_leaves_them(name: str, factor: float):
    function = (ESTIMATORS | UNGROUPED)[name]
    before_BT, _ = function(REWARDS_BT, MASK_BT, GROUP_B)
    torch.testing.assert_close(function(3 * REWARDS_BT, MASK_BT, GROUP_B)[0], factor * before_BT, rtol=1e-5, atol=1e-5)


def test_permuting_samples_permutes_advantages(any_estimator):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    before_BT, _ = any_estimator(REWARDS_BT, MASK_BT, GROUP_B)
    after_BT, _ = any_estimator(REWARDS_BT[order], MASK_BT[order], GROUP_B[order])
    torch.testing.assert_close(after_BT, before_BT[order])


def test_padding_does_not_matter(any_estimator):
    pad = torch.nn.functional.pad
    narrow_BT, _ = any_estimator(REWARDS_BT, MASK_BT, GROUP_B)
    wide_BT, _ = any_estimator(pad(REWARDS_BT, (0, 3)), pad(MASK_BT, (0, 3)), GROUP_B)
    torch.testing.assert_close(wide_BT, pad(narrow_BT, (0, 3)))


def test_everything_is_zero_outside_the_mask(any_estimator):
    for x_BT in any_estimator(REWARDS_BT, MASK_BT, GROUP_B):
        assert x_BT[~MASK_BT].abs().max() == 0
        assert x_BT[MASK_BT].abs().max() > 0
        assert x_BT.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scores", [[0.7], [0.1] * 3, [1 / 3] * 7, [0.0] * 4], ids=["one sample", "0.1", "1/3", "0"])
def test_degenerate_groups_give_exact_zeros(estimator, scores: list[float], dtype: torch.dtype):
    """Beside a group that is alive, of other lengths, so that zeroing everything would be seen, and a shift too."""
    lengths = [*range(1, len(scores) + 1), 2, 4]
    rewards_BT = at_end([*scores, 1.0, 0.0], lengths, 8).to(dtype)
    group_B = torch.tensor([4] * len(scores) + [2, 2])
    advantages_BT, _ = estimator(rewards_BT, mask_of(lengths, 8), group_B)
    assert advantages_BT[: len(scores)].abs().max().item() == 0
    assert advantages_BT[-2, 0].item() > 0.4
    assert advantages_BT.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*ESTIMATORS, "reinforce_plus_plus"])
def test_a_batch_of_equal_scores_gives_exact_zeros(name: str, dtype: torch.dtype):
    advantages_BT, _ = (ESTIMATORS | UNGROUPED)[name](at_end([0.1] * 12, LENGTHS, 6).to(dtype), MASK_BT, GROUP_B)
    assert advantages_BT.abs().max().item() == 0


def test_nothing_chosen_gives_zeros(any_estimator):
    for x_BT in any_estimator(REWARDS_BT, torch.zeros_like(MASK_BT), GROUP_B):
        assert x_BT.abs().max().item() == 0


@pytest.mark.parametrize("name", ["grpo_passk", "gpg"])
def test_the_score_of_a_sample_without_tokens_still_counts_in_its_group(name: str):
    mask_BT = MASK_BT.clone()
    best = max(PEERS[0], key=lambda i: SCORES[i])
    mask_BT[best] = False
    full_BT, _ = ESTIMATORS[name](REWARDS_BT, MASK_BT, GROUP_B)
    advantages_BT, _ = ESTIMATORS[name](REWARDS_BT, mask_BT, GROUP_B)
    torch.testing.assert_close(advantages_BT, full_BT * mask_BT)


@pytest.mark.parametrize("name", ["opo", "optimal_token_baseline"])
def test_a_sample_without_tokens_has_no_weight(name: str):
    mask_BT = MASK_BT.clone()
    mask_BT[0] = False
    others = list(range(1, 12))
    advantages_BT, _ = ESTIMATORS[name](REWARDS_BT, mask_BT, GROUP_B)
    alone_BT, _ = ESTIMATORS[name](REWARDS_BT[others], MASK_BT[others], GROUP_B[others])
    torch.testing.assert_close(advantages_BT[others], alone_BT)


def test_nan_outside_the_mask_is_not_read():
    logp_BT, squares_BT, _ = probabilities(12, 6)
    weights_BT = torch.ones_like(logp_BT)
    expected_BT, _ = optimal_token_baseline(REWARDS_BT, MASK_BT, GROUP_B, logp_BT, squares_BT, weights_BT)
    holes = [torch.where(MASK_BT, x_BT, torch.nan) for x_BT in (logp_BT, squares_BT, weights_BT)]
    torch.testing.assert_close(optimal_token_baseline(REWARDS_BT, MASK_BT, GROUP_B, *holes)[0], expected_BT)


def test_estimators_leave_their_arguments_alone(any_estimator):
    before_BT = REWARDS_BT.clone()
    any_estimator(REWARDS_BT, MASK_BT, GROUP_B)
    assert torch.equal(REWARDS_BT, before_BT)
