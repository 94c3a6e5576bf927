"""The training pass: padded token rows go in, hidden states and log-probabilities of the trained tokens come out.

Logits exist only for tokens that are trained, a chunk at a time: with a vocabulary of 150,000 the whole of them would be larger
than the model. Rows are padded on the right, so the causal mask alone keeps padding out and the fast attention kernel runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from agentlightning.types import Batch

_CHUNK_ELEMENTS = 1 << 25  # logits held at a time: 128 MiB in float32


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Prompt and response of each sample in one row, on the device of the model.

    `state_N` and `row_N` index the positions whose logits predict a trained token: N of them, in row order; `target_N` is that
    token, and `column_N` its place t in the response, so that `x_BT[row_N, column_N] = x_N` puts a result back.
    """

    input_BL: torch.Tensor
    row_N: torch.Tensor
    state_N: torch.Tensor
    column_N: torch.Tensor
    target_N: torch.Tensor

    @classmethod
    def from_batch(cls, batch: Batch, device: torch.device) -> TokenRows:
        """The rows of `batch`, right-padded with token 0."""
        width = int(batch.total_len_B.max())
        input_BL = np.zeros((len(batch), width), dtype=np.int64)
        for row in range(len(batch)):
            prompt_len, response_len = batch.prompt_len_B[row], batch.response_len_B[row]
            input_BL[row, :prompt_len] = batch.prompt_BP[row, :prompt_len]
            input_BL[row, prompt_len : prompt_len + response_len] = batch.response_BT[row, :response_len]
        row_N, column_N = np.nonzero(batch.mask_BT)
        state_N = batch.prompt_len_B[row_N] + column_N - 1  # the state before token t predicts it
        target_N = batch.response_BT[row_N, column_N].astype(np.int64)
        arrays = (input_BL, row_N, state_N.astype(np.int64), column_N, target_N)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))


def hidden_states(model: PreTrainedModel, rows: TokenRows) -> torch.Tensor:
    """The last hidden state [N, H] before each trained token."""
    hidden_BLH = model.get_decoder()(input_ids=rows.input_BL, use_cache=False).last_hidden_state
    return hidden_BLH[rows.row_N, rows.state_N]


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
