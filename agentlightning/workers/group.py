"""The worker group: one call in the controller becomes one call on every worker, and their answers one answer.

Two back ends with the same objects behind them: `InProcess` (one worker, here; breakpoints work) and
`agentlightning.workers.ray_backend` (one process a GPU or CPU slot). What is split, and how, is a pure function of the batch
and the number of shards: that of the workers, or with logical shards one that is kept with the run, so that another number of
workers gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from agentlightning.checkpoint.manifest import FileEntry
from agentlightning.errors import CheckpointError, StaleAdapterError
from agentlightning.types import Batch, Completion, JournalSpec, Prompt, SamplingParams
from agentlightning.workers.messages import ActorUpdate, LogProbs, MiniBatch, WorkerState
from agentlightning.workers.settings import WorkerSettings
from agentlightning.workers.shards import balanced_shards, prompt_shards, shards_of_workers

# What the losses read; no other column of a batch is sent to the workers.
ACTOR_COLUMNS = ("advantages", "old_log_probs", "ref_log_prob", "rollout_is_weights", "rollout_tokens")
CRITIC_COLUMNS = ("values", "returns")
SHARE_BYTES = 1 << 24  # of a checkpoint, below which a file more costs a large cluster more than it saves


class Backend(Protocol):
    """Runs `Worker` methods: `arguments[rank]` are those of worker `rank`."""

    world_size: int

    def call(self, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        """The answers of all workers, by rank. Who is given None is not asked, and has None for an answer."""
        ...

    def call_first(self, method: str, *arguments: Any) -> Any:
        """The answer of worker 0, the others left alone."""
        ...

    def call_beside(self, method: str, ranks: Sequence[int], *arguments: Any) -> list[Any]:
        """The answers of workers `ranks`, from a thread beside the one that the other calls run in."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


class InProcess:
    """One worker in this process."""

    world_size = 1

    def __init__(self, settings: WorkerSettings, check: Callable[[], None]) -> None:
        from agentlightning.workers.worker import Worker  # the controller of a Ray run never needs the model code

        self.worker = Worker(settings, check)

    def call(self, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Any]:
        """See `Backend`."""
        return [getattr(self.worker, method)(*given) if given is not None else None for given in arguments]

    def call_first(self, method: str, *arguments: Any) -> Any:
        """See `Backend`."""
        return getattr(self.worker, method)(*arguments)

    def call_beside(self, method: str, ranks: Sequence[int], *arguments: Any) -> list[Any]:
        """See `Backend`: the calling thread is not the one that trains."""
        return [getattr(self.worker, method)(*arguments) for _ in ranks]

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True, slots=True)
class SnapshotWriter:
    """Has the workers write what they hold in host buffer `buffer`: the `PartWriter` of a checkpoint."""

    backend: Backend
    ranks: Sequence[int]
    buffer: int
    bytes: int

    def __call__(self, staging: Path, algorithm: str) -> Mapping[str, FileEntry]:
        """See `PartWriter`."""
        answers = self.backend.call_beside("write_snapshot", self.ranks, self.buffer, str(staging), algorithm)
        return {relative: entry for answer in answers for relative, entry in answer.items()}


