"""How much better each token was than expected: rewards [B, T] go in, (advantages, returns) [B, T] leave.

One file an estimator, each a pure function with its paper and formula. What holds for all of them:

- Both results are zero outside the mask, and nothing but rewards is read there (NaN is welcome in values and log-probs).
- The whole reward of a sample counts, wherever it lies: an environment may pay on a token that the policy did not choose.
- `group_B` holds the int64 id of each sample's prompt, in any order. A group of one sample or of equal scores teaches nothing
  and gets exact zeros.
- A sample whose mask is all false gets zeros. Its score still counts among those of its group, as in the papers' sums over a
  group; where tokens are counted (a whitening, OPO's lengths, GPG's factor) it has none. A sample without any reward must be
  left out by the caller.
"""

from agentlightning.algorithms.advantages.gae import gae
from agentlightning.algorithms.advantages.gdpo import gdpo
from agentlightning.algorithms.advantages.gpg import gpg
from agentlightning.algorithms.advantages.grpo import grpo, grpo_passk
from agentlightning.algorithms.advantages.opo import opo
from agentlightning.algorithms.advantages.optimal_token_baseline import optimal_token_baseline
from agentlightning.algorithms.advantages.reinforce_plus_plus import reinforce_plus_plus, reinforce_plus_plus_baseline
from agentlightning.algorithms.advantages.remax import remax
from agentlightning.algorithms.advantages.rloo import rloo

__all__ = [
    "gae",
    "gdpo",
    "gpg",
    "grpo",
    "grpo_passk",
    "opo",
    "optimal_token_baseline",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
]
