"""GAE, GRPO and RLOO against numbers worked by hand, against their definitions as plain loops, and by their invariants."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from agentlightning.algorithms.advantages import gae, grpo, rloo
from agentlightning.algorithms.aggregation import masked_whiten


def f64(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def rewards_at_end(scores: list[float], length: int = 2) -> Tensor:
    """[B, length], the score on the last token."""
    return f64([[0.0] * (length - 1) + [score] for score in scores])


# ---- gae


def test_gae_by_hand():
    # gamma 0.5, lam 0.5, V = 1, 2, 4, reward 8 at the end
    #   delta: 0 + 0.5*2 - 1 = 0;  0 + 0.5*4 - 2 = 0;  8 - 4 = 4
    #   A:     0 + 0.25*1 = 0.25;  0 + 0.25*4 = 1;     4
    values_BT = f64([[1, 2, 4]])
    advantages_BT, returns_BT = gae(f64([[0, 0, 8]]), values_BT, ones(1, 3), 0.5, 0.5)
    raw_BT = f64([[0.25, 1, 4]])
    torch.testing.assert_close(returns_BT, raw_BT + values_BT)
    torch.testing.assert_close(advantages_BT, masked_whiten(raw_BT, ones(1, 3)))


def test_gae_steps_over_observations():
    """Two turns with an observation of two tokens between them: as if the observation were not there."""
    rewards_BT, values_BT = f64([[1, 0, 0, 0, 8, 0]]), f64([[1, 2, 90, -90, 4, 70]])
    mask_BT = torch.tensor([[1, 1, 0, 0, 1, 0]], dtype=torch.bool)
    kept = [0, 1, 4]
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, 0.9, 0.7)
    short_advantages_BT, short_returns_BT = gae(rewards_BT[:, kept], values_BT[:, kept], ones(1, 3), 0.9, 0.7)
    torch.testing.assert_close(advantages_BT[:, kept], short_advantages_BT)
    torch.testing.assert_close(returns_BT[:, kept], short_returns_BT)
    assert advantages_BT[~mask_BT].tolist() == returns_BT[~mask_BT].tolist() == [0, 0, 0]


@pytest.mark.parametrize("place", [2, 3])
def test_gae_pays_what_lies_on_an_observation_to_the_token_before_it(place: int):
    mask_BT = torch.tensor([[1, 1, 0, 0, 1]], dtype=torch.bool)
    values_BT = f64([[1, 2, 90, -90, 4]])
    on_observation_BT, on_token_BT = f64([[0, 0, 0, 0, 8]]), f64([[0, 5, 0, 0, 8]])
    on_observation_BT[0, place] = 5
    for paid, expected in zip(
        gae(on_observation_BT, values_BT, mask_BT, 0.9, 0.7), gae(on_token_BT, values_BT, mask_BT, 0.9, 0.7), strict=True
    ):
        torch.testing.assert_close(paid, expected)


def test_gae_a_score_after_the_last_chosen_token_is_not_lost():
    """A response cut off within an observation carries its score on a token that the policy did not choose."""
    mask_BT = torch.tensor([[1, 1, 0]], dtype=torch.bool)
    _, returns_BT = gae(f64([[0, 0, -1]]), f64([[0, 0, 0]]), mask_BT, 1.0, 1.0)
    assert returns_BT.tolist() == [[-1, -1, 0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (0.0, 0.5)])
def test_gae_is_the_discounted_sum_of_td_errors(gamma: float, lam: float):
    """The paper's sum over l of (gamma lam)^l delta_{t+l}, over the chosen tokens, as plain loops."""
    generator = torch.Generator().manual_seed(1)
    rewards_BT = torch.randn(4, 9, dtype=torch.float64, generator=generator)
    values_BT = torch.randn(4, 9, dtype=torch.float64, generator=generator)
    mask_BT = torch.rand(4, 9, generator=generator) < 0.7
    rewards_BT[~mask_BT] = 0
    expected_BT = torch.zeros_like(rewards_BT)
    for b in range(4):
        places = [t for t in range(9) if mask_BT[b, t]]
        reward, value = [rewards_BT[b, t].item() for t in places], [values_BT[b, t].item() for t in places]
        delta = [r + gamma * v_next - v for r, v, v_next in zip(reward, value, [*value[1:], 0.0], strict=True)]
        for i, t in enumerate(places):
            expected_BT[b, t] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(places)))
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma, lam)
    torch.testing.assert_close(returns_BT, (expected_BT + values_BT) * mask_BT)
    torch.testing.assert_close(advantages_BT, masked_whiten(expected_BT, mask_BT))


