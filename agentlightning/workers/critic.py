"""The critic on one worker: a shard goes in; values, or a better value function, come out.

Two kinds: `adapter`, LoRA weights of its own on the shared base with a value head, and `head`, a value head alone on the
actor's detached hidden states (half the cost of an update, and it learns as well on small tasks).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from agentlightning.algorithms.aggregation import LossDenominators
from agentlightning.algorithms.value_loss import value_loss
from agentlightning.errors import NumericsError
from agentlightning.models.adapters import Adapters
from agentlightning.models.logprobs import TokenRows, hidden_states
from agentlightning.models.value_head import ValueHead
from agentlightning.types import Batch
from agentlightning.workers.actor import Actor
from agentlightning.workers.messages import MiniBatch
from agentlightning.workers.micro_batch import micro_batches
from agentlightning.workers.optimizer import NamedAdamW
from agentlightning.workers.settings import CriticSettings


class Critic:
    """A value function over the states before each response token."""

    name = "critic"

    def __init__(self, adapters: Adapters, settings: CriticSettings) -> None:
        self.adapters, self.settings = adapters, settings
        self.adapter = self.name if settings.kind == "adapter" else Actor.name
        self.head = ValueHead(adapters.base.config.hidden_size, adapters.base.device)
        self.head_parameters = {f"value_head.{name}": parameter for name, parameter in self.head.named_parameters()}
        self.adapter_parameters: Mapping[str, nn.Parameter] = adapters.parameters.get(self.name, {})
        self.optimizer = NamedAdamW({**self.adapter_parameters, **self.head_parameters}, settings.optim)

    @torch.no_grad()
    def compute_values(self, batch: Batch) -> np.ndarray:
        """Values float32 [B, T], zero where the mask is False."""
        self.adapters.use(self.adapter)
        values_BT = np.zeros(batch.response_BT.shape, dtype=np.float32)
        for rows in micro_batches(batch.total_len_B, self.settings.micro_batch):
            tokens = TokenRows.from_batch(batch.rows(rows), self.adapters.base.device)
            values_N = self.head(hidden_states(self.adapters.base, tokens))
            values_BT[rows[tokens.row_N.cpu().numpy()], tokens.column_N.cpu().numpy()] = values_N.cpu().numpy()
        return values_BT

    def update(self, batch: Batch, mini_batches: list[MiniBatch], training_step: int) -> list[dict[str, float]]:
        """One optimizer step for each mini-batch; needs the columns `values` and `returns`. Metrics add up over workers."""
        self.adapters.use(self.adapter)
        features = self._detached_states(batch) if self.settings.kind == "head" else None
        metrics: list[dict[str, float]] = []
        for mini_batch in mini_batches:
            self.optimizer.zero_grad()
            sums: dict[str, float] = {}
            for part in micro_batches(batch.total_len_B[mini_batch.rows], self.settings.micro_batch):
                rows = mini_batch.rows[part]
                self._backward(
                    batch.rows(rows), [features[row] for row in rows] if features else None, mini_batch.denominators, sums
                )
            metrics.append(sums | self.optimizer.step(training_step, "the value loss (critic/vf_loss)"))
        return metrics

    @torch.no_grad()
    def _detached_states(self, batch: Batch) -> list[torch.Tensor]:
        """The actor's states [trained tokens, H] of each row: they do not change while the head alone is trained."""
        states: list[torch.Tensor] = [torch.empty(0)] * len(batch)
        for rows in micro_batches(batch.total_len_B, self.settings.micro_batch):
            micro = batch.rows(rows)
            tokens = TokenRows.from_batch(micro, self.adapters.base.device)
            parts = hidden_states(self.adapters.base, tokens).split(micro.mask_BT.sum(axis=1).tolist())
            for row, part in zip(rows, parts, strict=True):
                states[row] = part
        return states

    def _backward(
        self, micro: Batch, features: list[torch.Tensor] | None, denominators: LossDenominators, sums: dict[str, float]
    ) -> None:
        device = self.adapters.base.device
        tokens = TokenRows.from_batch(micro, device)
        hidden_NH = torch.cat(features) if features is not None else hidden_states(self.adapters.base, tokens)
        mask_BT = torch.from_numpy(micro.mask_BT).to(device)
        vpreds_N = self.head(hidden_NH)
        vpreds_BT = vpreds_N.new_zeros(mask_BT.shape).index_put((tokens.row_N, tokens.column_N), vpreds_N)
        loss, metrics = value_loss(
            vpreds_BT,
            torch.from_numpy(micro.columns["values"]).to(device),
            torch.from_numpy(micro.columns["returns"]).to(device),
            mask_BT,
            self.settings.cliprange_value,
            self.settings.loss_agg_mode,
            denominators,
        )
        if not bool(loss.isfinite()):
            raise NumericsError(f"the value loss is {float(loss)}; prompts from {micro.uids[0]!r} on; no weight was changed")
        loss.backward()
        for name, value in {"vf_loss": loss.detach(), **metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
