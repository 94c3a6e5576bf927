"""DAPO's penalty for long answers, its filter, and its choice of prompts."""

from __future__ import annotations

import pytest
import torch

from agentlightning.algorithms.filter_groups import informative_groups
from agentlightning.algorithms.overlong import soft_overlong_punishment, without_samples


def test_the_penalty_is_the_paper_s():
    """Its own numbers: 20480 tokens at most, of which the last 4096 are the buffer (arXiv:2503.14476, section 4.1)."""
    lengths = [1, 16384, 16384 + 1024, 16384 + 2048, 20480, 30000]
    penalty_B = soft_overlong_punishment(torch.tensor(lengths), 20480, 4096, 1.0)
    assert penalty_B.tolist() == [0, 0, -0.25, -0.5, -1, -1]


def test_the_penalty_grows_evenly_to_its_factor():
    penalty_B = soft_overlong_punishment(torch.arange(11, dtype=torch.float64), 10, 4, 0.5)
    expected = [0.0] * 7 + [-0.125, -0.25, -0.375, -0.5]
    torch.testing.assert_close(penalty_B, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("length", [0, -1, 11])
def test_the_buffer_is_part_of_the_response(length: int):
    with pytest.raises(ValueError, match=rf"reward\.overlong_buffer\.len: given {length}.*max_response_length=10"):
        soft_overlong_punishment(torch.tensor([3]), 10, length, 1.0)


def test_samples_that_are_left_out_lose_their_whole_mask():
    mask_BT = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 1, 1]])
    kept_BT = without_samples(mask_BT, torch.tensor([False, True, False]))
    assert kept_BT.tolist() == [[True, False, True], [False] * 3, [False, True, True]]


def test_prompts_whose_samples_differ_are_kept():
    #            mixed   always right   mixed   alone   alike at 1/3, where a mean would not be exact
    metric_B = torch.tensor([1, 1, 0, 1, 0.5, 0, 0.2, *[1 / 3] * 7])
    group_B = torch.tensor([5, 2, 5, 2, 9, 9, 4, *[7] * 7])
    assert informative_groups(metric_B, group_B).tolist() == [True, False, True, False, True, True, True, *[False] * 7]


def test_a_metric_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"1 of 2 samples.*filter_groups\.metric"):
        informative_groups(torch.tensor([1.0, torch.nan]), torch.tensor([0, 0]))
