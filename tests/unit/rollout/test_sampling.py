"""Choosing tokens: checked against probabilities worked out by hand."""

import numpy as np
import pytest
import torch

from agentlightning.rollout.sampling import choose, keep_likely, random_stream
from agentlightning.types import SamplingParams

LOGITS = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()


def draw(params: SamplingParams, count: int = 1000) -> np.ndarray:
    """Shares of the four tokens over an even grid of uniform numbers."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, _ = choose(LOGITS.expand(count, -1), uniform, params)
    return np.bincount(tokens.numpy(), minlength=4) / count


def test_tokens_come_with_their_probabilities():
    assert draw(SamplingParams()) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=1e-3)


def test_temperature_sharpens():
    squared = np.array([0.01, 0.04, 0.09, 0.16])
    assert draw(SamplingParams(temperature=0.5)) == pytest.approx(squared / squared.sum(), abs=1e-3)


def test_top_k_keeps_the_likeliest():
    assert draw(SamplingParams(top_k=2)) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=1e-3)


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    assert draw(SamplingParams(top_p=0.69)) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=1e-3)
    assert draw(SamplingParams(top_p=0.71)) == pytest.approx([0, 2 / 9, 3 / 9, 4 / 9], abs=1e-3)
    assert draw(SamplingParams(top_p=1e-6)) == pytest.approx([0, 0, 0, 1])


def test_filters_off_change_nothing():
    assert keep_likely(LOGITS, -1, 1.0) is LOGITS


def test_log_probability_is_of_the_unfiltered_distribution_at_the_temperature():
    _, logp = choose(LOGITS, torch.tensor([0.99], dtype=torch.float64), SamplingParams(top_k=1, temperature=0.5))
    assert float(logp[0].exp()) == pytest.approx(0.16 / 0.30)


def test_greedy_takes_the_likeliest_whatever_the_number():
    for u in (0.0, 0.5, 0.999999):
        token, logp = choose(LOGITS, torch.tensor([u], dtype=torch.float64), SamplingParams(temperature=0))
        assert int(token[0]) == 3
        assert float(logp[0].exp()) == pytest.approx(0.4)


def test_edges_of_the_unit_interval_give_tokens_that_can_occur():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for u, expected in ((0.0, 1), (np.nextafter(1.0, 0.0), 2)):
        token, _ = choose(logits, torch.tensor([u], dtype=torch.float64), SamplingParams())
        assert int(token[0]) == expected


def test_streams_depend_on_every_part_of_their_key_and_on_nothing_else():
    first = random_stream(1, 2, "a", 3, 8)
    assert np.array_equal(first, random_stream(1, 2, "a", 3, 8))
    assert np.array_equal(first[:5], random_stream(1, 2, "a", 3, 5)), "a longer stream begins like a shorter one"
    others = [
        random_stream(*key, 8) for key in ((0, 2, "a", 3), (1, 0, "a", 3), (1, 2, "b", 3), (1, 2, "a", 0), (12, 0, "a", 3))
    ]
    assert all(not np.array_equal(first, other) for other in others)
    assert first.min() >= 0
    assert first.max() < 1
