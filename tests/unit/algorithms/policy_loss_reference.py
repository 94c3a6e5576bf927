"""Every policy loss once more, token by token in Python floats: what the tensors are checked against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agentlightning.algorithms.aggregation import global_denominators
from agentlightning.algorithms.policy_losses.inputs import PolicyLossInputs
from agentlightning.algorithms.policy_losses.settings import PolicyLossSettings

SETTINGS = PolicyLossSettings(
    clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_c=3.0, loss_agg_mode="token-mean", ppo_kl_coef=0.7, tau_neg=1.5
)


@dataclass(frozen=True)
class Token:
    logp: float
    old: float
    a: float  # advantage
    w: float  # rollout_is_weights
    chosen: bool

    @property
    def d(self) -> float:
        return self.logp - self.old


Sequence = list[Token]


def random_inputs() -> PolicyLossInputs:
    """Six samples of seven tokens, one of them without a trained token, with every optional column."""
    generator = torch.Generator().manual_seed(11)

    def normal() -> Tensor:
        return torch.randn(6, 7, dtype=torch.float64, generator=generator)

    old_BT = -torch.rand(6, 7, dtype=torch.float64, generator=generator)
    mask_BT = torch.rand(6, 7, generator=generator) < 0.7
    mask_BT[3] = False
    return PolicyLossInputs(
        log_prob_BT=old_BT + 0.5 * normal(),
        old_log_prob_BT=old_BT,
        advantages_BT=normal(),
        mask_BT=mask_BT,
        denominators=global_denominators(mask_BT, 16),
        rollout_is_weights_BT=normal().exp(),
        selected_BT=torch.rand(6, 7, generator=generator) < 0.3,
    )


def sequences_of(inputs: PolicyLossInputs) -> list[Sequence]:
    """The trained tokens of each sample that has any."""
    assert inputs.rollout_is_weights_BT is not None
    assert inputs.selected_BT is not None
    columns = (
        inputs.log_prob_BT,
        inputs.old_log_prob_BT,
        inputs.advantages_BT,
        inputs.rollout_is_weights_BT,
        inputs.selected_BT,
    )
    rows = [
        [Token(*(column[b, t].item() for column in columns)) for t in inputs.mask_BT[b].nonzero().flatten().tolist()]
        for b in range(len(inputs.mask_BT))
    ]
    return [row for row in rows if row]


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def ratio_clip(r: float) -> float:
    return clip(r, 1 - SETTINGS.clip_ratio_low, 1 + SETTINGS.clip_ratio_high)


def ppo_token(token: Token) -> float:
    r = math.exp(token.d)
    loss = max(-token.a * r, -token.a * ratio_clip(r))
    return min(loss, -token.a * SETTINGS.clip_ratio_c) if token.a < 0 else loss


def clip_cov_token(token: Token) -> float:
    r = math.exp(token.d)
    return 0.0 if token.chosen else max(-token.a * r, -token.a * ratio_clip(r))


def kl_cov_token(token: Token) -> float:
    return -token.a * math.exp(token.d) + (SETTINGS.ppo_kl_coef * abs(token.d) if token.chosen else 0.0)


def sapo_token(token: Token) -> float:
    tau = SETTINGS.tau_pos if token.a > 0 else SETTINGS.tau_neg
    return -token.a * 4 / tau / (1 + math.exp(-tau * (math.exp(token.d) - 1)))


def token_mean(of_token: Callable[[Token], float]) -> Callable[[list[Sequence]], float]:
    def loss(sequences: list[Sequence]) -> float:
        return sum(t.w * of_token(t) for s in sequences for t in s) / sum(len(s) for s in sequences)

    return loss


def sequence_mean(of_token: Callable[[Token], float]) -> Callable[[list[Sequence]], float]:
    def loss(sequences: list[Sequence]) -> float:
        return sum(sum(t.w * of_token(t) for t in s) / len(s) for s in sequences) / len(sequences)

    return loss


def gspo(sequences: list[Sequence]) -> float:
    total = 0.0
    for s in sequences:
        ratio = math.exp(sum(t.d for t in s) / len(s))
        total += sum(t.w * max(-t.a * ratio, -t.a * ratio_clip(ratio)) for t in s) / len(s)
    return total / len(sequences)


def geo_mean(sequences: list[Sequence]) -> float:
    total = 0.0
    for s in sequences:
        exponent = 0.0
        for t in s:
            near = clip(t.d, -SETTINGS.clip_ratio_low, SETTINGS.clip_ratio_high)
            exponent += min(t.d, near) if t.a > 0 else max(t.d, near)
        weight = math.prod(t.w for t in s) ** (1 / len(s))
        total += -weight * sum(t.a for t in s) / len(s) * math.exp(exponent / len(s))
    return total / len(sequences)


REFERENCE: dict[str, Callable[[list[Sequence]], float]] = {
    "vanilla": token_mean(ppo_token),
    "gspo": gspo,
    "sapo": sequence_mean(sapo_token),
    "gpg": token_mean(lambda t: -t.a * t.logp),
    "clip_cov": token_mean(clip_cov_token),
    "kl_cov": token_mean(kl_cov_token),
    "geo_mean": geo_mean,
    "cispo": token_mean(lambda t: -ratio_clip(math.exp(t.d)) * t.a * t.logp),
    "per_rollout_mean": sequence_mean(ppo_token),
}
