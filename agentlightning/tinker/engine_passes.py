"""The training pass of the service: checked data go in; log-probabilities, losses and gradients come out.

Rows are sorted by length and cut into micro-batches of at most `max_tokens` padded tokens (a longer row goes alone), so memory
is bounded whatever is sent. Losses are sums, so how the rows were cut changes results only by the order of float32 additions,
about 1e-6 of them; log-probabilities by the rounding of products of other shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from agentlightning.errors import NumericsError
from agentlightning.models.base import output_head
from agentlightning.models.passes import micro_batches
from agentlightning.tinker.engine_data import CheckedData, CheckedDatum
from agentlightning.types import MicroBatches

_CHUNK_ELEMENTS = 1 << 25  # logits held at a time: 128 MiB in float32


@dataclass(frozen=True, slots=True)
class DatumResult:
    """What the loss of one datum gives."""

    logp: np.ndarray  # float32, in the shape of its target_tokens
    loss: float  # summed over positions and targets


def run_data(model: PreTrainedModel, checked: CheckedData, max_tokens: int, backward: bool) -> list[DatumResult]:
    """Results in the order of the data; with `backward` the gradient of the summed loss is added to the parameters'.

    Raises `NumericsError` naming the datum if a log-probability or loss is not finite; gradients are then half added.
    """
    results: dict[int, DatumResult] = {}
    sizes = MicroBatches(max_rows=len(checked.data), max_tokens=max_tokens)
    for places in micro_batches(checked.length_B, sizes):
        rows = [checked.data[place] for place in places]
        with torch.set_grad_enabled(backward):
            logp_BTK = _log_probs(model, rows)
            columns = _columns(rows, logp_BTK)
            loss_B = _row_losses(logp_BTK, columns, checked)
            _check_finite(places, rows, logp_BTK, loss_B)
            if backward and loss_B.requires_grad:
                loss_B.sum().backward()
        logp, losses = logp_BTK.detach().cpu().numpy(), loss_B.tolist()
        for row, place in enumerate(places.tolist()):
            datum = rows[row]
            own = logp[row, : len(datum), : datum.target_TK.shape[1]].reshape(datum.shape)
            results[place] = DatumResult(own.astype(np.float32), losses[row])
    return [results[place] for place in range(len(checked.data))]


def target_log_probs(head: nn.Module, hidden_NH: torch.Tensor, target_NK: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N, K] of each position's targets, float32; logits exist a chunk at a time, also for the gradient."""
    vocabulary = head.weight
    assert isinstance(vocabulary, torch.Tensor)
    chunk = max(1, _CHUNK_ELEMENTS // len(vocabulary))
    if len(hidden_NH) <= chunk:
        return _chunk_log_probs(head, hidden_NH, target_NK)
    parts = []
    for start in range(0, len(hidden_NH), chunk):
        part = (head, hidden_NH[start : start + chunk], target_NK[start : start + chunk])
        if torch.is_grad_enabled():
            parts.append(checkpoint(_chunk_log_probs, *part, use_reentrant=False))
        else:
            parts.append(_chunk_log_probs(*part))
    return torch.cat(parts)


def _chunk_log_probs(head: nn.Module, hidden_NH: torch.Tensor, target_NK: torch.Tensor) -> torch.Tensor:
    return head(hidden_NH).float().log_softmax(-1).gather(-1, target_NK)


def _log_probs(model: PreTrainedModel, rows: Sequence[CheckedDatum]) -> torch.Tensor:
    """[B, T, K], zero where there is no target. Padded on the right: the causal mask alone keeps padding out."""
    length, targets = max(len(row) for row in rows), max(row.target_TK.shape[1] for row in rows)
    input_BT = np.zeros((len(rows), length), dtype=np.int64)
    target_BTK = np.zeros((len(rows), length, targets), dtype=np.int64)
    valid_BTK = np.zeros((len(rows), length, targets), dtype=bool)
    for i, row in enumerate(rows):
        input_BT[i, : len(row)] = row.token_T
        target_BTK[i, : len(row), : row.target_TK.shape[1]] = row.target_TK
        valid_BTK[i, : len(row), : row.target_TK.shape[1]] = True
    device = model.device
    decoder = model.get_decoder()
    hidden_BTH = decoder(input_ids=torch.from_numpy(input_BT).to(device), use_cache=False).last_hidden_state
    used_BT = torch.from_numpy(valid_BTK[..., 0]).to(device)
    target_NK = torch.from_numpy(target_BTK).to(device)[used_BT]
    logp_NK = target_log_probs(output_head(model), hidden_BTH[used_BT], target_NK)
    logp_BTK = logp_NK.new_zeros(*used_BT.shape, targets).index_put((used_BT,), logp_NK)
    return torch.where(torch.from_numpy(valid_BTK).to(device), logp_BTK, 0.0)


def _columns(rows: Sequence[CheckedDatum], logp_BTK: torch.Tensor) -> dict[str, torch.Tensor]:
    """The data's columns as tensors [B, T, K], zero where there is none: a weight of zero takes a position out."""
    columns: dict[str, torch.Tensor] = {}
    for name in rows[0].columns:
        column_BTK = np.zeros(tuple(logp_BTK.shape), dtype=np.float32)
        for i, row in enumerate(rows):
            column_BTK[i, : len(row), : row.target_TK.shape[1]] = row.columns[name]
        columns[name] = torch.from_numpy(column_BTK).to(logp_BTK.device)
    return columns


def _row_losses(logp_BTK: torch.Tensor, columns: Mapping[str, torch.Tensor], checked: CheckedData) -> torch.Tensor:
    """Summed over positions and targets, [B]."""
    loss = checked.loss
    if loss.several_targets:
        return loss.positions(logp_BTK, columns, checked.config).sum((1, 2))
    columns_BT = {name: column[..., 0] for name, column in columns.items()}
    loss_BT = loss.positions(logp_BTK[..., 0], columns_BT, checked.config)
    return (loss_BT * columns_BT["weights"]).sum(1)


def _check_finite(places: np.ndarray, rows: Sequence[CheckedDatum], logp_BTK: torch.Tensor, loss_B: torch.Tensor) -> None:
    finite_B = torch.isfinite(logp_BTK.detach()).flatten(1).all(1)
    if not bool(finite_B.all()):
        place = int(places[int((~finite_B).nonzero()[0])])
        raise NumericsError(
            f"datum {place}: NaN or inf in the log-probabilities: the base or the adapter holds it; no gradient was added"
        )
    finite_B = torch.isfinite(loss_B.detach())
    if not bool(finite_B.all()):
        row = int((~finite_B).nonzero()[0])
        raise NumericsError(
            f"datum {int(places[row])}: the loss is {float(loss_B[row].detach())}; look at {', '.join(rows[row].columns)}: "
            "log-probabilities far from the policy's make ratios overflow; no gradient was added"
        )
