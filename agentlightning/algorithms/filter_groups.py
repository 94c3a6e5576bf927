"""DAPO's dynamic sampling (arXiv:2503.14476, section 3.2): which prompts have something to teach.

A number for each sample goes in (its score, or accuracy); which samples to keep leaves. A prompt that is always solved, or
never, has no advantage and only dilutes the gradient, so another one is sampled in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentlightning.algorithms.advantages.groups import Groups


@torch.no_grad()
def informative_groups(metric_B: Tensor, group_B: Tensor) -> Tensor:
    """Whether the samples of each sample's prompt differ in the metric, bool [B]: the same for a whole group.

    A group of one sample is kept, as verl does: it cannot differ. `group_B` holds int64 ids in any order. Raises ValueError if
    the metric is not finite.
    """
    if not bool(metric_B.isfinite().all()):
        raise ValueError(
            f"the metric of {int((~metric_B.isfinite()).sum())} of {len(metric_B)} samples is not a finite number; a reward "
            "function must report it for each: algorithm.filter_groups.metric=score"
        )
    groups = Groups.of(group_B)
    return ~groups.alike(metric_B) | (groups.count_B == 1)
