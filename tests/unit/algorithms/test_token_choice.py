"""Which tokens clip_cov and kl_cov choose: by hand, whatever the order, and at random where it says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from policy_loss_reference import SETTINGS
from torch import Tensor

from agentlightning.algorithms.policy_losses.clip_cov import choose_clip_cov
from agentlightning.algorithms.policy_losses.covariance import ChoiceTokens, count_of_share
from agentlightning.algorithms.policy_losses.kl_cov import choose_kl_cov


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# mean advantage 0, mean log-prob -2: covariances 2, -2, 3, -3, 0, 12
ADVANTAGES_N = f64(1, -1, 3, -3, 2, -2)
LOG_PROB_N = f64(0, 0, -1, -1, -2, -8)


def tokens(random_N: Tensor, old_log_prob_N: Tensor = LOG_PROB_N) -> ChoiceTokens:
    return ChoiceTokens(ADVANTAGES_N, LOG_PROB_N, old_log_prob_N, random_N)


def test_kl_cov_takes_the_largest_covariances():
    for ratio, places in ((0.17, [5]), (0.34, [2, 5]), (0.5, [0, 2, 5]), (0.01, [5]), (1.0, [0, 1, 2, 3, 4, 5]), (0.0, [])):
        chosen_N = choose_kl_cov(tokens(torch.rand(6)), replace(SETTINGS, kl_cov_ratio=ratio))
        assert chosen_N.nonzero().flatten().tolist() == places, ratio


def test_clip_cov_takes_from_the_band_at_random():
    def places(random_N: Tensor, ratio: float, low: float = 1.0, high: float = 5.0) -> list[int]:
        settings = replace(SETTINGS, clip_cov_ratio=ratio, clip_cov_lb=low, clip_cov_ub=high)
        return choose_clip_cov(tokens(random_N), settings).nonzero().flatten().tolist()

    first, last = f64(0.1, 0, 0.9, 0, 0, 0), f64(0.9, 0, 0.1, 0, 0, 0)  # of the band 1 to 5: tokens 0 and 2
    assert places(first, 0.01) == [0]
    assert places(last, 0.01) == [2]
    assert places(first, 1.0) == [0, 2], "all of the band, and nothing beside it"
    assert places(first, 0.0) == []
    assert places(first, 1.0, low=2.0, high=3.0) == [], "the band is open at both ends"


def test_clip_cov_leaves_out_what_ppos_clip_holds_already():
    settings = replace(SETTINGS, clip_cov_ratio=1.0)
    old_N = LOG_PROB_N.clone()
    old_N[0] -= 0.5  # a good token, likelier by exp(0.5) > 1.3
    old_N[2] += 0.5  # a good token that has become rarer is not held
    assert choose_clip_cov(tokens(torch.rand(6), old_N), settings).nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("choose", [choose_clip_cov, choose_kl_cov])
def test_the_order_of_the_tokens_and_float_noise_do_not_matter(choose):
    """Ties among them: two samples of a prompt that begin alike have the same log-probability and advantage."""
    generator = torch.Generator().manual_seed(3)
    advantages_N = torch.randint(-2, 3, (400,), generator=generator).double()
    log_prob_N = -torch.randint(1, 5, (400,), generator=generator).double()
    random_N = torch.rand(400, generator=generator, dtype=torch.float64)
    settings = replace(SETTINGS, clip_cov_ratio=0.05, kl_cov_ratio=0.05, clip_cov_lb=0.5, clip_cov_ub=3.0)
    expected_N = choose(ChoiceTokens(advantages_N, log_prob_N, log_prob_N, random_N), settings)
    assert expected_N.sum() == 20
    for _ in range(5):
        order = torch.randperm(400, generator=generator)
        noisy_N = log_prob_N + 1e-7 * torch.randn(400, generator=generator, dtype=torch.float64)
        columns = (x_N[order] for x_N in (advantages_N, noisy_N, noisy_N, random_N))
        assert torch.equal(choose(ChoiceTokens(*columns), settings), expected_N[order])


@pytest.mark.parametrize("choose", [choose_clip_cov, choose_kl_cov])
def test_no_token_no_choice(choose):
    assert choose(ChoiceTokens(*(f64() for _ in range(4))), SETTINGS).tolist() == []


def test_the_share_is_rounded_down_but_at_least_one():
    assert [count_of_share(0.0002, n) for n in (0, 1, 9_999, 10_000, 12_345)] == [0, 1, 1, 2, 2]
    assert [count_of_share(share, 7) for share in (0.0, 0.5, 1.0)] == [0, 3, 7]