def test_gae_with_gamma_and_lambda_one_returns_the_reward_to_go():
    _, returns_BT = gae(f64([[1, 2, 3]]), f64([[7, -7, 70]]), ones(1, 3), 1.0, 1.0)
    torch.testing.assert_close(returns_BT, f64([[6, 5, 3]]))


def test_gae_padding_does_not_matter():
    rewards_BT, values_BT = f64([[0, 1], [0, 2]]), f64([[1, 2], [3, 4]])
    mask_BT = ones(2, 2)
    pad = torch.nn.functional.pad
    narrow = gae(rewards_BT, values_BT, mask_BT, 0.9, 0.8)
    wide = gae(pad(rewards_BT, (0, 3)), pad(values_BT, (0, 3), value=torch.nan), pad(mask_BT, (0, 3)), 0.9, 0.8)
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(pad(a, (0, 3)), b)


def test_gae_equal_advantages_are_not_whitened_into_noise():
    reward_BT, mask_BT = torch.full((7, 3), 0.0), torch.ones(7, 3)
    reward_BT[:, -1] = 0.1
    advantages_BT, returns_BT = gae(reward_BT, torch.zeros(7, 3), mask_BT, gamma=1.0, lam=1.0)
    assert not advantages_BT.any()
    assert returns_BT == pytest.approx(0.1)


def test_gae_all_masked_gives_zeros():
    for x_BT in gae(f64([[0, 1]]), f64([[2, 3]]), ~ones(1, 2), 0.9, 0.8):
        assert x_BT.tolist() == [[0, 0]]


# ---- grpo and rloo


def test_grpo_by_hand():
    # scores 1, 0, 0, 3: mean 1, std sqrt((0 + 1 + 1 + 4) / 3) = sqrt(2); and a group of 2: 5, 6: mean 5.5, std sqrt(0.5)
    rewards_BT = rewards_at_end([1, 5, 0, 0, 6, 3])
    mask_BT = torch.tensor([[1, 1], [1, 1], [1, 0], [0, 1], [1, 1], [1, 1]], dtype=torch.bool)
    group_B = torch.tensor([7, -3, 7, 7, -3, 7])
    advantages_BT, returns_BT = grpo(rewards_BT, mask_BT, group_B)
    big, small = math.sqrt(2) + 1e-6, math.sqrt(0.5) + 1e-6
    expected_BT = f64([[0, 0], [-0.5 / small] * 2, [-1 / big, 0], [0, -1 / big], [0.5 / small] * 2, [2 / big] * 2])
    torch.testing.assert_close(advantages_BT, expected_BT)
    torch.testing.assert_close(returns_BT, expected_BT)


def test_dr_grpo_by_hand():
    advantages_BT, _ = grpo(rewards_at_end([1, 0, 0, 3]), ones(4, 2), torch.zeros(4, dtype=torch.int64), False)
    assert advantages_BT.tolist() == [[0, 0], [-1, -1], [-1, -1], [2, 2]]


