"""What the estimators share: statistics over the samples of one prompt, rewards to go, and the way from samples to tokens.

Scores [B] or rewards [B, T] go in; everything leaves with the same first dimension, so that no formula has to look up a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agentlightning.algorithms.aggregation import masked_whiten


@dataclass(frozen=True, slots=True)
class Groups:
    """Which of B samples belong to the same of G prompts. Every method gives each sample its group's number."""

    index_B: Tensor  # int64; the place of the sample's group
    count_G: Tensor  # int64; samples of each group

    @classmethod
    def of(cls, group_B: Tensor) -> Groups:
        """From the ids of the samples' prompts, int64 [B] in any order."""
        _, index_B, count_G = torch.unique(group_B, return_inverse=True, return_counts=True)
        return cls(index_B, count_G)

    @property
    def count_B(self) -> Tensor:
        """Samples in the group, int64."""
        return self.count_G[self.index_B]

    def sum(self, x_B: Tensor) -> Tensor:
        """Over the group. Further dimensions are kept apart."""
        return x_B.new_zeros((len(self.count_G), *x_B.shape[1:])).index_add(0, self.index_B, x_B)[self.index_B]

    def mean(self, x_B: Tensor) -> Tensor:
        """Over the group, [B]."""
        return self.sum(x_B) / self.count_B

    def std(self, x_B: Tensor) -> Tensor:
        """Over the group, Bessel-corrected, [B]; 0 for a single sample."""
        return (self.sum((x_B - self.mean(x_B)).square()) / (self.count_B - 1).clamp(min=1)).sqrt()

    def max(self, x_B: Tensor) -> Tensor:
        """Over the group, [B]."""
        return self._extreme(x_B, "amax")

    def alike(self, x_B: Tensor) -> Tensor:
        """Whether the group is a single sample or all of it has the same value, bool [B].

        Estimators ask this and do not leave it to the subtraction: the rounding error of a mean, divided by a standard
        deviation of nearly nothing, would be trained on.
        """
        return self._extreme(x_B, "amin") == self.max(x_B)

    def _extreme(self, x_B: Tensor, reduce: str) -> Tensor:
        return x_B.new_zeros(len(self.count_G)).scatter_reduce(0, self.index_B, x_B, reduce, include_self=False)[self.index_B]


def on_tokens(advantage_B: Tensor, alike_B: Tensor, mask_BT: Tensor) -> Tensor:
    """A sample's advantage on each of its chosen tokens [B, T]; zero for samples of groups that are `alike`."""
    return torch.where(mask_BT.bool(), torch.where(alike_B, 0.0, advantage_B)[:, None], 0.0)


def whitened(advantages_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """`masked_whiten`, but a batch of equal values gives exact zeros and not its rounding error blown up."""
    values_N = advantages_BT[mask_BT.bool()]
    if len(values_N) == 0 or bool((values_N == values_N[0]).all()):
        return torch.zeros_like(advantages_BT)
    return masked_whiten(advantages_BT, mask_BT)


def returns_to_go(token_level_rewards_BT: Tensor, mask_BT: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma * G(next chosen token), zero outside the mask.

    Observations are stepped over without discount, and what is paid on them goes to the chosen token before them.
    """
    chosen_BT = mask_BT.bool()
    owed_B = return_B = torch.zeros_like(token_level_rewards_BT[:, 0])
    returns_BT = torch.zeros_like(token_level_rewards_BT)
    for t in reversed(range(token_level_rewards_BT.shape[1])):
        chosen_B = chosen_BT[:, t]
        owed_B = owed_B + token_level_rewards_BT[:, t]
        return_B = torch.where(chosen_B, owed_B + gamma * return_B, return_B)
        returns_BT[:, t] = torch.where(chosen_B, return_B, 0.0)
        owed_B = torch.where(chosen_B, 0.0, owed_B)
    return returns_BT
