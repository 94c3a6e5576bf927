"""What clip_cov and kl_cov have in common: tokens are chosen by how their log-probability and advantage vary together.

The choice is made over a whole mini-batch, once an optimizer step, from the numbers of all workers; so it does not depend on
how the rows were cut (verl chooses in each micro-batch). The losses are handed its outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agentlightning.algorithms.policy_losses.inputs import LOG_RATIO_LIMIT, PolicyLossInputs
from agentlightning.algorithms.policy_losses.settings import PolicyLossSettings


@dataclass(frozen=True, slots=True, eq=False)
class ChoiceTokens:
    """The N trained tokens of a whole mini-batch, in any order; float64 [N] each."""

    advantages_N: Tensor
    log_prob_N: Tensor  # nats, under the present policy
    old_log_prob_N: Tensor
    random_N: Tensor  # in [0, 1), each token's own whatever the order

    def ratio(self) -> Tensor:
        """new / old [N]."""
        return (self.log_prob_N - self.old_log_prob_N).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


TokenChoice = Callable[[ChoiceTokens, PolicyLossSettings], Tensor]


def covariance(tokens: ChoiceTokens) -> Tensor:
    """(A - mean A) * (log_prob - mean log_prob) of each token [N] (arXiv:2505.22617, section 4)."""
    return (tokens.advantages_N - tokens.advantages_N.mean()) * (tokens.log_prob_N - tokens.log_prob_N.mean())


def count_of_share(share: float, tokens: int) -> int:
    """`share` of `tokens`, rounded down, but at least one; none where the share is 0 or there is no token."""
    return min(tokens, max(1, int(share * tokens))) if share > 0 else 0


def at(places: Tensor, tokens: int) -> Tensor:
    """True at `places`: bool [N]."""
    chosen_N = torch.zeros(tokens, dtype=torch.bool, device=places.device)
    chosen_N[places] = True
    return chosen_N


def selected(inputs: PolicyLossInputs) -> Tensor:
    """The tokens that were chosen, bool [B, T]. Raises ValueError where nobody has chosen."""
    if inputs.selected_BT is None:
        raise ValueError("no selected_BT was given, expected the tokens that the loss's own choice has picked, bool [B, T]")
    return inputs.selected_BT
