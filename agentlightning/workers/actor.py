"""The policy on one worker: a shard of the batch goes in; log-probabilities, or a better adapter, come out.

A plain class that knows no Ray. Losses are divided by the counts of the whole mini-batch (`LossDenominators`), so the
gradients of micro-batches and of workers simply add up.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from agentlightning.algorithms.aggregation import LossDenominators, agg_loss
from agentlightning.algorithms.kl import kl_penalty
from agentlightning.algorithms.policy_losses import vanilla
from agentlightning.errors import NumericsError
from agentlightning.models.adapters import Adapters
from agentlightning.models.base import output_head
from agentlightning.models.logprobs import log_probs
from agentlightning.models.passes import Pass, training_passes
from agentlightning.types import Batch, MicroBatches
from agentlightning.workers.messages import ActorUpdate, LogProbs, MiniBatch
from agentlightning.workers.optimizer import NamedAdamW
from agentlightning.workers.settings import ActorSettings


class Actor:
    """The adapter `actor` on the frozen base, and its optimizer."""

    name = "actor"

    def __init__(self, adapters: Adapters, settings: ActorSettings, check: Callable[[], None]) -> None:
        self.adapters, self.settings, self.check = adapters, settings, check
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
        self.adapters.use(self.name, training=True)
        first_BT = np.full(batch.response_BT.shape, np.nan, dtype=np.float32)
        metrics: list[dict[str, float]] = []
        for mini_batch in mini_batches:
            rows = mini_batch.rows[self._can_move(batch, mini_batch.rows)]
            self.optimizer.zero_grad()
            sums: dict[str, float] = {}
            for run in training_passes(self.adapters.base, batch, rows, self.settings.micro_batch):
                self.check()
                logp_BT = self._backward(run, mini_batch.denominators, sums)
                new = np.isnan(first_BT[run.rows, 0])
                first_BT[run.rows[new], : logp_BT.shape[1]] = logp_BT[new]
            metrics.append(sums | self.optimizer.step(training_step, "the policy loss (actor/pg_loss)"))
        return ActorUpdate(metrics, first_BT)

    def _can_move(self, batch: Batch, rows: np.ndarray) -> np.ndarray:
        """Which rows have a gradient at all: a sample without advantage adds exactly nothing to the clipped loss."""
        if self.settings.entropy_coeff or self.settings.kl_loss_coef:
            return np.ones(len(rows), dtype=bool)
        return np.any(batch.columns["advantages"][rows] * batch.mask_BT[rows], axis=1)

    def _backward(self, run: Pass, denominators: LossDenominators, sums: dict[str, float]) -> np.ndarray:
        """Add the micro-batch's gradients and metrics. Returns its log-probabilities [B, T]."""
        settings, device = self.settings, self.adapters.base.device
        logp_N, entropy_N = self._log_probs_of(run, bool(settings.entropy_coeff))
        mask_BT, logp_BT = torch.from_numpy(run.micro.mask_BT).to(device), run.scatter(logp_N)
        columns = {name: torch.from_numpy(column).to(device) for name, column in run.micro.columns.items()}
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
            entropy = agg_loss(run.scatter(entropy_N), mask_BT, settings.loss_agg_mode, denominators)
            loss = loss - settings.entropy_coeff * entropy
        if settings.kl_loss_coef:
            kl_BT = kl_penalty(logp_BT, columns["ref_log_prob"], settings.kl_loss_type)
            kl_loss = agg_loss(kl_BT, mask_BT, settings.loss_agg_mode, denominators)
            loss = loss + settings.kl_loss_coef * kl_loss
            metrics["kl_loss"] = kl_loss.detach()
        _check_finite(run.micro, logp_BT.detach(), loss.detach())
        loss.backward()
        metrics |= {"entropy_sum": entropy_N.detach().sum(), "entropy_tokens": float(len(entropy_N))}
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        return logp_BT.detach().cpu().numpy()

    def _log_probs(self, batch: Batch, sizes: MicroBatches) -> LogProbs:
        result_BT = np.zeros(batch.response_BT.shape, dtype=np.float32)
        entropy_sum = 0.0
        for run in training_passes(self.adapters.base, batch, np.arange(len(batch)), sizes):
            self.check()
            logp_N, entropy_N = self._log_probs_of(run, entropy_grad=False)
            logp_BT = run.scatter(logp_N).cpu().numpy()
            result_BT[run.rows, : logp_BT.shape[1]] = logp_BT
            entropy_sum += float(entropy_N.sum())
        return LogProbs(result_BT, entropy_sum, int(batch.mask_BT.sum()))

    def _log_probs_of(self, run: Pass, entropy_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return log_probs(output_head(self.adapters.base), run.hidden_NH, run.target_N, self.settings.temperature, entropy_grad)


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
