"""Choosing the next token: a pure function of the logits and of one number from the sample's own random stream.

Enters: logits and u in [0, 1). Leaves: token and its log-probability. The stream of a sample is Philox, a counter-based
generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed by (run seed, step, prompt uid, sample
index); number t of the stream draws response token t. So nothing has to be saved, and a sample does not depend on the batch it
was drawn in.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from agentlightning.types import SamplingParams


def random_stream(seed: int, step: int, uid: str, sample_index: int, length: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 [length], one for each position of one sample."""
    digest = hashlib.blake2b(f"{seed}\0{step}\0{uid}\0{sample_index}".encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(length)


def keep_likely(logits_BV: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Logits with everything outside the `top_k` likeliest tokens and outside the nucleus of mass `top_p` at -inf.

    Nucleus sampling (Holtzman et al., 2020): the smallest set of likeliest tokens whose mass reaches `top_p`.
    """
    if 0 < top_k < logits_BV.shape[-1]:
        smallest_kept = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_kept, -torch.inf)
    if top_p < 1.0:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        mass_before_BV = sorted_BV.softmax(-1).cumsum(-1) - sorted_BV.softmax(-1)
        sorted_BV = sorted_BV.masked_fill(mass_before_BV >= top_p, -torch.inf)
        logits_BV = torch.empty_like(logits_BV).scatter(-1, order_BV, sorted_BV)
    return logits_BV


def choose(logits_BV: torch.Tensor, uniform_B: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens (int64 [B]) and their log-probabilities (float32 [B]).

    `uniform_B` is float64 [B]. The log-probability is that of the whole distribution at the temperature, without the
    top-k and top-p filters, because that is what the training pass computes. Greedy (`temperature=0`) reports it at 1.
    """
    greedy = params.temperature == 0
    logits_BV = logits_BV.float() if greedy else logits_BV.float() / params.temperature
    log_probs_BV = logits_BV.log_softmax(-1)
    if greedy:
        token_B = logits_BV.argmax(-1)
    else:
        kept_BV = keep_likely(logits_BV, params.top_k, params.top_p)
        # Inverse of the cumulative distribution in float64: one number a token, exact to far below a float32 probability.
        cumulative_BV = kept_BV.softmax(-1, dtype=torch.float64).cumsum(-1)
        target_B1 = (uniform_B * cumulative_BV[:, -1]).unsqueeze(-1)
        # Rounding, or logits that are not numbers, may lead past the last token; the caller looks at the log-probability.
        token_B = torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1).clamp(max=logits_BV.shape[-1] - 1)
    return token_B, log_probs_BV.gather(-1, token_B.unsqueeze(-1)).squeeze(-1)
