"""From hidden states to log-probabilities and entropies of the trained tokens.

Logits exist only for tokens that are trained, a chunk at a time: with a vocabulary of 150,000 the whole of them would be larger
than the model.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_CHUNK_ELEMENTS = 1 << 25  # logits held at a time: 128 MiB in float32


def log_probs(
    head: nn.Module, hidden_NH: torch.Tensor, target_N: torch.Tensor, temperature: float, entropy_grad: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability [N] of each target token at `temperature`, and the entropy [N] of its distribution in nats, float32.

    `entropy_grad`: whether gradients are to flow through the entropy too. Where gradients flow and there is more than one
    chunk, the logits of a chunk are computed again in the backward pass instead of being kept.
    """
    vocabulary = _rows_of(head)
    chunk = max(1, _CHUNK_ELEMENTS // vocabulary)
    if len(hidden_NH) <= chunk:
        return _chunk_log_probs(head, hidden_NH, target_N, temperature, entropy_grad)
    logp, entropy = [], []
    for start in range(0, len(hidden_NH), chunk):
        part = (head, hidden_NH[start : start + chunk], target_N[start : start + chunk], temperature, entropy_grad)
        if torch.is_grad_enabled():
            logp_n, entropy_n = checkpoint(_chunk_log_probs, *part, use_reentrant=False)  # pyright: ignore[reportGeneralTypeIssues]
        else:
            logp_n, entropy_n = _chunk_log_probs(*part)
        logp.append(logp_n)
        entropy.append(entropy_n)
    return torch.cat(logp), torch.cat(entropy)


@torch.no_grad()
def sum_pi_squared(head: nn.Module, hidden_NH: torch.Tensor, temperature: float) -> torch.Tensor:
    """The sum [N] over the vocabulary of the squared probabilities at `temperature`, float32: how likely two draws agree."""
    chunk = max(1, _CHUNK_ELEMENTS // _rows_of(head))
    parts = [(head(part).float() / temperature).softmax(-1).square().sum(-1) for part in hidden_NH.split(chunk)]
    return torch.cat(parts) if parts else hidden_NH.new_zeros(0, dtype=torch.float32)


def _chunk_log_probs(
    head: nn.Module, hidden_NH: torch.Tensor, target_N: torch.Tensor, temperature: float, entropy_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    log_p_NV = (head(hidden_NH).float() / temperature).log_softmax(-1)
    logp_N = log_p_NV.gather(-1, target_N.unsqueeze(-1)).squeeze(-1)
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1)
    return logp_N, entropy_N


def _rows_of(head: nn.Module) -> int:
    weight = head.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]
