"""The critic on one worker: a shard goes in; values, or a better value function, come out.

Two kinds: `adapter`, LoRA weights of its own on the shared base with a value head, and `head`, a value head alone on the
actor's detached hidden states (half the cost of an update, and it learns as well on small tasks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from agentlightning.algorithms.aggregation import LossDenominators
from agentlightning.algorithms.value_loss import value_loss
from agentlightning.errors import NumericsError
from agentlightning.models.adapters import Adapters
from agentlightning.models.passes import Pass, make_pass, training_passes
from agentlightning.models.value_head import ValueHead
from agentlightning.types import Batch
from agentlightning.workers.actor import Actor
from agentlightning.workers.messages import MiniBatch, Shard
from agentlightning.workers.optimizer import NamedAdamW
from agentlightning.workers.settings import CriticSettings


class Critic:
    """A value function over the states before each response token."""

    name = "critic"

    def __init__(
        self,
        adapters: Adapters,
        settings: CriticSettings,
        check: Callable[[], None],
        logical_shards: int | None = None,
    ) -> None:
        self.adapters, self.settings, self.check = adapters, settings, check
        self.adapter = self.name if settings.kind == "adapter" else Actor.name
        device = next(iter(adapters.parameters[self.adapter].values())).device
        self.head = ValueHead(adapters.base.config.hidden_size, device)
        self.any_worker: Callable[[bool], bool] | None = None  # where the base is sharded: see `training_passes`
        self.head_parameters = {f"value_head.{name}": parameter for name, parameter in self.head.named_parameters()}
        self.adapter_parameters: Mapping[str, nn.Parameter] = adapters.parameters.get(self.name, {})
        self.optimizer = NamedAdamW({**self.adapter_parameters, **self.head_parameters}, settings.optim, logical_shards)

    @torch.no_grad()
    def compute_values(self, batch: Batch) -> np.ndarray:
        """Values float32 [B, T], zero where the mask is False."""
        self.adapters.use(self.adapter)
        values_BT = np.zeros(batch.response_BT.shape, dtype=np.float32)
        for run in training_passes(
            self.adapters.base, batch, np.arange(len(batch)), self.settings.micro_batch, self.any_worker
        ):
            self.check()
            part_BT = run.scatter(self.head(run.hidden_NH)).cpu().numpy()
            values_BT[run.rows, : part_BT.shape[1]] = part_BT
        return values_BT

    def update(self, batch: Batch, mini_batches: list[MiniBatch], training_step: int) -> list[dict[str, float]]:
        """One optimizer step for each mini-batch; needs the columns `values` and `returns`. Metrics add up over shards."""
        return self.update_shards([Shard(batch, mini_batches)], training_step)[0]

    def update_shards(self, shards: Sequence[Shard], training_step: int) -> list[list[dict[str, float]]]:
        """The same where this worker has several shards of the batch; an answer for each, as if each were a worker's."""
        self.adapters.use(self.adapter, training=self.settings.kind == "adapter")
        # The actor's states do not change while the head alone is trained: one pass serves all epochs.
        states = [self._detached_states(shard.batch) if self.settings.kind == "head" else None for shard in shards]
        metrics: list[list[dict[str, float]]] = [[] for _ in shards]
        for number in range(len(shards[0].mini_batches)):
            self.optimizer.zero_grad()
            for shard, states_of_rows, answer in zip(shards, states, metrics, strict=True):
                answer.append(self._add_gradient(shard, number, states_of_rows))
                self.optimizer.end_of_shard()
            stepped = self.optimizer.step(training_step, "the value loss (critic/vf_loss)")
            for answer in metrics:
                answer[-1] |= stepped
        return metrics

    def _add_gradient(self, shard: Shard, number: int, states: list[torch.Tensor] | None) -> dict[str, float]:
        """Run a shard's part of mini-batch `number`, from its rows' `states` where they are known."""
        batch, mini_batch = shard.batch, shard.mini_batches[number]
        if states is None:
            runs = training_passes(self.adapters.base, batch, mini_batch.rows, self.settings.micro_batch, self.any_worker)
        else:
            runs = _one_pass(batch, mini_batch.rows, states)
        sums: dict[str, float] = {}
        for run in runs:
            self.check()
            self._backward(run, mini_batch.denominators, sums)
        return sums

    @torch.no_grad()
    def _detached_states(self, batch: Batch) -> list[torch.Tensor]:
        """The actor's states [trained tokens, H] of each row."""
        states: list[torch.Tensor] = [torch.empty(0)] * len(batch)
        for run in training_passes(
            self.adapters.base, batch, np.arange(len(batch)), self.settings.micro_batch, self.any_worker
        ):
            self.check()
            parts = run.hidden_NH.split(run.micro.mask_BT.sum(axis=1).tolist())
            for row, part in zip(run.rows, parts, strict=True):
                states[row] = part
        return states

    def _backward(self, run: Pass, denominators: LossDenominators, sums: dict[str, float]) -> None:
        columns = {name: torch.from_numpy(run.micro.columns[name]).to(run.hidden_NH.device) for name in ("values", "returns")}
        loss, metrics = value_loss(
            run.scatter(self.head(run.hidden_NH)),
            columns["values"],
            columns["returns"],
            torch.from_numpy(run.micro.mask_BT).to(run.hidden_NH.device),
            self.settings.cliprange_value,
            self.settings.loss_agg_mode,
            denominators,
        )
        if not bool(loss.isfinite()):
            raise NumericsError(
                f"the value loss (critic/vf_loss) is {float(loss.detach())}; prompts from {run.micro.uids[0]!r} on; no weight "
                "was changed"
            )
        loss.backward()
        for name, value in {"vf_loss": loss.detach(), **metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value)


def _one_pass(batch: Batch, rows: np.ndarray, states: list[torch.Tensor]) -> Iterator[Pass]:
    """The states of `rows` as one pass: without the model in it there is no memory to save."""
    if len(rows):
        yield make_pass(rows, batch.rows(rows), torch.cat([states[row] for row in rows]))
