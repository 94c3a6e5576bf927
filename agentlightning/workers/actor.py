"""The policy on one worker: a shard of the batch goes in; log-probabilities, or a better adapter, come out.

A plain class that knows no Ray. Losses are divided by the counts of the whole mini-batch (`LossDenominators`), so the
gradients of micro-batches and of workers simply add up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from agentlightning.algorithms.aggregation import LossDenominators, agg_loss
from agentlightning.algorithms.kl import kl_penalty
from agentlightning.algorithms.policy_losses.covariance import ChoiceTokens
from agentlightning.algorithms.policy_losses.inputs import PolicyLossInputs
from agentlightning.algorithms.policy_losses.names import POLICY_LOSSES, TOKEN_CHOICES
from agentlightning.errors import NumericsError
from agentlightning.models.adapters import Adapters
from agentlightning.models.base import output_head
from agentlightning.models.logprobs import log_probs, sum_pi_squared
from agentlightning.models.passes import Pass, training_passes
from agentlightning.types import Batch, MicroBatches
from agentlightning.workers.messages import ActorUpdate, LogProbs, MiniBatch, Shard
from agentlightning.workers.optimizer import NamedAdamW
from agentlightning.workers.settings import ActorSettings, load_policy_loss


class Actor:
    """The adapter `actor` on the frozen base, and its optimizer."""

    name = "actor"

    def __init__(
        self,
        adapters: Adapters,
        settings: ActorSettings,
        check: Callable[[], None],
        logical_shards: int | None = None,
    ) -> None:
        self.adapters, self.settings, self.check = adapters, settings, check
        self.parameters = adapters.parameters[self.name]
        self.optimizer = NamedAdamW(self.parameters, settings.optim, logical_shards)
        self.policy_loss = load_policy_loss(settings.loss_mode)
        self.any_worker: Callable[[bool], bool] | None = None  # where the base is sharded: see `training_passes`

    @torch.no_grad()
    def compute_log_prob(self, batch: Batch, with_squares: bool = False) -> LogProbs:
        """Log-probabilities of the response tokens under the present weights; `with_squares`: `sum_pi_squared_BT` too."""
        self.adapters.use(self.name)
        return self._log_probs(batch, np.arange(len(batch)), self.settings.log_prob_micro_batch, with_squares)

    @torch.no_grad()
    def compute_ref_log_prob(self, batch: Batch) -> LogProbs:
        """The same under the reference policy: the base with its adapters off."""
        with self.adapters.model.disable_adapter():
            return self._log_probs(batch, np.arange(len(batch)), self.settings.ref_micro_batch)

    def update(self, batch: Batch, mini_batches: list[MiniBatch], training_step: int) -> ActorUpdate:
        """One optimizer step for each mini-batch. Needs the columns `advantages`, and `old_log_probs` unless there is only
        one step (then the policy is still the one that sampled, and the ratio is 1). Reads `rollout_is_weights` and
        `rollout_tokens` where they are there: see `PolicyLossInputs`.
        """
        return self.update_shards([Shard(batch, mini_batches)], training_step)[0]

    def update_shards(self, shards: Sequence[Shard], training_step: int) -> list[ActorUpdate]:
        """The same where this worker has several shards of the batch; an answer for each, as if each were a worker's."""
        self.adapters.use(self.name, training=True)
        updates = [ActorUpdate([], np.full(shard.batch.response_BT.shape, np.nan, dtype=np.float32)) for shard in shards]
        for number in range(len(shards[0].mini_batches)):
            selected = [np.zeros(shard.batch.mask_BT.shape, dtype=np.bool_) for shard in shards]
            if self.settings.loss_mode in TOKEN_CHOICES:
                selected = self._select_tokens(shards, training_step, number)
            self.optimizer.zero_grad()
            for shard, selected_BT, update in zip(shards, selected, updates, strict=True):
                update.metrics.append(self._add_gradient(shard, number, selected_BT, update.log_probs_BT))
                self.optimizer.end_of_shard()
            stepped = self.optimizer.step(training_step, "the policy loss (actor/pg_loss)")
            for update in updates:
                update.metrics[-1] |= stepped
        return updates

    def _add_gradient(self, shard: Shard, number: int, selected_BT: np.ndarray, first_BT: np.ndarray) -> dict[str, float]:
        """Run a shard's part of mini-batch `number`; the log-probabilities of rows that had none go into `first_BT`."""
        batch, mini_batch = shard.batch, shard.mini_batches[number]
        rows = mini_batch.rows[self._can_move(batch, mini_batch.rows, selected_BT)]
        sums: dict[str, float] = {}
        for run in training_passes(self.adapters.base, batch, rows, self.settings.micro_batch, self.any_worker):
            self.check()
            logp_BT = self._backward(run, mini_batch.denominators, selected_BT, sums)
            new = np.isnan(first_BT[run.rows, 0])
            first_BT[run.rows[new], : logp_BT.shape[1]] = logp_BT[new]
        return sums

    def _can_move(self, batch: Batch, rows: np.ndarray, selected_BT: np.ndarray) -> np.ndarray:
        """Which rows have a gradient at all: a sample without advantage adds exactly nothing to a loss of `POLICY_LOSSES`,
        unless it has tokens that pay kl_cov's penalty. The metrics take the tokens of the others for unmoved.
        """
        settings = self.settings
        if settings.entropy_coeff or settings.kl_loss_coef or settings.loss_mode not in POLICY_LOSSES:
            return np.ones(len(rows), dtype=bool)
        return np.any((batch.columns["advantages"][rows] * batch.mask_BT[rows] != 0) | selected_BT[rows], axis=1)

    @torch.no_grad()
    def _select_tokens(self, shards: Sequence[Shard], training_step: int, number: int) -> list[np.ndarray]:
        """The tokens of mini-batch `number` that the loss treats in another way, bool [B, T] for each shard. They are chosen
        over the whole mini-batch, those of the other workers included, under the present weights.
        """
        key = (self.settings.seed, training_step, number)
        candidates = [self._choice_columns(shard.batch, shard.mini_batches[number].rows, key) for shard in shards]
        mine_N4 = torch.from_numpy(np.concatenate([columns_N4 for columns_N4, _ in candidates]))
        all_N4, mine = _gather(mine_N4.to(self.adapters.base.device))
        chosen_N = TOKEN_CHOICES[self.settings.loss_mode](ChoiceTokens(*all_N4.unbind(1)), self.settings)[mine].cpu().numpy()
        start = 0
        for columns_N4, selected_BT in candidates:
            selected_BT[selected_BT] = chosen_N[start : start + len(columns_N4)]
            start += len(columns_N4)
        return [selected_BT for _, selected_BT in candidates]

    def _choice_columns(self, batch: Batch, rows: np.ndarray, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The fields of `ChoiceTokens`, float64 [N, 4], of the trained tokens of `rows`, and where those are, bool [B, T]."""
        logp_BT = self._log_probs(batch, rows, self.settings.log_prob_micro_batch).log_probs_BT
        old_BT = batch.columns.get("old_log_probs", logp_BT)
        random_BT = _random_numbers(batch, rows, key)
        token_BT = np.zeros(batch.mask_BT.shape, dtype=np.bool_)
        token_BT[rows] = batch.mask_BT[rows]
        columns = [column_BT[token_BT] for column_BT in (batch.columns["advantages"], logp_BT, old_BT, random_BT)]
        return np.stack(columns, axis=1).astype(np.float64), token_BT

    def _backward(
        self, run: Pass, denominators: LossDenominators, selected_BT: np.ndarray, sums: dict[str, float]
    ) -> np.ndarray:
        """Add the micro-batch's gradients and metrics. Returns its log-probabilities [B, T]."""
        settings, device = self.settings, self.adapters.base.device
        logp_N, entropy_N = self._log_probs_of(run, bool(settings.entropy_coeff))
        mask_BT, logp_BT = torch.from_numpy(run.micro.mask_BT).to(device), run.scatter(logp_N)
        columns = {name: torch.from_numpy(column).to(device) for name, column in run.micro.columns.items()}
        inputs = PolicyLossInputs(
            log_prob_BT=logp_BT,
            old_log_prob_BT=columns.get("old_log_probs", logp_BT.detach()),
            advantages_BT=columns["advantages"],
            mask_BT=mask_BT,
            denominators=denominators,
            rollout_is_weights_BT=columns.get("rollout_is_weights"),
            selected_BT=torch.from_numpy(selected_BT[run.rows, : mask_BT.shape[1]]).to(device),
            rollout_tokens_BT=columns.get("rollout_tokens"),
        )
        loss, metrics = self.policy_loss(inputs, settings)
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

    def _log_probs(self, batch: Batch, rows: np.ndarray, sizes: MicroBatches, with_squares: bool = False) -> LogProbs:
        result_BT = np.zeros(batch.response_BT.shape, dtype=np.float32)
        squares_BT = np.zeros_like(result_BT) if with_squares else None
        entropy_sum = 0.0
        for run in training_passes(self.adapters.base, batch, rows, sizes, self.any_worker):
            self.check()
            logp_N, entropy_N = self._log_probs_of(run, entropy_grad=False)
            logp_BT = run.scatter(logp_N).cpu().numpy()
            result_BT[run.rows, : logp_BT.shape[1]] = logp_BT
            entropy_sum += float(entropy_N.sum())
            if squares_BT is not None:
                squares_N = sum_pi_squared(output_head(self.adapters.base), run.hidden_NH, self.settings.temperature)
                squares_BT[run.rows, : logp_BT.shape[1]] = run.scatter(squares_N).cpu().numpy()
        return LogProbs(result_BT, entropy_sum, int(batch.mask_BT[rows].sum()), squares_BT)

    def _log_probs_of(self, run: Pass, entropy_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return log_probs(output_head(self.adapters.base), run.hidden_NH, run.target_N, self.settings.temperature, entropy_grad)


def _random_numbers(batch: Batch, rows: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
    """Numbers in [0, 1) for the tokens of `rows`, float64 [B, T]; each is a function of `key`, the prompt's uid, which of the
    prompt's samples it is and where in the response (Philox, counter-based).

    So the workers need not speak to each other: the samples of a prompt are on one of them, in the order of the batch.
    """
    random_BT = np.zeros(batch.mask_BT.shape)
    wanted, seen = set(rows.tolist()), dict.fromkeys(batch.uids, 0)
    for row, uid in enumerate(batch.uids):
        sample, seen[uid] = seen[uid], seen[uid] + 1
        if row in wanted:
            digest = hashlib.blake2b(repr((*key, uid, sample)).encode(), digest_size=16).digest()
            stream = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))
            random_BT[row, : batch.response_len_B[row]] = stream.random(int(batch.response_len_B[row]))
    return random_BT


def _gather(mine: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """The rows [N, ...] of all workers, by rank, and where `mine` are among them. Every worker must call it."""
    if not dist.is_initialized():
        return mine, slice(len(mine))
    sizes = mine.new_zeros(dist.get_world_size(), dtype=torch.int64)
    sizes[dist.get_rank()] = len(mine)
    dist.all_reduce(sizes)
    longest = int(sizes.max())
    padded = torch.cat([mine, mine.new_zeros(longest - len(mine), *mine.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    start = int(sizes[: dist.get_rank()].sum())
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes, strict=True)]), slice(start, start + len(mine))


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