class WorkerGroup:
    """What the trainer talks to. `logical_shards` must be that of the workers' settings; `decode_by_shard` where the bits of a
    sample hang on those decoded beside it.
    """

    def __init__(self, backend: Backend, logical_shards: int | None = None, decode_by_shard: bool = False) -> None:
        self.backend = backend
        self.world_size = backend.world_size
        self.logical_shards, self.decode_by_shard = logical_shards, decode_by_shard
        self._writers: list[int] = [0]
        self._adapter_configs: dict[str, dict[str, Any]] = {}

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        seed: int,
        step: int,
        version: int,
        journal: JournalSpec | None = None,
    ) -> list[Completion]:
        """`params.n` completions of each prompt, prompt by prompt, by adapter `version`.

        With a `journal`, those that finished before the run was killed are taken from it.
        """
        lengths = np.array([len(prompt.token_ids) for prompt in prompts])
        parts = self.logical_shards if self.logical_shards is not None and self.decode_by_shard else None
        shards = balanced_shards(lengths, parts or self.world_size)
        arguments = [([prompts[i] for i in shard], params, seed, step, version, journal) for shard in shards]
        answers = self.backend.call("generate", arguments) if parts is None else self._spread("generate", arguments)
        result: list[Completion | None] = [None] * (len(prompts) * params.n)
        for shard, completions in zip(shards, answers, strict=True):
            for place, prompt in enumerate(shard):
                result[prompt * params.n : (prompt + 1) * params.n] = completions[place * params.n : (place + 1) * params.n]
        done = [completion for completion in result if completion is not None]
        if any(completion.adapter_version != version for completion in done):
            raise StaleAdapterError(f"a worker answered with completions of another adapter version than {version}")
        return done

    def compute_log_prob(self, batch: Batch, with_squares: bool = False) -> LogProbs:
        """Log-probabilities under the present adapter, [B, T]; `with_squares`: the sums of squared probabilities too."""
        return self._log_probs("compute_log_prob", batch, with_squares)

    def compute_ref_log_prob(self, batch: Batch) -> LogProbs:
        """Log-probabilities with the adapter off, [B, T]."""
        return self._log_probs("compute_ref_log_prob", batch)

    def compute_values(self, batch: Batch) -> np.ndarray:
        """Values of the states before each response token, [B, T]."""
        shards = self._shards(batch)
        bare = _only(batch)
        answers = self._spread("compute_values", [(bare.rows(shard),) for shard in shards])
        return _gather(answers, shards, batch, 0.0)

    def update_actor(
        self, batch: Batch, mini_batches: Sequence[MiniBatch], training_step: int
    ) -> tuple[dict[str, float], np.ndarray]:
        """One optimizer step a mini-batch. Returns metrics, the mean over the steps, and the first pass's log-probs [B, T]."""
        shards = self._shards(batch)
        updates: list[ActorUpdate] = self._spread(
            "update_actor", _work(_only(batch, ACTOR_COLUMNS), shards, mini_batches, training_step)
        )
        log_probs_BT = _gather([update.log_probs_BT for update in updates], shards, batch, np.nan)
        metrics = _reduce([update.metrics for update in updates])
        tokens = metrics.pop("entropy_tokens", 0.0)
        metrics["entropy"] = metrics.pop("entropy_sum", 0.0) / tokens if tokens else 0.0
        return metrics, log_probs_BT

    def update_critic(self, batch: Batch, mini_batches: Sequence[MiniBatch], training_step: int) -> dict[str, float]:
        """One optimizer step a mini-batch. Returns metrics, the mean over the steps."""
        shards = self._shards(batch)
        work = _work(_only(batch, CRITIC_COLUMNS), shards, mini_batches, training_step)
        return _reduce(self._spread("update_critic", work))

    def update_weights(self, version: int) -> tuple[float, float]:
        """All engines sample from the present adapter from now on.

        Returns the largest peak of device memory, and the largest resident memory, of a worker, in GiB.
        """
        answers = self._same("update_weights", version)
        return max(device for device, _ in answers), max(host for _, host in answers)

    def choose_writers(self, witness: Path, share_bytes: int = SHARE_BYTES) -> None:
        """Those workers write checkpoints that see the file `witness` in the run directory as it is here: as many of them as
        get a share of at least `share_bytes`, spread over all.

        Raises `CheckpointError` if none does.
        """
        text = witness.read_text(errors="replace")
        seeing = [rank for rank, sees in enumerate(self._same("sees", str(witness), text)) if sees]
        shares = min(len(seeing), max(1, self.backend.call_first("state_bytes") // share_bytes))
        self._writers = [seeing[place * len(seeing) // shares] for place in range(shares)]
        if not self._writers:
            raise CheckpointError(
                f"none of {self.world_size} workers can see {witness.parent}; the run directory must be on a file system that "
                "their hosts share with this one: trainer.default_local_dir=DIR"
            )

    def adapter_configs(self) -> dict[str, dict[str, Any]]:
        """PEFT's adapter_config.json of `actor` and, where it has an adapter of its own, `critic`."""
        if not self._adapter_configs:  # they never change
            self._adapter_configs = self.backend.call_first("adapter_configs")
        return self._adapter_configs

    def snapshot(self, buffer: int) -> SnapshotWriter:
        """Copy the state as it is now into host buffer 0 or 1, each writer its share; returns what writes it out later."""
        shares: list[tuple[int, int, int] | None] = [None] * self.world_size
        for writer, rank in enumerate(self._writers):
            shares[rank] = (buffer, writer, len(self._writers))
        sizes = [size for size in self.backend.call("snapshot", shares) if size is not None]
        return SnapshotWriter(self.backend, tuple(self._writers), buffer, sum(sizes))

    def load_state(self, state: WorkerState) -> None:
        """All workers go on from `state`."""
        self._same("load_state", state)

    def memory_warning(self) -> str | None:
        """What the workers had to say, before they loaded the base, about a step that may not fit; None where it will."""
        warnings = [warning for warning in self._same("memory_warning") if warning is not None]
        if not warnings:
            return None
        return warnings[0] + (f" (so on {len(warnings)} of {self.world_size} workers)" if self.world_size > 1 else "")

    def close(self) -> None:
        """End the workers."""
        self.backend.close()

    def _same(self, method: str, *arguments: Any) -> list[Any]:
        return self.backend.call(method, [arguments] * self.world_size)

    def _shards(self, batch: Batch) -> list[np.ndarray]:
        return prompt_shards(batch, self.logical_shards or self.world_size)

    def _spread(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers for all shards, in their order; `arguments` has one tuple a shard."""
        if self.logical_shards is None:
            return self.backend.call(method, arguments)
        parts = shards_of_workers(self.logical_shards, self.world_size)
        answers = self.backend.call("each_shard", [(method, arguments[part.start : part.stop]) for part in parts])
        return [answer for answers_of_worker in answers for answer in answers_of_worker]

    def _log_probs(self, method: str, batch: Batch, *more: Any) -> LogProbs:
        shards = self._shards(batch)
        bare = _only(batch)
        answers: list[LogProbs] = self._spread(method, [(bare.rows(shard), *more) for shard in shards])
        log_probs_BT = _gather([answer.log_probs_BT for answer in answers], shards, batch, 0.0)
        squares = [answer.sum_pi_squared_BT for answer in answers if answer.sum_pi_squared_BT is not None]
        return LogProbs(
            log_probs_BT,
            sum(answer.entropy_sum for answer in answers),
            sum(answer.tokens for answer in answers),
            _gather(squares, shards, batch, 0.0) if squares else None,
        )


def _only(batch: Batch, names: Sequence[str] = ()) -> Batch:
    """The batch without its other columns."""
    return replace(batch, columns={name: column_BT for name, column_BT in batch.columns.items() if name in names})


def _work(
    batch: Batch, shards: Sequence[np.ndarray], mini_batches: Sequence[MiniBatch], training_step: int
) -> list[tuple[Batch, list[MiniBatch], int]]:
    """What each shard is to do in a training step."""
    place_B = np.full((len(mini_batches), len(batch)), -1, dtype=np.int64)  # of each row, in each mini-batch
    for place, mini in zip(place_B, mini_batches, strict=True):
        place[mini.rows] = np.arange(len(mini.rows))
    return [(batch.rows(shard), _local(mini_batches, place_B[:, shard]), training_step) for shard in shards]


def _local(mini_batches: Sequence[MiniBatch], places: np.ndarray) -> list[MiniBatch]:
    """The mini-batches in terms of a shard's own rows; the counts stay those of all rows.

    `places` [mini-batch, row of the shard]: where in the mini-batch the row comes, -1 if it is not in it.
    """
    orders = np.argsort(places, axis=1)
    outside = (places < 0).sum(axis=1)  # these come first in the order
    return [
        MiniBatch(order[count:], mini.denominators) for mini, order, count in zip(mini_batches, orders, outside, strict=True)
    ]


def _gather(parts: Sequence[np.ndarray], shards: Sequence[np.ndarray], batch: Batch, fill: float) -> np.ndarray:
    """Rows of the workers back in the order of the batch, [B, T]."""
    whole = np.full(batch.response_BT.shape, fill, dtype=np.float32)
    for part, shard in zip(parts, shards, strict=True):
        whole[shard, : part.shape[1]] = part
    return whole


def _reduce(workers: Sequence[Sequence[dict[str, float]]]) -> dict[str, float]:
    """Metrics of [worker][optimizer step]: sums over workers, means over steps; norm and rate are the same everywhere."""
    totals: dict[str, float] = {}
    for metrics in zip(*workers, strict=True):
        for name in {name for worker in metrics for name in worker}:
            values = [worker[name] for worker in metrics if name in worker]
            totals[name] = totals.get(name, 0.0) + (values[0] if name in ("grad_norm", "lr") else sum(values))
    return {name: total / len(workers[0]) for name, total in sorted(totals.items())}