def test_rloo_by_hand():
    # 1 - (0 + 2) / 2 = 0;  0 - (1 + 2) / 2 = -1.5;  2 - (1 + 0) / 2 = 1.5
    advantages_BT, returns_BT = rloo(rewards_at_end([1, 0, 2]), ones(3, 2), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(advantages_BT, f64([[0, 0], [-1.5, -1.5], [1.5, 1.5]]))
    torch.testing.assert_close(returns_BT, advantages_BT)


def test_rloo_keeps_double_precision():
    # three samples: 3/2 is exact in float32, but for four 4/3 is not
    advantages_BT, _ = rloo(rewards_at_end([1, 0, 0, 0]), ones(4, 2), torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(advantages_BT[:, 0], f64([[1, -1 / 3, -1 / 3, -1 / 3]])[0], rtol=0, atol=1e-15)


def test_the_score_is_the_sum_of_a_sample_s_rewards():
    spread_BT = f64([[1, 2, 4], [0, 0, 1]])
    group_B = torch.tensor([0, 0])
    torch.testing.assert_close(grpo(spread_BT, ones(2, 3), group_B), grpo(rewards_at_end([7, 1], 3), ones(2, 3), group_B))


def random_groups() -> tuple[list[float], list[int]]:
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(12, dtype=torch.float64, generator=generator).tolist()
    return scores, [0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 2, 0]


def test_grpo_and_rloo_against_plain_loops():
    scores, groups = random_groups()
    grpo_B = grpo(rewards_at_end(scores), ones(12, 2), torch.tensor(groups))[0][:, 0].tolist()
    rloo_B = rloo(rewards_at_end(scores), ones(12, 2), torch.tensor(groups))[0][:, 0].tolist()
    for i, (score, group) in enumerate(zip(scores, groups, strict=True)):
        peers = [s for s, g in zip(scores, groups, strict=True) if g == group]
        others = [s for j, (s, g) in enumerate(zip(scores, groups, strict=True)) if g == group and j != i]
        assert grpo_B[i] == pytest.approx((score - statistics.mean(peers)) / (statistics.stdev(peers) + 1e-6))
        assert rloo_B[i] == pytest.approx(score - statistics.mean(others))


ESTIMATORS = {
    "grpo": grpo,
    "dr_grpo": lambda rewards_BT, mask_BT, group_B: grpo(rewards_BT, mask_BT, group_B, norm_adv_by_std_in_grpo=False),
    "rloo": rloo,
}


@pytest.fixture(params=list(ESTIMATORS))
def estimator(request: pytest.FixtureRequest):
    return ESTIMATORS[request.param]


def test_a_constant_added_to_all_rewards_of_a_group_changes_nothing(estimator):
    scores, groups = random_groups()
    shifted = [score + 100 * group for score, group in zip(scores, groups, strict=True)]
    before, after = (estimator(rewards_at_end(s), ones(12, 2), torch.tensor(groups))[0] for s in (scores, shifted))
    torch.testing.assert_close(before, after)
    assert before.abs().sum() > 1


def test_permuting_samples_permutes_advantages(estimator):
    scores, groups = random_groups()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    rewards_BT, group_B = rewards_at_end(scores), torch.tensor(groups)
    before_BT, _ = estimator(rewards_BT, ones(12, 2), group_B)
    after_BT, _ = estimator(rewards_BT[order], ones(12, 2), group_B[order])
    torch.testing.assert_close(after_BT, before_BT[order])


def test_groups_do_not_see_each_other(estimator):
    scores, groups = random_groups()
    rewards_BT, group_B = rewards_at_end(scores), torch.tensor(groups)
    together_BT, _ = estimator(rewards_BT, ones(12, 2), group_B)
    alone_BT, _ = estimator(rewards_BT[group_B == 1], ones(3, 2), group_B[group_B == 1])
    torch.testing.assert_close(together_BT[group_B == 1], alone_BT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scores", [[0.7], [0.1] * 3, [1 / 3] * 7, [0.0] * 4], ids=["one sample", "0.1", "1/3", "0"])
def test_degenerate_groups_give_exact_zeros(estimator, scores: list[float], dtype: torch.dtype):
    """Beside a group that is alive, so that zeroing everything would be seen."""
    rewards_BT = rewards_at_end([*scores, 1.0, 0.0]).to(dtype)
    group_B = torch.tensor([4] * len(scores) + [2, 2])
    advantages_BT, _ = estimator(rewards_BT, ones(len(group_B), 2), group_B)
    assert advantages_BT[: len(scores)].abs().max().item() == 0
    assert advantages_BT[-2, 0].item() > 0.4


def test_all_masked_samples_get_zeros_and_still_count_in_the_mean(estimator):
    rewards_BT, group_B = rewards_at_end([1, 0, 2]), torch.zeros(3, dtype=torch.int64)
    mask_BT = ones(3, 2)
    full_BT, _ = estimator(rewards_BT, mask_BT, group_B)
    mask_BT[2] = False
    advantages_BT, _ = estimator(rewards_BT, mask_BT, group_B)
    assert advantages_BT[2].tolist() == [0, 0]
    torch.testing.assert_close(advantages_BT[:2], full_BT[:2])


def test_estimators_leave_their_arguments_alone(estimator):
    rewards_BT = rewards_at_end([1, 0, 2])
    before_BT = rewards_BT.clone()
    estimator(rewards_BT, ones(3, 2), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(rewards_BT, before_BT)
