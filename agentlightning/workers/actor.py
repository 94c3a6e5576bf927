"""The policy on one worker: a shard of the batch goes in; log-probabilities, or a better adapter, come out.

A plain class that knows no Ray. Losses are divided by the counts of the whole mini-batch (`LossDenominators`), so the
gradients of micro-batches and of workers simply add up.
"""

from __future__ import annotations

import numpy as np
import torch

from agentlightning.algorithms.aggregation import LossDenominators, agg_loss
from agentlightning.algorithms.kl import kl_penalty
from agentlightning.algorithms.policy_losses import vanilla
from agentlightning.errors import NumericsError
from agentlightning.models.adapters import Adapters
from agentlightning.models.base import output_head
from agentlightning.models.logprobs import TokenRows, hidden_states, log_probs
from agentlightning.types import Batch
from agentlightning.workers.messages import ActorUpdate, LogProbs, MiniBatch
from agentlightning.workers.micro_batch import micro_batches
from agentlightning.workers.optimizer import NamedAdamW
from agentlightning.workers.settings import ActorSettings, MicroBatchSettings


class Actor:
    """The adapter `actor` on the frozen base, and its optimizer."""

    name = "actor"

    def __init__(self, adapters: Adapters, settings: ActorSettings) -> None:
        self.adapters, self.settings = adapters, settings
        self.parameters = adapters.parameters[self.name]
        self.optimizer = NamedAdamW(self.parameters, settings.optim)

    @torch.no_grad()
    def compute_log_prob(self, batch: Batch) -> LogProbs:
        """Log-probabilities of the response tokens under the present weights."""
        self.adapters.use(self.name)
        return self._log_probs(batch, self.settings.log_prob_micro_batch)

    @torch.no_grad()
    def compute_ref_log_prob(self, batch: Batch) -> LogProbs:
        """The same under the reference policy: the base with its adapters off."""
        with self.adapters.model.disable_adapter():
            return self._log_probs(batch, self.settings.ref_micro_batch)

    def update(self, batch: Batch, mini_batches: list[MiniBatch], training_step: int) -> ActorUpdate:
        """One optimizer step for each mini-batch. Needs the columns `advantages`, and `old_log_probs` unless there is only
        one step (then the policy is still the one that sampled, and the ratio is 1)."""
        self.adapters.use(self.name)
        first_BT = np.full(batch.response_BT.shape, np.nan, dtype=np.float32)
        metrics: list[dict[str, float]] = []
        for mini_batch in mini_batches:
            rows = mini_batch.rows[self._can_move(batch, mini_batch.rows)]
            self.optimizer.zero_grad()
            sums: dict[str, float] = {}
            for part in micro_batches(batch.total_len_B[rows], self.settings.micro_batch):
                micro = batch.rows(rows[part])
                logp_BT = self._backward(micro, mini_batch.denominators, sums)
                new = np.isnan(first_BT[rows[part], 0])
                first_BT[rows[part][new], : logp_BT.shape[1]] = logp_BT[new]
            metrics.append(sums | self.optimizer.step(training_step, "the policy loss (actor/pg_loss)"))
        return ActorUpdate(metrics, first_BT)

    def _can_move(self, batch: Batch, rows: np.ndarray) -> np.ndarray:
        """Which rows have a gradient at all: a sample without advantage adds exactly nothing to the clipped loss."""
        if self.settings.entropy_coeff or self.settings.kl_loss_coef:
            return np.ones(len(rows), dtype=bool)
        return np.any(batch.columns["advantages"][rows] * batch.mask_BT[rows], axis=1)

    def _backward(self, micro: Batch, denominators: LossDenominators, sums: dict[str, float]) -> np.ndarray:
        """Add the micro-batch's gradients and metrics. Returns its log-probabilities [B, T]."""
        settings, device = self.settings, self.adapters.base.device
        tokens = TokenRows.from_batch(micro, device)
        head = output_head(self.adapters.base)
        hidden_NH = hidden_states(self.adapters.base, tokens)
        logp_N, entropy_N = log_probs(head, hidden_NH, tokens.target_N, settings.temperature, bool(settings.entropy_coeff))
        mask_BT = torch.from_numpy(micro.mask_BT).to(device)
        logp_BT = _scatter(logp_N, tokens, mask_BT)
        columns = {name: torch.from_numpy(column).to(device) for name, column in micro.columns.items()}
        loss, metrics = vanilla(
            logp_BT,
            columns.get("old_log_probs", logp_BT.detach()),
            columns["advantages"],
            mask_BT,
            clip_ratio_low=settings.clip_ratio_low,
            clip_ratio_high=settings.clip_ratio_high,
            clip_ratio_c=settings.clip_ratio_c,
            loss_agg_mode=settings.loss_agg_mode,
            denominators=denominators,
        )
        metrics = {"pg_loss": loss.detach(), **metrics}
        if settings.entropy_coeff:
            entropy_BT = _scatter(entropy_N, tokens, mask_BT)
            loss = loss - settings.entropy_coeff * agg_loss(entropy_BT, mask_BT, settings.loss_agg_mode, denominators)
        if settings.kl_loss_coef:
            kl_BT = kl_penalty(logp_BT, columns["ref_log_prob"], settings.kl_loss_type)
            kl_loss = agg_loss(kl_BT, mask_BT, settings.loss_agg_mode, denominators)
            loss = loss + settings.kl_loss_coef * kl_loss
            metrics["kl_loss"] = kl_loss.detach()
        _check_finite(micro, logp_BT.detach(), loss.detach())
        loss.backward()
        metrics |= {"entropy_sum": entropy_N.detach().sum(), "entropy_tokens": float(len(entropy_N))}
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        return logp_BT.detach().cpu().numpy()

    def _log_probs(self, batch: Batch, settings: MicroBatchSettings) -> LogProbs:
        device, head = self.adapters.base.device, output_head(self.adapters.base)
        result_BT = np.zeros(batch.response_BT.shape, dtype=np.float32)
        entropy_sum = 0.0
        for rows in micro_batches(batch.total_len_B, settings):
            micro = batch.rows(rows)
            tokens = TokenRows.from_batch(micro, device)
            logp_N, entropy_N = log_probs(
                head, hidden_states(self.adapters.base, tokens), tokens.target_N, self.settings.temperature
            )
            logp_BT = _scatter(logp_N, tokens, torch.from_numpy(micro.mask_BT).to(device))
            result_BT[rows, : logp_BT.shape[1]] = logp_BT.cpu().numpy()
            entropy_sum += float(entropy_N.sum())
        return LogProbs(result_BT, entropy_sum, int(batch.mask_BT.sum()))


def _scatter(x_N: torch.Tensor, tokens: TokenRows, mask_BT: torch.Tensor) -> torch.Tensor:
    """Per-token values back at their places, zero elsewhere; gradients flow."""
    return x_N.new_zeros(mask_BT.shape).index_put((tokens.row_N, tokens.column_N), x_N)


def _check_finite(micro: Batch, logp_BT: torch.Tensor, loss: torch.Tensor) -> None:
    if not bool(logp_BT.isfinite().all()):
        row = int((~logp_BT.isfinite()).any(dim=1).nonzero()[0])
        raise NumericsError(
            f"NaN or inf in the log-probabilities of a sample of prompt {micro.uids[row]!r}; no weight was changed"
        )
    if not bool(loss.isfinite()):
        bad = [name for name, column in micro.columns.items() if not np.isfinite(column[micro.mask_BT]).all()]
        raise NumericsError(
            f"the policy loss is {float(loss)}; not finite among its inputs: {', '.join(bad) or 'none'}; prompts from "
            f"{micro.uids[0]!r} on; no weight was changed"
        )
